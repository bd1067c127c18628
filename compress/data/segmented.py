"""Open a data set of images with masks, move the masks with an image's view, and write its validation images."""

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.dataset import Dataset, TruthKind, centred, drawn, known, open_images
from compress.data.images import ArrayImages, FileImages, Lazy, from_files
from compress.data.placed import Placed
from compress.data.scenes import CLASSES as SCENE_CLASSES
from compress.data.scenes import Scenes
from compress.data.settings import DataSettings
from compress.data.stored import Stored
from compress.data.validation import copied, new_folder
from compress.data.views import Boxes, cut_nearest
from export.errors import DataError, first
from export.images.decode import BrokenImage
from export.images.listing import Pair, count
from export.images.masks import CLASSES, IMAGES, MASKS, SAMPLE, MaskListing, are_binary, read_mask, turned_note
from export.images.preprocess import IGNORED, Preprocess
from export.images.read import spread
from export.images.size import Size


@dataclass(frozen=True)
class LazyMasks:
    """Masks that are read on access: files beside their `images`, or scenes' in memory, uint8 (n, height, width, 1)."""

    masks: Lazy
    images: FileImages | None
    preprocess: Preprocess
    classes: int

    def take(self, chosen: np.ndarray) -> "LazyMasks":
        """Return the masks of the images with these indices."""
        return replace(self, masks=self.masks.take(chosen), images=self.images and self.images.take(chosen))

    def begin(self, area: int) -> "MaskFill":
        """Return the object that reads the masks into memory."""
        return MaskFill(self, area)

    def content(self, index: int) -> bytes:
        """Return the bytes of one mask as a file, PNG if it has none."""
        if isinstance(self.masks, FileImages):
            return self.masks.content(index)
        stream = io.BytesIO()
        self.masks.whole(index).save(stream, "PNG")
        return stream.getvalue()

    def read(self, index: int) -> tuple[Image.Image, bool]:
        """Return one mask, and whether it was turned upright; raise BrokenImage where it does not fit its image."""
        if self.images is None or not isinstance(self.masks, FileImages):
            return self.masks.whole(index), False
        image, mask = (files.root / files.name(index) for files in (self.images, self.masks))
        return read_mask(mask, image, classes=self.classes, preprocess=self.preprocess)

    def still(self, chosen: Tensor) -> Tensor:
        """Return the masks uint8 (m, height, width)."""
        return torch.from_numpy(np.stack([self.preprocess.mask(self.read(index)[0]) for index in chosen.tolist()]))

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the masks' boxes, resized, uint8 (m, height, width)."""
        masks = [self.read(index)[0] for index in chosen.tolist()]
        pixels = [np.array(mask) if whole else self.preprocess.mask(mask).copy() for mask in masks]
        parts = (
            cut_nearest(torch.from_numpy(one)[None], boxes[torch.tensor([place])], size)
            for place, one in enumerate(pixels)
        )
        return torch.cat([*parts])


class MaskFill:
    """Reads masks into memory, in evaluation's view and, with `area` > 0, whole."""

    def __init__(self, source: LazyMasks, area: int) -> None:
        self._source, n = source, len(source.masks)
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
    assert isinstance(masks, LazyMasks)
    values, turned, n = np.zeros(IGNORED + 1, np.bool_), 0, 0
    among = len(masks.masks)
    for index in spread(among, among):
        with suppress(BrokenImage):  # training reports it
            mask, one = masks.read(index)
            values |= np.array(mask.histogram()) > 0
            turned, n = turned + one, n + 1
        if n >= SAMPLE and values[:IGNORED].sum() > 1:
            break
    return Tally(values, turned, n, among)


def _files(listing: MaskListing, pairs: Sequence[Pair], settings: DataSettings, preprocess: Preprocess) -> FileImages:
    names, labels = [path for path, _ in pairs], torch.zeros(len(pairs), dtype=torch.int64)
    images = from_files(listing.root, names, labels, skip_broken=settings.skip_broken)
    masks = from_files(listing.root, [path for _, path in pairs], labels, skip_broken=settings.skip_broken)
    return replace(images, placed=LazyMasks(masks, images, preprocess, len(listing.classes)))


def _scenes(scenes: Scenes, preprocess: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(scenes.images), dtype=torch.int64)
    masks = ArrayImages(scenes.masks[..., None], labels)
    return ArrayImages(scenes.images, labels, placed=LazyMasks(masks, None, preprocess, len(SCENE_CLASSES)))


def _centred(settings: DataSettings, listing: MaskListing | None) -> Preprocess:
    found = replace(centred(settings), ignore_index=settings.ignore_index)
    if settings.ignore_index is not None or listing is None or len(listing.classes) != 2:
        return found
    return replace(found, binary_masks=are_binary(listing.root, listing.every))


def _notes(dataset: Dataset) -> tuple[str, ...]:
    found, held = tally(dataset.train.placed), tally(dataset.val.placed)
    seen = found.values[: len(dataset.classes)]
    missing = [name for name, is_there in zip(dataset.classes, seen, strict=True) if not is_there]
    if found.n and len(dataset.classes) - len(missing) < 2:
        only = f"are of {dataset.classes[int(np.argmax(seen))]!r} alone" if seen.any() else "are of no class"
        raise DataError(
            f"{dataset.name}: the pixels of the {found.among:,} training masks that count {only}, so there is nothing to learn: "
            "check the masks' values, classes.txt and data.ignore_index"
        )
    notes = list(turned_note(found.turned + held.turned, found.n + held.n))
    if dataset.preprocess.binary_masks:
        zero, one = dataset.classes
        notes.append(
            f"the masks have only 0 and 255, read as {zero} and {one}; set data.ignore_index: 255 if 255 is to be ignored"
        )
    if found.n and missing:
        some = "" if found.n == found.among else f" in {found.n:,} of the {found.among:,} training masks"
        notes.append(f"no training pixel is of {count(missing, 'class')}{some}: {first(missing)}")
    return tuple(notes)


_MASKS = TruthKind(
    _files,
    drawn(_scenes, SCENE_CLASSES),
    missing=known("masks", "segmentation"),
    moving="masks",
    preprocess=_centred,
    notes=_notes,
)
open_masks = partial(open_images, kind=_MASKS)


def write_masks(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their masks as a folder that `list_masks` reads; return the number of images.

    Files are copied as they are. Raises DataError where the folder exists.
    """
    masks, written = dataset.held_out.placed, 0
    assert isinstance(masks, LazyMasks)
    with new_folder(folder) as partial:
        for name in (IMAGES, MASKS):
            (partial / name / "val").mkdir(parents=True)
        (partial / CLASSES).write_text("".join(f"{name}\n" for name in dataset.classes), encoding="utf-8")
        for index, _, _ in copied(dataset.held_out, lambda _: partial / IMAGES / "val"):
            (partial / MASKS / "val" / f"{index:06d}.png").write_bytes(masks.content(index))
            written += 1
    return written
