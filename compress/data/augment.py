"""Random changes of training images, as a recipe states them."""

import math
from dataclasses import dataclass
from typing import Literal

from torchvision.transforms import v2

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random_resized; torchvision's default


@dataclass(frozen=True)
class Augmentation:
    """How training images change at random; `pad` and `min_area` are fractions of the image's side and area, mixup and cutmix alphas."""

    crop: Literal["none", "pad", "random_resized"]
    pad: float
    min_area: float
    flip: bool
    randaugment: int
    mixup: float
    cutmix: float

    def border(self, image_size: int) -> int:
        """Return the width in pixels of the border that `crop: pad` adds on each side."""
        return max(round(image_size * self.pad), 1)

    def whole_side(self, image_size: int) -> int:
        """Return the pixels a side that an image must be kept with for its random crops: 0 where they need less than evaluation keeps.

        The smallest crop of a square image then still has `image_size` pixels on its shorter side.
        """
        if self.crop != "random_resized":
            return 0
        return math.ceil(image_size / math.sqrt(self.min_area * ASPECT_RATIOS[0]))


def colours(augmentation: Augmentation) -> v2.Transform:
    """Return what changes an image that is cropped already, a PIL image or a tensor; it becomes uint8 (3, height, width)."""
    steps = [v2.RandAugment(magnitude=augmentation.randaugment)] if augmentation.randaugment else []
    return v2.Compose([*steps, v2.PILToTensor()])
