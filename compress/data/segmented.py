"""Open a data set of images with masks, and write its validation images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from compress.data.dataset import Dataset, centred
from compress.data.digest import DataSettings
from compress.data.images import ArrayImages, FileImages, readable
from compress.data.named import WITH_MASKS
from compress.data.placed import ArrayMasks, MaskFiles, mask_files, tally
from compress.data.planar import Planar
from compress.data.scenes import CLASSES as SCENE_CLASSES
from compress.data.scenes import Scenes
from compress.data.validation import new_folder
from export.errors import DataError, first
from export.images.folders import count
from export.images.masks import CLASSES, IMAGES, MASKS, MaskListing, Pair, are_binary, turned_note
from export.images.preprocess import Preprocess


def _files(listing: MaskListing, pairs: Sequence[Pair], settings: DataSettings, preprocess: Preprocess) -> FileImages:
    masks = mask_files(listing.root, pairs, classes=len(listing.classes), preprocess=preprocess)
    labels = torch.zeros(len(pairs), dtype=torch.int64)
    return FileImages(listing.root, masks.paths[:, 0], labels, settings.skip_broken, placed=masks)


def _arrays(scenes: Scenes, chosen: np.ndarray, preprocess: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(chosen), dtype=torch.int64)
    return ArrayImages(scenes.images[chosen], labels, placed=ArrayMasks(scenes.masks[chosen], preprocess))


def _centred(settings: DataSettings, listing: MaskListing | None) -> Preprocess:
    found = replace(centred(settings), ignore_index=settings.ignore_index)
    if settings.ignore_index is not None or listing is None or len(listing.classes) != 2:
        return found
    return replace(found, binary_masks=are_binary(listing.root, listing.train + (listing.val or ())))


def _notes(dataset: Dataset) -> tuple[str, ...]:
    train, val = dataset.train.placed, dataset.val.placed
    assert train is not None
    assert val is not None
    found, held = tally(train), tally(val)
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


open_masks = Planar("masks", MaskListing, SCENE_CLASSES, _centred, _files, _arrays, WITH_MASKS, notes=_notes).open


def write_masks(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their masks as a folder that `list_masks` reads; return the number of images.

    Files are copied as they are. Raises DataError where the folder exists.
    """
    images, masks, written = dataset.held_out, dataset.held_out.placed, 0
    assert isinstance(masks, MaskFiles | ArrayMasks)
    with new_folder(folder) as partial:
        for name in (IMAGES, MASKS):
            (partial / name / "val").mkdir(parents=True)
        (partial / CLASSES).write_text("".join(f"{name}\n" for name in dataset.classes), encoding="utf-8")
        for index, _ in readable(images):
            (partial / IMAGES / "val" / f"{index:06d}{images.suffix(index)}").write_bytes(images.content(index))
            (partial / MASKS / "val" / f"{index:06d}.png").write_bytes(masks.content(index))
            written += 1
    return written
