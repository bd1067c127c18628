"""Draw predictions on images: labelled boxes, and masks as colours. Needs Pillow."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.images.preprocess import IGNORED

Pixels = NDArray[np.uint8]
# One for each class, repeated; the first is the background in most segmentation data.
COLOURS = np.array(
    [
        *((90, 98, 106), (10, 125, 94), (47, 111, 183), (217, 138, 0), (162, 63, 160), (194, 65, 12), (53, 163, 201), (122, 139, 18)),
        *((91, 82, 196), (240, 98, 146), (255, 213, 79), (0, 77, 64), (255, 255, 255), (121, 85, 72), (100, 221, 23), (183, 28, 28)),
        *((0, 229, 255), (26, 35, 126), (255, 171, 145), (0, 0, 0), (206, 147, 216)),
    ],
    np.uint8,
)  # fmt: skip
OPAQUE = 0.55  # opacity of a mask's colours


def colours(classes: NDArray[np.integer]) -> Pixels:
    """Return each class's colour, (..., 3)."""
    return np.asarray(COLOURS[classes % len(COLOURS)])


def as_rgb(pixels: NDArray[Any]) -> Pixels:
    """Return what a network saw, uint8 or uint16 (height, width, channels), as colours: grey is repeated, a fourth channel left out.

    16 bits are scaled by the image's own largest value, since depths and temperatures rarely use all of them.
    """
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels * (255 / max(int(pixels.max()), 1))).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]


def with_mask(pixels: Pixels, mask: NDArray[np.uint8]) -> Pixels:
    """Return an image (height, width, 3) under the colours of a mask of any size; IGNORED pixels are not painted."""
    from PIL import Image

    height, width = pixels.shape[:2]
    classes = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    painted = (1 - OPAQUE) * pixels + OPAQUE * colours(classes)
    return np.where((classes == IGNORED)[..., None], pixels, np.rint(painted).astype(np.uint8))


def with_boxes(pixels: Pixels, boxes: NDArray[np.floating], classes: Sequence[int], words: Sequence[str]) -> Pixels:
    """Return an image (height, width, 3) with `boxes` (n, 4) in their classes' colours; left, top, right, bottom as fractions."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    pen, line = ImageDraw.Draw(image), max(round(image.width / 160), 1)
    for box, label, text in zip(boxes * np.tile(image.size, 2), classes, words, strict=True):
        colour = tuple(colours(np.array(label + 1)).tolist())  # boxes have no background
        left, top, right, bottom = box.tolist()
        pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=line)
        place = (left + line, max(top - 11, 0))
        pen.rectangle(pen.textbbox(place, text), fill=colour)
        pen.text(place, text, fill="white")
    return np.asarray(image)
