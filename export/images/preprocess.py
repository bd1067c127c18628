"""Preprocess a decoded image for the network, in evaluation and wherever the bundle runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.images.decode import MAX_PIXELS, BrokenImage

if TYPE_CHECKING:
    from PIL import Image

UPRIGHT, AS_STORED = "EXIF", "as stored"  # values of `orientation` in preprocess.json
IGNORED = 255  # in a mask, once read: a pixel that is used neither for training nor for scoring


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side and crop the centre, or `stretch` to a square; scale to [0, 1]; normalize each RGB channel.

    `upright` applies the EXIF orientation; networks trained by older versions have seen images as stored. `ignore_index` is the
    value of ignored pixels in mask files, 255 if None.
    """

    image_size: int
    resize_to: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    upright: bool = True
    ignore_index: int | None = None
    stretch: bool = False

    def pixels(self, image: "Image.Image") -> NDArray[np.uint8]:
        """Return the centre of the resized RGB image, (size, size, 3); the longer side and the crop's place are rounded down.

        Raises BrokenImage for an image so narrow that resizing its shorter side would make it huge.
        """
        from PIL import Image

        return self._centre(image, Image.Resampling.BILINEAR)

    def mask(self, image: "Image.Image") -> NDArray[np.uint8]:
        """Return the same pixels of a mask, (size, size), resized to the nearest pixel's class."""
        from PIL import Image

        return self._centre(image, Image.Resampling.NEAREST)

    def _centre(self, image: "Image.Image", resampling: "Image.Resampling") -> NDArray[np.uint8]:
        if self.stretch:
            square = (self.image_size, self.image_size)
            return np.asarray(image if image.size == square else image.resize(square, resampling))
        width, height = image.size
        shorter = min(width, height)
        if shorter != self.resize_to:
            width, height = self.resize_to * width // shorter, self.resize_to * height // shorter
            if width * height > MAX_PIXELS:
                raise BrokenImage(f"{image.width:,} x {image.height:,} is too narrow")
            image = image.resize((width, height), resampling)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        return np.asarray(image)[top : top + self.image_size, left : left + self.image_size]

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return uint8 (batch, size, size, 3) as normalized float32 (batch, 3, size, size)."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def to_json(self) -> dict[str, object]:
        """Return all that another program needs to compute the same inputs."""
        return {
            "image_size": self.image_size,
            "resize_to": self.resize_to,
            "mean": self.mean,
            "std": self.std,
            "orientation": UPRIGHT if self.upright else AS_STORED,
            "sixteen_bits": "floor(value / 256)",
            "resize_longer": "image_size" if self.stretch else "floor(resize_to * longer / shorter)",
            "interpolation": "bilinear (antialias)",
            "crop": "none" if self.stretch else "center",
            "crop_offset": "0" if self.stretch else "floor((length - image_size) / 2)",
            "color": "RGB",
            "scale": 1 / 255,
            "layout": "NCHW",
            "dtype": "float32",
            **({} if self.ignore_index is None else {"ignore_index": self.ignore_index}),
        }
