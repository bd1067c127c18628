"""Truths that move with an image's view: the interface of masks and boxes, and masks."""

import io
import math
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.stored import Stored
from compress.data.views import Boxes, cut_nearest
from export.images.decode import BrokenImage
from export.images.masks import SAMPLE, read_mask
from export.images.preprocess import IGNORED, Preprocess
from export.images.read import spread
from export.images.size import Size

SPOILED_BY = ("randaugment", "mixup", "cutmix")  # changes of images that do not move their masks or boxes


class Fill(Protocol):
    """Reads each image's truth into memory while the images are decoded."""

    def put_(self, index: int, kept: tuple[int, int]) -> None:
        """Read the truth of an image that is stored at (height, width) `kept`; raises BrokenImage."""

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "Placed":
        """Return the truths of the images that were not broken, at the sizes at which those are stored."""


class Placed(Protocol):
    """The truths of a set of images, by their indices."""

    def still(self, chosen: Tensor) -> Tensor:
        """Return the truths (m, ...) of the chosen images in evaluation's view."""

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the truths in an augmented view, whose `boxes` are cut from the whole images or from evaluation's."""


class PlacedSource(Placed, Protocol):
    """The truths of images that are not decoded yet."""

    def take(self, chosen: np.ndarray) -> "PlacedSource":
        """Return the truths of the images with these indices."""

    def begin(self, area: int) -> Fill:
        """Return the object that reads the truths into memory; with `area` > 0 also those of whole images."""


@dataclass(frozen=True)
class MaskSource(ABC):
    """Masks that are read, and seen as `preprocess` says, on access."""

    preprocess: Preprocess

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, chosen: np.ndarray) -> Self:
        """Return the masks of the images with these indices."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Return the bytes of one mask as a file."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, bool]:
        """Return one mask, and whether it was turned upright; raise BrokenImage where it does not fit its image."""

    def begin(self, area: int) -> "MaskFill":
        """Return the object that reads the masks into memory."""
        return MaskFill(self, area)

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, height, width)."""
        return torch.from_numpy(np.stack([self.preprocess.mask(self.read(index)[0]) for index in chosen.tolist()]))

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the masks' boxes, resized, uint8 (m, height, width)."""
        masks = [self.read(index)[0] for index in chosen.tolist()]
        pixels = [np.asarray(mask) if whole else self.preprocess.mask(mask) for mask in masks]
        parts = [
            cut_nearest(torch.from_numpy(one.copy())[None], boxes[torch.tensor([place])], size)
            for place, one in enumerate(pixels)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class MaskFiles(MaskSource):
    """Mask files; `paths` of the images and of the masks are bytes (n, 2)."""

    root: Path
    paths: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, chosen: np.ndarray) -> Self:
        """Return the masks of the images with these indices."""
        return replace(self, paths=self.paths[chosen])

    def content(self, index: int) -> bytes:
        """Return the bytes of one mask's file."""
        return (self.root / os.fsdecode(self.paths[index, 1])).read_bytes()

    def read(self, index: int) -> tuple[Image.Image, bool]:
        """Return one mask, and whether it was turned upright; raise BrokenImage where it does not fit its image."""
        image, mask = (self.root / os.fsdecode(path) for path in self.paths[index])
        return read_mask(mask, image, classes=self.classes, preprocess=self.preprocess)


@dataclass(frozen=True)
class ArrayMasks(MaskSource):
    """Masks in memory at their own size, uint8 (n, height, width)."""

    arrays: np.ndarray

    def __len__(self) -> int:
        return len(self.arrays)

    def take(self, chosen: np.ndarray) -> Self:
        """Return the masks of the images with these indices."""
        return replace(self, arrays=self.arrays[chosen])

    def content(self, index: int) -> bytes:
        """Return the bytes of one mask as a PNG file."""
        stream = io.BytesIO()
        Image.fromarray(self.arrays[index]).save(stream, "PNG")
        return stream.getvalue()

    def read(self, index: int) -> tuple[Image.Image, bool]:
        """Return one mask, which no image's orientation turns."""
        return Image.fromarray(self.arrays[index]), False


class MaskFill:
    """Reads masks into memory, in evaluation's view and, with `area` > 0, whole."""

    def __init__(self, source: MaskSource, area: int) -> None:
        self._source, n = source, len(source)
        seen = math.prod(source.preprocess.image_size)
        self._values, self._turned = np.zeros((n, IGNORED + 1), np.bool_), np.zeros(n, np.bool_)
        self._still, self._whole = np.empty((n, 1, seen), np.uint8), np.zeros((n, 1, area), np.uint8)

    def put_(self, index: int, kept: tuple[int, int]) -> None:
        """Read one mask."""
        (mask, self._turned[index]), (height, width) = self._source.read(index), kept
        self._values[index] = np.array(mask.histogram()) > 0
        self._still[index, 0] = self._source.preprocess.mask(mask).ravel()
        if self._whole.shape[2]:
            small = mask.resize((width, height), Image.Resampling.NEAREST)
            self._whole[index, 0, : height * width] = np.asarray(small).ravel()

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "Masks":
        """Return the masks of the images that were not broken."""
        pixels = [torch.from_numpy(part[good]) for part in (self._still, self._whole)]
        seen = Tally(self._values[good].any(axis=0), int(self._turned[good].sum()), len(good), len(good))
        whole_ones = whole and Stored(pixels[1], whole.sizes, whole.kept)
        return Masks(Stored(pixels[0], still.sizes, still.kept), whole_ones, seen)


@dataclass(frozen=True)
class Masks:
    """Masks in memory at their images' sizes."""

    stored: Stored
    whole: Stored | None
    tally: "Tally"

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, height, width), on the CPU."""
        return self.stored.images(chosen, torch.device("cpu"))[:, 0]

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the masks' boxes, resized, uint8 (m, height, width), on the boxes' device."""
        stored = self.whole if whole else self.stored
        assert stored is not None, "opened for an augmentation without random crops"
        return cut_nearest(stored.images(chosen, boxes.top.device)[:, 0], boxes, size)


class Tally(NamedTuple):
    """What n masks `among` all have: the `values` in them, bool (256,), and how many were turned upright."""

    values: np.ndarray
    turned: int
    n: int
    among: int


def tally(masks: Placed | None) -> Tally:
    """Return what a set's masks have; of those that are not in memory SAMPLE are read, or more until two classes are seen."""
    if isinstance(masks, Masks):
        return masks.tally
    assert isinstance(masks, MaskSource)
    values, turned, n = np.zeros(IGNORED + 1, np.bool_), 0, 0
    for index in spread(len(masks), len(masks)):
        with suppress(BrokenImage):  # training reports it
            mask, one = masks.read(index)
            values |= np.array(mask.histogram()) > 0
            turned, n = turned + one, n + 1
        if n >= SAMPLE and values[:IGNORED].sum() > 1:
            break
    return Tally(values, turned, n, len(masks))
