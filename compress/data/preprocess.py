"""What happens to an image between the decoder and the network when nothing is random; it travels with the model to the bundle."""

from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from compress.data.decode import MAX_PIXELS, BrokenImage


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalize.

    `mean` and `std` are per channel (red, green, blue), for pixels in [0, 1].
    """

    image_size: int
    resize: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def resize_to(self) -> int:
        """The shorter side in pixels before the crop."""
        return round(self.image_size * self.resize)

    def to_json(self) -> dict[str, object]:
        """Return every fact that another program needs to feed the network the same numbers."""
        return asdict(self) | {
            "resize_to": self.resize_to,
            "resize_longer": "floor(resize_to * longer / shorter)",
            "interpolation": "bilinear (antialias)",
            "crop": "center",
            "crop_offset": "floor((length - image_size) / 2)",
            "color": "RGB",
            "scale": 1 / 255,
            "layout": "NCHW",
            "dtype": "float32",
        }


def square_pixels(image: Image.Image, *, resize_to: int, side: int, centre: int) -> np.ndarray:
    """Return the middle of a resized RGB image as uint8 (side, side, 3).

    The longer side becomes floor(resize_to * longer / shorter). A later centre crop from `side` to `centre` pixels gives exactly the
    centre crop of the resized image, which starts at floor((length - centre) / 2).
    Raises `BrokenImage` for an image so narrow that resizing its shorter side makes it huge.
    """
    width, height = image.size
    shorter = min(width, height)
    if shorter != resize_to:
        width, height = resize_to * width // shorter, resize_to * height // shorter
        if width * height > MAX_PIXELS:
            raise BrokenImage(f"{image.width:,} x {image.height:,} is too narrow")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    inner = (side - centre) // 2
    left, top = (width - centre) // 2 - inner, (height - centre) // 2 - inner
    return np.asarray(image)[top : top + side, left : left + side]


def eval_pixels(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Return the pixels that evaluation sees, uint8 (image_size, image_size, 3)."""
    size = preprocess.image_size
    return square_pixels(image, resize_to=preprocess.resize_to, side=size, centre=size)
