"""Draw predictions on images: labelled boxes, masks as colours, and their legend. Needs Pillow."""

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
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(pixels)
    pen, line = ImageDraw.Draw(image), max(round(image.width / 160), 1)
    size = max(11, image.width // 50)
    font = ImageFont.load_default(size)
    for box, label, text in zip(boxes * np.tile(image.size, 2), classes, words, strict=True):
        colour = tuple(colours(np.array(label + 1)).tolist())  # boxes have no background
        left, top, right, bottom = box.tolist()
        pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=line)
        place = (left + line, max(top - size, 0))
        pen.rectangle(pen.textbbox(place, text, font), fill=colour)
        pen.text(place, text, "white", font)
    return np.asarray(image)


def with_legend(pixels: Pixels, classes: Sequence[int], labels: Sequence[str]) -> Pixels:
    """Return an image (height, width, 3) above rows with its classes' colours and names, in their order."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    size = max(11, width // 50)
    font, line = ImageFont.load_default(size), size + size // 2
    places, left, top = [], size // 2, height + size // 4
    for label in classes:
        wide = line + round(font.getlength(labels[label])) + size
        if left + wide > width and left > size // 2:
            left, top = size // 2, top + line
        places.append((label, left, top))
        left += wide
    image = Image.new("RGB", (width, top + line), "white")
    image.paste(Image.fromarray(pixels), (0, 0))
    pen = ImageDraw.Draw(image)
    for label, left, top in places:
        pen.rectangle((left, top, left + size, top + size), tuple(colours(np.array(label)).tolist()), "black")
        pen.text((left + line, top + size // 2), labels[label], "black", font, anchor="lm")
    return np.asarray(image)
