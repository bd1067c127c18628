"""Open a data set of images with masks, and write its validation images."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from compress.data.augment import Augmentation
from compress.data.dataset import Dataset, Kind, centred, drawn, known, open_images
from compress.data.images import ArrayImages, FileImages, from_files
from compress.data.placed import SPOILED_BY, ArrayMasks, MaskFiles, MaskSource, tally
from compress.data.scenes import CLASSES as SCENE_CLASSES
from compress.data.scenes import Scenes
from compress.data.settings import DataSettings
from compress.data.validation import copied, new_folder
from export.errors import DataError, first
from export.images.listing import Pair, count
from export.images.masks import CLASSES, IMAGES, MASKS, MaskListing, are_binary, turned_note
from export.images.preprocess import Preprocess


def _files(listing: MaskListing, pairs: Sequence[Pair], settings: DataSettings, preprocess: Preprocess) -> FileImages:
    names, labels = [path for path, _ in pairs], torch.zeros(len(pairs), dtype=torch.int64)
    images = from_files(listing.root, names, labels, skip_broken=settings.skip_broken)
    paths = np.array([[os.fsencode(path) for path in pair] for pair in pairs], dtype=np.bytes_).reshape(-1, 2)
    return replace(images, placed=MaskFiles(preprocess, listing.root, paths, len(listing.classes)))


def _scenes(scenes: Scenes, preprocess: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(scenes.images), dtype=torch.int64)
    return ArrayImages(scenes.images, labels, placed=ArrayMasks(preprocess, scenes.masks))


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


WITH_MASKS = Kind(
    _files,
    drawn(_scenes, SCENE_CLASSES),
    missing=known("masks", "segmentation"),
    preprocess=_centred,
    spoiled_by=SPOILED_BY,
    truths="masks",
    notes=_notes,
)


def open_masks(settings: DataSettings, augmentation: Augmentation) -> Dataset:
    """Open a data set by name, its masks `placed`; raise DataError as `open_images` does."""
    return open_images(settings, augmentation, WITH_MASKS)


def write_masks(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their masks as a folder that `list_masks` reads; return the number of images.

    Files are copied as they are. Raises DataError where the folder exists.
    """
    masks, written = dataset.held_out.placed, 0
    assert isinstance(masks, MaskSource)
    with new_folder(folder) as partial:
        for name in (IMAGES, MASKS):
            (partial / name / "val").mkdir(parents=True)
        (partial / CLASSES).write_text("".join(f"{name}\n" for name in dataset.classes), encoding="utf-8")
        for index, _, _ in copied(dataset.held_out, lambda _: partial / IMAGES / "val"):
            (partial / MASKS / "val" / f"{index:06d}.png").write_bytes(masks.content(index))
            written += 1
    return written
