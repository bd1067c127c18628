"""Preprocess a decoded image for the network, in evaluation and wherever the bundle runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from export.images.decode import MAX_PIXELS, RGB, BrokenImage, Pixel, resize, values_of
from export.images.size import Shape, Size, written

if TYPE_CHECKING:
    from PIL import Image

UPRIGHT, AS_STORED = "EXIF", "as stored"  # values of `orientation` in preprocess.json
FLOORED, KEPT = "floor(value / 256)", "kept"  # and of 16 bits
IGNORED = 255  # in a mask, once read: a pixel that is used neither for training nor for scoring
BINARY = [0, IGNORED]  # value of `mask_values`: what two classes are in mask files, where it is not 0 and 1
COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}
BGR = "BGR"
Letterbox = Literal["none", "centre", "corner"]
Kernel = Literal["bilinear", "bicubic"]
LETTERBOXES: tuple[Letterbox, ...] = get_args(Letterbox)
# Values of `interpolation` in preprocess.json: the kernel, and whether it is widened where images shrink.
INTERPOLATIONS: dict[str, tuple[Kernel, bool]] = {
    "bilinear (antialias)": ("bilinear", True),
    "bilinear": ("bilinear", False),
    "bicubic (antialias)": ("bicubic", True),
    "bicubic": ("bicubic", False),
}


@dataclass(frozen=True)
class Look:
    """What differs from torchvision's way to show a network an image.

    With a `letterbox` the image keeps its proportions and the rest is `pad_value` (0 to 255): on both sides of the `centre`, sides
    rounded, as YOLO does, or right of and below the `corner`, sides rounded down, as YOLOX does. Without `antialias` a kernel is as
    wide as pixels of the image however much it shrinks, as OpenCV's (its bicubic has a = -0.75).
    """

    letterbox: Letterbox = "none"
    pad_value: int = 114
    interpolation: Kernel = "bilinear"
    antialias: bool = True
    bgr: bool = False


@dataclass(frozen=True)
class Preprocess:
    """Resize an image until it covers `resize_to` and crop the centre, `stretch` it, or as `look` says; scale to [0, 1]; normalize.

    `mean` has a number for each channel, in the network's order; channels have so many `bits`. `upright` applies the EXIF orientation;
    networks trained by older versions have seen images as stored. `ignore_index` is the value of ignored pixels in mask files, 255 if None; with
    `binary_masks` 255 is the second of two classes, and no pixel is ignored.
    """

    image_size: Size
    resize_to: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    upright: bool = True
    ignore_index: int | None = None
    stretch: bool = False
    bits: int = 8
    binary_masks: bool = False
    look: Look = Look()

    @property
    def pixel(self) -> Pixel:
        """What a pixel is."""
        return Pixel(len(self.mean), self.bits)

    @property
    def shape(self) -> Shape:
        """One image as the network takes it."""
        return (len(self.mean), *self.image_size)

    def pixels(self, image: "Image.Image") -> NDArray[Any]:
        """Return an image as the network sees it, (height, width, channels) in the file's order of colours, before `normalize`.

        Raises BrokenImage for an image so narrow that covering the size would make it huge.
        """
        from PIL import Image

        look, (size, start) = self.look, self.frame((image.height, image.width))
        if size == (image.height, image.width):
            values = values_of(image)
        elif look.antialias:
            values = values_of(resize(image, size[::-1], Image.Resampling[look.interpolation.upper()]))
        else:
            values = sampled(values_of(image), size, look.interpolation)
        return self._framed(values, start, look.pad_value * self.pixel.largest // 255)

    def mask(self, image: "Image.Image") -> NDArray[np.uint8]:
        """Return the same pixels of a mask, (height, width), resized to the nearest pixel's class; letterboxes are ignored."""
        from PIL import Image

        size, start = self.frame((image.height, image.width))
        if size != (image.height, image.width):
            image = resize(image, size[::-1], Image.Resampling.NEAREST)
        return np.asarray(self._framed(np.asarray(image), start, IGNORED))

    def frame(self, image: Size) -> tuple[Size, Size]:
        """Return the size that an image's size becomes, and where its first row and column then lie in the network's input.

        Raises BrokenImage for an image so narrow that covering the size would make it huge.
        """
        (rows, columns), (height, width), covers = self.image_size, image, self.resize_to
        if self.look.letterbox != "none":
            factor = min(rows / height, columns / width)
            fit = int if self.look.letterbox == "corner" else round
            height, width = (
                min(max(fit(side * factor), 1), most) for side, most in zip(image, self.image_size, strict=True)
            )
            centred = self.look.letterbox == "centre"
            return (height, width), ((rows - height) // 2 * centred, (columns - width) // 2 * centred)
        if self.stretch:
            return (rows, columns), (0, 0)
        if covers[0] * width >= covers[1] * height:
            height, width = covers[0], covers[0] * width // height
        else:
            height, width = covers[1] * height // width, covers[1]
        if height * width > MAX_PIXELS:
            raise BrokenImage(f"{image[1]:,} x {image[0]:,} is too narrow")
        return (height, width), (-((height - rows) // 2), -((width - columns) // 2))

    def _framed(self, values: NDArray[Any], start: Size, pad: int) -> NDArray[Any]:
        """Return the network's input (rows, columns, ...), which resized values (height, width, ...) cover or are a part of."""
        (rows, columns), (top, left) = self.image_size, start
        if self.look.letterbox == "none":
            return values[-top : rows - top, -left : columns - left]
        framed = np.full((rows, columns, *values.shape[2:]), pad, values.dtype)
        framed[top : top + len(values), left : left + values.shape[1]] = values
        return framed

    def boxes(self, boxes: NDArray[Any], image: Size, *, back: bool = False) -> NDArray[Any]:
        """Return boxes (..., 4) that are fractions of an image of this size as fractions of the network's input, or `back`."""
        (height, width), (top, left) = self.frame(image)
        (rows, columns) = self.image_size
        factor, shift = np.array([width, height] * 2, np.float64), np.array([left, top] * 2, np.float64)
        side = np.array([columns, rows] * 2, np.float64)
        found = (boxes * side - shift) / factor if back else (boxes * factor + shift) / side
        return np.asarray(found, boxes.dtype)

    def whole_mask(self, mask: NDArray[np.uint8], image: Size) -> NDArray[np.uint8]:
        """Return a mask of the network's input, at any resolution, for an image of this size; what the network does not see is IGNORED."""
        lines = []
        for axis, (resized, start) in enumerate(zip(*self.frame(image), strict=True)):
            seen = ((np.arange(image[axis]) + 0.5) * resized / image[axis] + start) / self.image_size[axis]
            lines.append(np.floor(seen * mask.shape[axis]).astype(np.int64))
        hidden = np.logical_or.outer(
            *((line < 0) | (line >= side) for line, side in zip(lines, mask.shape, strict=True))
        )
        rows, columns = (line.clip(0, side - 1) for line, side in zip(lines, mask.shape, strict=True))
        return np.where(hidden, np.uint8(IGNORED), mask[np.ix_(rows, columns)])

    def normalize(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return uint8 or uint16 (batch, height, width, channels) as normalized float32 (batch, channels, height, width)."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        pixels = pixels[..., ::-1] if self.look.bgr else pixels
        scaled = (pixels.astype(np.float32) / np.float32(self.pixel.largest) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def to_json(self) -> dict[str, object]:
        """Return all that another program needs to compute the same inputs."""
        look = self.look
        return {
            "image_size": written(self.image_size),
            "resize_to": written(self.resize_to),
            "mean": self.mean,
            "std": self.std,
            "orientation": UPRIGHT if self.upright else AS_STORED,
            "sixteen_bits": FLOORED if self.pixel == RGB else KEPT if self.bits == 16 else "refused",
            "resize_longer": self._longer(),
            "interpolation": next(
                name for name, one in INTERPOLATIONS.items() if one == (look.interpolation, look.antialias)
            ),
            "crop": "none" if self.whole else "center",
            "crop_offset": "0" if self.whole else "floor((length - image_size) / 2)",
            "color": BGR if look.bgr else COLOURS[len(self.mean)],
            "scale": 1 / self.pixel.largest,
            "layout": "NCHW",
            "dtype": "float32",
            **({} if self.ignore_index is None else {"ignore_index": self.ignore_index}),
            **({"mask_values": BINARY} if self.binary_masks else {}),
            **({} if look.letterbox == "none" else {"letterbox": look.letterbox, "pad_value": look.pad_value}),
        }

    @property
    def whole(self) -> bool:
        """Whether the network sees the whole image."""
        return self.stretch or self.look.letterbox != "none"

    def _longer(self) -> str:
        """Say how long the side gets that `resize_to` leaves open."""
        if self.look.letterbox != "none":
            fit = "floor" if self.look.letterbox == "corner" else "round"
            return f"{fit}(its length * min(image_size / length)), the same factor for both sides"
        if self.stretch:
            return "image_size"
        if self.resize_to[0] == self.resize_to[1]:
            return "floor(resize_to * longer / shorter)"
        return "floor(its length * resize_to / length of the other side), which is the one that has the larger resize_to / length"


def sampled(values: NDArray[Any], size: Size, kernel: Kernel) -> NDArray[Any]:
    """Return values (height, width, channels) at another size by a kernel of 2 or 4 pixels; those beyond the edge repeat it.

    Output i lies at (i + 1/2) * scale - 1/2, as in OpenCV's INTER_LINEAR and INTER_CUBIC (Keys 1981, a = -0.75).
    """
    found: NDArray[np.float32] = values.astype(np.float32)
    for axis, length in enumerate(size):
        side = values.shape[axis]
        at = (np.arange(length) + 0.5) * (side / length) - 0.5
        taps = np.floor(at)[:, None] + (np.arange(2) if kernel == "bilinear" else np.arange(-1, 3))
        t = np.abs(at[:, None] - taps)  # (length, taps)
        near, far = ((1.25 * t - 2.25) * t * t + 1, ((-0.75 * t + 3.75) * t - 6) * t + 3)
        weights = (1 - t if kernel == "bilinear" else np.where(t <= 1, near, far)).astype(np.float32)
        index, shape = np.clip(taps, 0, side - 1).astype(np.int64), (-1, 1, 1) if axis == 0 else (1, -1, 1)
        parts = [found.take(index[:, tap], axis) * weights[:, tap].reshape(shape) for tap in range(taps.shape[1])]
        found = np.sum(parts, axis=0)
    limits = np.iinfo(values.dtype)
    return np.rint(found).clip(limits.min, limits.max).astype(values.dtype)
