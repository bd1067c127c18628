"""Truths that lie at places of an image, and so move with its view: masks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.stored import Stored
from compress.data.views import Boxes, cut_nearest
from export.images.masks import Pair, read_mask
from export.images.preprocess import Preprocess


class Fill(Protocol):
    """Takes each image's truth into memory while the images are decoded."""

    def put_(self, index: int, size: tuple[int, int], kept: tuple[int, int]) -> None:
        """Read the truth of an image of this width and height, which is stored with the height and width `kept`; raises BrokenImage."""

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "Placed":
        """Return the truths of the images that were not broken, as those are stored."""


class Placed(Protocol):
    """The truths of a set of images, by their indices."""

    def begin(self, area: int) -> Fill:
        """Return what takes the truths into memory, beside images that are kept whole where `area` is not 0."""

    def still(self, chosen: Tensor) -> Tensor:
        """Return the truths (m, ...) of the chosen images as evaluation sees them."""

    def seen(self, chosen: Tensor, boxes: Boxes, size: int, *, whole: bool) -> Tensor:
        """Return them as the boxes show the images: boxes in what evaluation sees of an image, or in the whole one."""


@dataclass(frozen=True)
class MaskFiles:
    """Mask files that are read when asked for; `paths` are of the images and of the masks, bytes (n, 2)."""

    root: Path
    paths: np.ndarray
    classes: int
    preprocess: Preprocess

    def begin(self, area: int) -> "MaskFill":
        """Return what reads the masks into memory."""
        return MaskFill(self, len(self.paths), area)

    def name(self, index: int) -> str:
        """Return the mask file's path relative to the root."""
        return os.fsdecode(self.paths[index, 1])

    def read(self, index: int, size: tuple[int, int]) -> Image.Image:
        """Return one mask; raise BrokenImage where it is none of an image of this width and height."""
        return read_mask(self.root / self.name(index), size, classes=self.classes, ignore=self.preprocess.ignore_index)

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, size, size)."""
        return torch.stack([torch.from_numpy(self.preprocess.mask(self._whole(index))) for index in chosen.tolist()])

    def seen(self, chosen: Tensor, boxes: Boxes, size: int, *, whole: bool) -> Tensor:
        """Return what the boxes show of the masks, uint8 (m, size, size)."""
        masks = [self._whole(index) for index in chosen.tolist()]
        pixels = [np.asarray(mask) if whole else self.preprocess.mask(mask) for mask in masks]
        parts = [
            cut_nearest(torch.from_numpy(one.copy())[None], boxes[torch.tensor([place])], size)
            for place, one in enumerate(pixels)
        ]
        return torch.cat(parts)

    def _whole(self, index: int) -> Image.Image:
        with Image.open(self.root / os.fsdecode(self.paths[index, 0])) as image:  # which was decoded already: it is one
            size = image.size
        return self.read(index, size)


@dataclass(frozen=True)
class ArrayMasks:
    """Masks in memory at their own size, uint8 (n, height, width)."""

    arrays: np.ndarray
    preprocess: Preprocess

    def begin(self, area: int) -> "MaskFill":
        """Return what takes the masks in the sizes of the images."""
        return MaskFill(self, len(self.arrays), area)

    def read(self, index: int, _size: tuple[int, int]) -> Image.Image:
        """Return one mask."""
        return Image.fromarray(self.arrays[index])

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, size, size)."""
        masks = [self.preprocess.mask(Image.fromarray(self.arrays[index])) for index in chosen.tolist()]
        return torch.from_numpy(np.stack(masks))

    def seen(self, chosen: Tensor, boxes: Boxes, size: int, *, whole: bool) -> Tensor:
        """Return what the boxes show of the masks, uint8 (m, size, size)."""
        masks = torch.from_numpy(self.arrays[chosen.numpy()]) if whole else self.still(chosen)
        return cut_nearest(masks, boxes, size)


class MaskFill:
    """Masks on their way into memory, as evaluation sees them and, where `area` is not 0, whole."""

    def __init__(self, source: MaskFiles | ArrayMasks, n: int, area: int) -> None:
        side = source.preprocess.image_size
        self._source = source
        self._still, self._whole = np.empty((n, 1, side**2), np.uint8), np.zeros((n, 1, area), np.uint8)

    def put_(self, index: int, size: tuple[int, int], kept: tuple[int, int]) -> None:
        """Read one mask."""
        mask, (height, width) = self._source.read(index, size), kept
        self._still[index, 0] = self._source.preprocess.mask(mask).ravel()
        if self._whole.shape[2]:
            small = mask.resize((width, height), Image.Resampling.NEAREST)
            self._whole[index, 0, : height * width] = np.asarray(small).ravel()

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "Masks":
        """Return the masks of the images that were not broken."""
        pixels = [torch.from_numpy(part[good]) for part in (self._still, self._whole)]
        return Masks(Stored(pixels[0], still.sizes, still.kept), whole and Stored(pixels[1], whole.sizes, whole.kept))


@dataclass(frozen=True)
class Masks:
    """Masks in memory in the sizes of their images."""

    stored: Stored
    whole: Stored | None

    def begin(self, area: int) -> Fill:
        """Masks are in memory already."""
        raise AssertionError(f"masks are read once, not again with {area} pixels")

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, size, size), on the CPU."""
        return self.stored.images(chosen, torch.device("cpu"))[:, 0]

    def seen(self, chosen: Tensor, boxes: Boxes, size: int, *, whole: bool) -> Tensor:
        """Return what the boxes show of the masks, uint8 (m, size, size), on the boxes' device."""
        stored = self.whole if whole else self.stored
        assert stored is not None, "opened for an augmentation without random crops"
        return cut_nearest(stored.images(chosen, boxes.top.device)[:, 0], boxes, size)


def mask_files(root: Path, pairs: Sequence[Pair], *, classes: int, preprocess: Preprocess) -> MaskFiles:
    """Return the masks of the listed images; nothing is opened."""
    paths = np.array([[os.fsencode(path) for path in pair] for pair in pairs], dtype=np.bytes_).reshape(-1, 2)
    return MaskFiles(root, paths, classes, preprocess)
