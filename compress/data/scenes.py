"""Scenes of scikit-learn's handwritten digits on textured backgrounds, at random places and sizes, with masks and boxes.

They replace photographs where nothing can be downloaded. Training and validation scenes show different digits.
"""

from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from compress.data.named import DATA_SETS, Difficulty
from compress.data.settings import DataSettings
from export.errors import DataError
from export.images.preprocess import IGNORED
from export.images.size import Size

Part = Literal["train", "val"]
PARTS: tuple[Part, Part] = ("train", "val")
CLASSES = ("background", *(str(digit) for digit in range(10)))
INK = 0.35  # a pixel with more ink than this belongs to the digit
FAINT = 0.15  # one with less belongs to the background; between the two it is IGNORED
VALIDATION = 5  # every fifth digit is for validation scenes only


class Scene(NamedTuple):
    """An image uint8 (size, size, 3), its mask uint8 (size, size), and its digits' boxes float32 (n, 5).

    A box is left, top, right, bottom (in pixels, right and bottom exclusive) and the class in the mask; background is 0.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    boxes: NDArray[np.float32]


class Scenes(NamedTuple):
    """Images uint8 (n, size, size, 3), masks uint8 (n, size, size), and each image's boxes."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    boxes: tuple[NDArray[np.float32], ...]


def scenes_of(settings: DataSettings, size: Size) -> tuple[Scenes, Scenes] | None:
    """Return the training and the validation scenes of a data set with a name, None for other data sets; DataError unless they are square."""
    if (difficulty := DATA_SETS[settings.name].scenes) is None:
        return None
    side, other = size
    if side != other:
        raise DataError(f"data.image_size: {settings.name} are square: give one number, or DATA=/path/to/a/folder")
    train, val = (draw_scenes(difficulty, part, size=side, seed=settings.seed) for part in PARTS)
    return train, val


def draw_scenes(difficulty: Difficulty, part: Part, *, size: int, seed: int) -> Scenes:
    """Draw the scenes of one part of a data set; each is a function of (seed, part, number)."""
    number = difficulty.train if part == "train" else difficulty.val
    drawn = [scene(difficulty, part, size=size, seed=(seed, PARTS.index(part), n)) for n in range(number)]
    return Scenes(
        np.stack([one.image for one in drawn]),
        np.stack([one.mask for one in drawn]),
        tuple(one.boxes for one in drawn),
    )


def scene(difficulty: Difficulty, part: Part, *, size: int, seed: tuple[int, ...]) -> Scene:
    """Draw one scene: a plain or two-coloured background, and digits that hide at most a third of one another."""
    random = np.random.default_rng(seed)
    canvas = np.full((size, size, 3), 0.1) if difficulty.plain else _background(random, size)
    mask = np.zeros((size, size), np.uint8)
    boxes = list[tuple[float, ...]]()
    images, labels = _digits(part)
    for _ in range(int(random.integers(difficulty.digits[0], difficulty.digits[1] + 1))):
        side = max(int(size * random.uniform(*difficulty.sizes)), 8)
        top, left = random.integers(0, size - side + 1, 2)
        chosen = int(random.integers(len(images)))
        ink = _scaled(images[chosen], side)
        rows, columns = np.flatnonzero((ink > INK).any(axis=1)), np.flatnonzero((ink > INK).any(axis=0))
        box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1, 1 + labels[chosen])
        sign = 1.0 if random.random() < 0.5 else -1.0
        shift = sign * random.uniform(*difficulty.contrast) * random.uniform(0.6, 1.0, 3)
        if any(_covers(box, other) for other in boxes):
            continue
        place = (slice(top, top + side), slice(left, left + side))
        under = canvas[place].mean(axis=(0, 1))
        colour = np.where(abs(under + shift - 0.5) > 0.5, under - shift, under + shift).clip(0, 1)
        canvas[place] += ink[:, :, None] * (colour - canvas[place])
        mask[place] = np.where(ink > INK, box[4], np.where((ink > FAINT) & (mask[place] == 0), IGNORED, mask[place]))
        boxes.append(tuple(map(float, box)))
    canvas += random.normal(0, difficulty.noise, canvas.shape)
    image = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
    return Scene(image, mask, np.array(boxes, np.float32).reshape(-1, 5))


@cache
def _digits(part: Part) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a part's digits, ink from 0 to 1 (n, 8, 8), and their labels (n,)."""
    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % VALIDATION == 0
    chosen = held_out if part == "val" else ~held_out
    return bunch.images[chosen] / 16, bunch.target[chosen]


def _background(random: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Return a pattern (size, size, 3) from 0 to 1: two colours, mixed by smooth noise of random grain."""
    grain = int(random.integers(2, 9))
    coarse = random.random((grain, grain)).astype(np.float32)
    soft = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float64).clip(0, 1)
    first, second = random.uniform(0.15, 0.85, 3), random.uniform(-0.25, 0.25, 3)
    return (first + soft[:, :, None] * second).clip(0, 1)


def _scaled(ink: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    image = Image.fromarray(ink.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64).clip(0, 1)


def _covers(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Tell whether the first box hides more than a third of the second."""
    width, height = (min(box[2 + axis], other[2 + axis]) - max(box[axis], other[axis]) for axis in (0, 1))
    area = (other[2] - other[0]) * (other[3] - other[1])
    return width > 0 and height > 0 and bool(width * height > area / 3)
