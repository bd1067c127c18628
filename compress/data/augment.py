"""Random changes of training images, as a recipe states them and as torchvision's transforms carry them out."""

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


def image_transform(augmentation: Augmentation, image_size: int) -> v2.Transform:
    """Return the transform of one image to uint8 (3, image_size, image_size); all but random_resized expect it at that size already."""
    steps: list[v2.Transform] = []
    if augmentation.crop == "random_resized":
        steps.append(
            v2.RandomResizedCrop(image_size, scale=(augmentation.min_area, 1.0), ratio=ASPECT_RATIOS, antialias=True)
        )
    if augmentation.crop == "pad":
        steps.append(v2.RandomCrop(image_size, padding=augmentation.border(image_size)))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.randaugment:
        steps.append(v2.RandAugment(magnitude=augmentation.randaugment))
    return v2.Compose([*steps, v2.PILToTensor()])
