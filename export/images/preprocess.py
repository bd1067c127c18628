"""Preprocess a decoded image for the network, in evaluation and wherever the bundle runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Preprocess:
    """Resize an image until it covers `resize_to` and crop the centre, or `stretch` it; scale to [0, 1]; normalize each channel.

    `mean` has a number for each channel, which has so many `bits`. `upright` applies the EXIF orientation; networks trained by
    older versions have seen images as stored. `ignore_index` is the value of ignored pixels in mask files, 255 if None; with
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

    @property
    def pixel(self) -> Pixel:
        """What a pixel is."""
        return Pixel(len(self.mean), self.bits)

    @property
    def shape(self) -> Shape:
        """One image as the network takes it."""
        return (len(self.mean), *self.image_size)

    def pixels(self, image: "Image.Image") -> NDArray[Any]:
        """Return the centre of the resized image, (height, width, channels); the longer side and the crop's place are rounded down.

        Raises BrokenImage for an image so narrow that covering the size would make it huge.
        """
        from PIL import Image

        return values_of(self._centre(image, Image.Resampling.BILINEAR))

    def mask(self, image: "Image.Image") -> NDArray[np.uint8]:
        """Return the same pixels of a mask, (height, width), resized to the nearest pixel's class."""
        from PIL import Image

        return np.asarray(self._centre(image, Image.Resampling.NEAREST))

    def _centre(self, image: "Image.Image", resampling: "Image.Resampling") -> "Image.Image":
        rows, columns = self.image_size
        if self.stretch:
            return image if image.size == (columns, rows) else resize(image, (columns, rows), resampling)
        (height, width), covers = (image.height, image.width), self.resize_to
        if covers[0] * width >= covers[1] * height:
            height, width = covers[0], covers[0] * width // height
        else:
            height, width = covers[1] * height // width, covers[1]
        if height * width > MAX_PIXELS:
            raise BrokenImage(f"{image.width:,} x {image.height:,} is too narrow")
        if (width, height) != image.size:
            image = resize(image, (width, height), resampling)
        left, top = (width - columns) // 2, (height - rows) // 2
        return image.crop((left, top, left + columns, top + rows))

    def normalize(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return uint8 or uint16 (batch, height, width, channels) as normalized float32 (batch, channels, height, width)."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(self.pixel.largest) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def to_json(self) -> dict[str, object]:
        """Return all that another program needs to compute the same inputs."""
        return {
            "image_size": written(self.image_size),
            "resize_to": written(self.resize_to),
            "mean": self.mean,
            "std": self.std,
            "orientation": UPRIGHT if self.upright else AS_STORED,
            "sixteen_bits": FLOORED if self.pixel == RGB else KEPT if self.bits == 16 else "refused",
            "resize_longer": self._longer(),
            "interpolation": "bilinear (antialias)",
            "crop": "none" if self.stretch else "center",
            "crop_offset": "0" if self.stretch else "floor((length - image_size) / 2)",
            "color": COLOURS[len(self.mean)],
            "scale": 1 / self.pixel.largest,
            "layout": "NCHW",
            "dtype": "float32",
            **({} if self.ignore_index is None else {"ignore_index": self.ignore_index}),
            **({"mask_values": BINARY} if self.binary_masks else {}),
        }

    def _longer(self) -> str:
        """Say how long the side gets that `resize_to` leaves open."""
        if self.stretch:
            return "image_size"
        if self.resize_to[0] == self.resize_to[1]:
            return "floor(resize_to * longer / shorter)"
        return "floor(its length * resize_to / length of the other side), which is the one that has the larger resize_to / length"
