"""Crop, resize and mirror a whole batch on its device, each image by its own box.

A bilinear resize with antialias is linear in the image's rows and in its columns, so a view is `rows @ image @ columns`: one batched
product does what torchvision's RandomCrop, RandomResizedCrop and RandomHorizontalFlip do image by image, at a fraction of the overhead.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.data.augment import ASPECT_RATIOS, Augmentation

ATTEMPTS = 10  # boxes drawn for random_resized before the whole image is taken, as torchvision does


@dataclass(frozen=True)
class Boxes:
    """One box (n,) for each image, in pixels; parts outside the image are black."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    mirrored: Tensor

    def __getitem__(self, indices: Tensor) -> "Boxes":
        return Boxes(*(part[indices] for part in self._parts))

    def to(self, device: torch.device) -> "Boxes":
        """Return the boxes on the device."""
        return Boxes(*(part.to(device) for part in self._parts))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.top, self.left, self.height, self.width, self.mirrored


def draw_boxes(augmentation: Augmentation, n: int, *, side: int, image_size: int, generator: torch.Generator) -> Boxes:
    """Draw a box for each of n square images of so many pixels a side."""
    mirrored = torch.rand(n, generator=generator) < (0.5 if augmentation.flip else 0.0)
    if augmentation.crop == "random_resized":
        height, width = _random_sizes(augmentation.min_area, n, side, generator)
        top, left = ((torch.rand(n, generator=generator) * (side - length + 1)).floor() for length in (height, width))
        return Boxes(top, left, height, width, mirrored)
    full = torch.full((n,), float(image_size))
    border = augmentation.border(image_size) if augmentation.crop == "pad" else 0
    top, left = (torch.randint(-border, border + 1, (n,), generator=generator).float() for _ in range(2))
    return Boxes(top, left, full, full, mirrored)


def _random_sizes(min_area: float, n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw heights and widths by area and aspect ratio (torchvision's RandomResizedCrop); the first of ten that fits, or all of the image."""
    area = side * side * (min_area + (1 - min_area) * torch.rand((n, ATTEMPTS), generator=generator))
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    ratio = torch.exp(low + (high - low) * torch.rand((n, ATTEMPTS), generator=generator))
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()  # (n, attempts)
    fits = (height >= 1) & (width >= 1) & (height <= side) & (width <= side)
    first, any_fits = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
    return (
        torch.where(any_fits, height.gather(1, first)[:, 0], float(side)),
        torch.where(any_fits, width.gather(1, first)[:, 0], float(side)),
    )


def apply_boxes(pixels: Tensor, boxes: Boxes, image_size: int) -> Tensor:
    """Return each image's box resized: uint8 (n, 3, side, side) to float32 (n, 3, image_size, image_size), values 0..255."""
    side = pixels.shape[-1]
    rows = _resampling(boxes.top, boxes.height, side, image_size)  # (n, image_size, side)
    columns = _resampling(boxes.left, boxes.width, side, image_size)
    columns = torch.where(boxes.mirrored[:, None, None], columns.flip(1), columns)
    with torch.autocast(pixels.device.type, enabled=False):  # which would keep no more than 8 bits of a pixel
        return rows[:, None] @ pixels.float() @ columns[:, None].mT


def _resampling(start: Tensor, length: Tensor, side: int, image_size: int) -> Tensor:
    """Return the matrices (n, image_size, side) of a bilinear resize with antialias, as Pillow computes it.

    Output i lies at start + (i + 1/2) * scale; its weights are a triangle around that, as wide as the scale where that is above 1, over the
    box's own pixels, and sum to 1 (to 0 where the box lies outside the image).
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / image_size
    centre = start + (torch.arange(image_size, device=start.device)[:, None] + 0.5) * scale  # (n, image_size, 1)
    pixel = torch.arange(side, device=start.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)  # (n, image_size, side)
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True).clamp(min=1e-6)
