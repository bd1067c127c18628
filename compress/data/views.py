"""Crop, resize and mirror training images as torchvision's RandomCrop, RandomResizedCrop and RandomHorizontalFlip do.

A view's random numbers are drawn for all images at once; an image's box is a function of them and of its size. So images
in memory and images in files have the same views.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from compress.data.augment import ASPECT_RATIOS, Augmentation
from export.images.preprocess import IGNORED
from export.images.size import Size

ATTEMPTS = 10  # boxes that random_resized draws before it takes the image's middle, as in torchvision


@dataclass(frozen=True)
class Boxes:
    """One box (n,) for each image, in whole pixels; parts outside the image are black."""

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

    def scaled(self, factors: Tensor) -> "Boxes":
        """Return the boxes in images resized by the factors (n, 2) of height and width, in whole pixels, at least one."""
        down, across = factors.unbind(1)
        bottom = ((self.top + self.height) * down).round().clamp(min=1)
        right = ((self.left + self.width) * across).round().clamp(min=1)
        top = torch.minimum((self.top * down).round(), bottom - 1)
        left = torch.minimum((self.left * across).round(), right - 1)
        return Boxes(top, left, bottom - top, right - left, self.mirrored)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.top, self.left, self.height, self.width, self.mirrored


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of n images: whether each is mirrored, and numbers from 0 to 1 for its box.

    `aspect` is the width over the height of what the network sees, which random boxes vary.
    """

    augmentation: Augmentation
    aspect: float
    mirrored: Tensor  # bool (n,)
    place: Tensor  # (n, 2)
    area: Tensor  # (n, ATTEMPTS), of random_resized only
    ratio: Tensor  # the same

    def boxes(self, chosen: Tensor, sizes: Tensor) -> Boxes:
        """Return the boxes of the chosen images (m,), of the heights and widths `sizes` (m, 2)."""
        heights, widths = sizes.float().unbind(1)
        place, mirrored = self.place[chosen], self.mirrored[chosen]
        if self.augmentation.crop == "random_resized":
            height, width, placed = self._random_sizes(chosen, heights, widths)
            top, left = (place * torch.stack([heights - height + 1, widths - width + 1], dim=1)).floor().unbind(1)
            top = torch.where(placed, top, ((heights - height) / 2).floor())
            left = torch.where(placed, left, ((widths - width) / 2).floor())
            return Boxes(top, left, height, width, mirrored)
        border = torch.zeros(2)
        if self.augmentation.crop == "pad":
            border = torch.tensor([float(self.augmentation.border(side)) for side in sizes[0].tolist()])
        top, left = ((place * (2 * border + 1)).floor() - border).unbind(1)
        return Boxes(top, left, heights, widths, mirrored)

    def _random_sizes(self, chosen: Tensor, heights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the size of each image's first box that fits, as RandomResizedCrop around `aspect`, and whether one does.

        Where none fits, they are those of the largest central box with an allowed aspect ratio.
        """
        least, (narrow, wide) = self.augmentation.min_area, [ratio * self.aspect for ratio in ASPECT_RATIOS]
        area = (heights * widths)[:, None] * (least + (1 - least) * self.area[chosen])  # (m, attempts)
        ratio = torch.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * self.ratio[chosen])
        height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (height >= 1) & (width >= 1) & (height <= heights[:, None]) & (width <= widths[:, None])
        first, any_fits = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
        return (
            torch.where(any_fits, height.gather(1, first)[:, 0], torch.minimum(heights, (widths / narrow).round())),
            torch.where(any_fits, width.gather(1, first)[:, 0], torch.minimum(widths, (heights * wide).round())),
            any_fits,
        )


def draw(augmentation: Augmentation, n: int, *, size: Size, seed: int) -> Draws:
    """Draw the random numbers of one view of n images."""
    generator = torch.Generator().manual_seed(seed)
    attempts = ATTEMPTS if augmentation.crop == "random_resized" else 0
    return Draws(
        augmentation,
        size[1] / size[0],
        torch.rand(n, generator=generator) < (0.5 if augmentation.flip else 0.0),
        *(torch.rand(n, columns, generator=generator) for columns in (2, attempts, attempts)),
    )


def cut(pixels: Tensor, boxes: Boxes, size: Size) -> Tensor:
    """Resize each image's box to `size`, as torchvision does: (n, channels, height, width) each; values keep their range."""
    return (cut_each if pixels.device.type == "cpu" else cut_all)(pixels, boxes, size)


def cut_each(pixels: Tensor, boxes: Boxes, size: Size) -> Tensor:
    """Cut image by image, in uint8 where it is their type: on a CPU 4 to 15 times faster than `cut_all`."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.float()  # torch resizes no uint16
    edges = torch.stack([boxes.top, boxes.left, boxes.top + boxes.height, boxes.left + boxes.width]).int()  # (4, n)
    beyond = max(-int(edges.min()), int(edges[2].max()) - pixels.shape[2], int(edges[3].max()) - pixels.shape[3], 0)
    padded = pad(pixels, [beyond] * 4)
    views = torch.empty(*pixels.shape[:2], *size, dtype=pixels.dtype)
    for index, (top, left, bottom, right) in enumerate((edges + beyond).T.tolist()):
        view = padded[index : index + 1, :, top:bottom, left:right]
        if view.shape[2:] != size:
            view = interpolate(view, size, mode="bilinear", antialias=True)
        views[index] = view[0].flip(-1) if boxes.mirrored[index] else view[0]
    return views


def cut_all(pixels: Tensor, boxes: Boxes, size: Size) -> Tensor:
    """Cut all images at once, in float32: a bilinear resize is the product `rows @ image @ columns`."""
    height, width = pixels.shape[-2:]
    rows = _resampling(boxes.top, boxes.height, height, size[0])  # (n, size, height)
    columns = _resampling(boxes.left, boxes.width, width, size[1])
    columns = torch.where(boxes.mirrored[:, None, None], columns.flip(1), columns)
    with torch.autocast(pixels.device.type, enabled=False):  # bf16 would round pixels to 8 bits of precision
        return rows[:, None] @ pixels.float() @ columns[:, None].mT


def _resampling(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Return the matrices (n, size, side) of a bilinear resize with antialias, as Pillow computes it.

    Output i lies at start + (i + 1/2) * scale. Its weights are a triangle around that point, of half width max(scale, 1),
    over the box's own pixels; they sum to 1 (to 0 where the box lies outside the image).
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (n, size, 1)
    pixel = torch.arange(side, device=start.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)  # (n, size, side)
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(dim=2, keepdim=True).clamp(min=1e-6)


def cut_nearest(masks: Tensor, boxes: Boxes, size: Size) -> Tensor:
    """Return each mask's box, resized by the nearest pixel: uint8 (n, height, width), then (n, *size).

    Output i lies at start + (i + 1/2) * scale, as in `cut`; outside the mask it is IGNORED.
    """
    n, height, width = masks.shape
    rows, rows_inside = _nearest(boxes.top, boxes.height, height, size[0])  # (n, size) each
    columns, columns_inside = _nearest(boxes.left, boxes.width, width, size[1])
    columns, columns_inside = (
        torch.where(boxes.mirrored[:, None], part.flip(1), part) for part in (columns, columns_inside)
    )
    image = torch.arange(n, device=masks.device)[:, None, None]
    found = masks[image, rows[:, :, None], columns[:, None, :]]
    return found.masked_fill(~(rows_inside[:, :, None] & columns_inside[:, None, :]), IGNORED)


def _nearest(start: Tensor, length: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    """Return each output's pixel (n, size), and whether it is inside the image."""
    steps = torch.arange(size, device=start.device) + 0.5
    pixel = (start[:, None] + steps * (length[:, None] / size)).floor().long()
    return pixel.clamp(0, side - 1), (pixel >= 0) & (pixel < side)
