"""Random changes of training images, as a recipe sets them."""

import math
from dataclasses import dataclass
from typing import Literal

from torchvision.transforms import v2

from export.images.size import Size, area

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of random_resized; torchvision's default
DISTORT = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}  # SSD's ranges (Liu 2016, section 2.2)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; `pad` and `min_area` are fractions of side and area, the mixes alphas."""

    crop: Literal["none", "pad", "random_resized"]
    pad: float
    min_area: float
    flip: bool
    randaugment: int
    mixup: float
    cutmix: float
    distort: bool = False

    @property
    def changes_colours(self) -> bool:
        """Tell whether pixel values change, image by image, after the crop."""
        return self.distort or self.randaugment > 0

    def border(self, side: int) -> int:
        """Return the width in pixels of the border that `crop: pad` adds on both ends of a side of so many pixels."""
        return max(round(side * self.pad), 1)

    def whole_area(self, size: Size) -> int:
        """Return the pixels that a whole image must keep for random crops, 0 for other crops.

        The shorter side of the smallest crop then still has the size's pixels.
        """
        return math.ceil(area(size) / (self.min_area * ASPECT_RATIOS[0])) if self.crop == "random_resized" else 0


def colours(augmentation: Augmentation) -> v2.Transform:
    """Return the transform of pixel values of a cropped image, uint8 (3, height, width)."""
    changes: list[v2.Transform] = [v2.ColorJitter(**DISTORT)] if augmentation.distort else []
    changes += [v2.RandAugment(magnitude=augmentation.randaugment)] if augmentation.randaugment else []
    # torchvision's operations are twice as fast on Pillow's images.
    return v2.Compose([v2.ToPILImage(), *changes, v2.PILToTensor()]) if changes else v2.Identity()
