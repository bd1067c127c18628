"""Truths that move with an image's view: the interface of masks and boxes, and masks."""

import io
import math
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
from export.images.size import Size


class Fill(Protocol):
    """Reads each image's truth into memory while the images are decoded."""

    def put_(self, index: int, size: tuple[int, int], kept: tuple[int, int]) -> None:
        """Read the truth of an image of this (width, height), stored at (height, width) `kept`; raises BrokenImage."""

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "Placed":
        """Return the truths of the images that were not broken, at the sizes at which those are stored."""


class Placed(Protocol):
    """The truths of a set of images, by their indices."""

    def begin(self, area: int) -> Fill:
        """Return the object that reads the truths into memory; with `area` > 0 also those of whole images."""

    def still(self, chosen: Tensor) -> Tensor:
        """Return the truths (m, ...) of the chosen images in evaluation's view."""

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the truths in an augmented view, whose `boxes` are cut from the whole images or from evaluation's."""


@dataclass(frozen=True)
class MaskFiles:
    """Mask files that are read on access; `paths` of the images and of the masks are bytes (n, 2)."""

    root: Path
    paths: np.ndarray
    classes: int
    preprocess: Preprocess

    def begin(self, area: int) -> "MaskFill":
        """Return the object that reads the masks into memory."""
        return MaskFill(self, len(self.paths), area)

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index, 1])

    def content(self, index: int) -> bytes:
        """Return the bytes of one mask's file."""
        return self._path(index).read_bytes()

    def read(self, index: int, size: tuple[int, int]) -> Image.Image:
        """Return one mask; raise BrokenImage where it is not the mask of an image of this (width, height)."""
        return read_mask(self._path(index), size, classes=self.classes, ignore=self.preprocess.ignore_index)

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, height, width)."""
        return torch.stack([torch.from_numpy(self.preprocess.mask(self._whole(index))) for index in chosen.tolist()])

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the masks' boxes, resized, uint8 (m, height, width)."""
        masks = [self._whole(index) for index in chosen.tolist()]
        pixels = [np.asarray(mask) if whole else self.preprocess.mask(mask) for mask in masks]
        parts = [
            cut_nearest(torch.from_numpy(one.copy())[None], boxes[torch.tensor([place])], size)
            for place, one in enumerate(pixels)
        ]
        return torch.cat(parts)

    def _whole(self, index: int) -> Image.Image:
        with Image.open(self.root / os.fsdecode(self.paths[index, 0])) as image:  # safe: it was decoded before
            size = image.size
        return self.read(index, size)


@dataclass(frozen=True)
class ArrayMasks:
    """Masks in memory at their own size, uint8 (n, height, width)."""

    arrays: np.ndarray
    preprocess: Preprocess

    def begin(self, area: int) -> "MaskFill":
        """Return the object that resizes the masks as the images."""
        return MaskFill(self, len(self.arrays), area)

    def content(self, index: int) -> bytes:
        """Return the bytes of one mask as a PNG file."""
        stream = io.BytesIO()
        Image.fromarray(self.arrays[index]).save(stream, "PNG")
        return stream.getvalue()

    def read(self, index: int, _size: tuple[int, int]) -> Image.Image:
        """Return one mask."""
        return Image.fromarray(self.arrays[index])

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, height, width)."""
        masks = [self.preprocess.mask(Image.fromarray(self.arrays[index])) for index in chosen.tolist()]
        return torch.from_numpy(np.stack(masks))

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the masks' boxes, resized, uint8 (m, height, width)."""
        masks = torch.from_numpy(self.arrays[chosen.numpy()]) if whole else self.still(chosen)
        return cut_nearest(masks, boxes, size)


class MaskFill:
    """Reads masks into memory, in evaluation's view and, with `area` > 0, whole."""

    def __init__(self, source: MaskFiles | ArrayMasks, n: int, area: int) -> None:
        self._source = source
        seen = math.prod(source.preprocess.image_size)
        self._still, self._whole = np.empty((n, 1, seen), np.uint8), np.zeros((n, 1, area), np.uint8)

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
    """Masks in memory at their images' sizes."""

    stored: Stored
    whole: Stored | None

    def begin(self, area: int) -> Fill:
        """Raise AssertionError: masks are in memory already."""
        raise AssertionError(f"masks are read once, not again with {area} pixels")

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, height, width), on the CPU."""
        return self.stored.images(chosen, torch.device("cpu"))[:, 0]

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the masks' boxes, resized, uint8 (m, height, width), on the boxes' device."""
        stored = self.whole if whole else self.stored
        assert stored is not None, "opened for an augmentation without random crops"
        return cut_nearest(stored.images(chosen, boxes.top.device)[:, 0], boxes, size)


def mask_files(root: Path, pairs: Sequence[Pair], *, classes: int, preprocess: Preprocess) -> MaskFiles:
    """Return the masks of the listed images, without opening them."""
    paths = np.array([[os.fsencode(path) for path in pair] for pair in pairs], dtype=np.bytes_).reshape(-1, 2)
    return MaskFiles(root, paths, classes, preprocess)
