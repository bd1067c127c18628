"""Open a data set of images with any number of labels each, and write its validation images."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from compress.data.augment import Augmentation
from compress.data.dataset import Dataset, centred
from compress.data.digest import DataSettings
from compress.data.images import ArrayImages, FileImages, readable
from compress.data.planar import Planar
from compress.data.scenes import CLASSES, Scenes
from compress.data.validation import new_folder
from export.errors import DataError
from export.images.preprocess import Preprocess
from export.images.tables import FILE, TABLE, TableListing


def _files(
    listing: TableListing, files: Sequence[tuple[str, str]], settings: DataSettings, _preprocess: Preprocess
) -> FileImages:
    paths = np.array([os.fsencode(path) for path, _ in files], dtype=np.bytes_)
    return FileImages(listing.root, paths, torch.from_numpy(listing.truths(files)), settings.skip_broken)


def _arrays(scenes: Scenes, chosen: np.ndarray, _preprocess: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(chosen), len(CLASSES) - 1)
    for row, index in zip(labels, chosen, strict=True):
        row[scenes.boxes[index][:, 4].astype(int) - 1] = 1
    return ArrayImages(scenes.images[chosen], labels)


TABLES = Planar(
    "tables of labels", TableListing, CLASSES[1:], lambda settings, _: centred(settings), _files, _arrays, spoiled_by=()
)


def open_tables(settings: DataSettings, augmentation: Augmentation) -> Dataset:
    """Open a data set by name, with labels float32 (n, classes); raise DataError for a class without training images."""
    found = TABLES.open(settings, augmentation)
    for name, having in zip(found.classes, found.train.labels.sum(0).tolist(), strict=True):
        if not having:
            raise DataError(f"class {name!r}: no training image has this label: add some, or remove it from {TABLE}")
    return found


def write_table(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their labels as a folder that `list_table` reads; return the number of images.

    Files are copied as they are. Raises DataError where the folder exists.
    """
    images, rows = dataset.held_out, list[list[object]]()
    with new_folder(folder) as partial:
        (partial / "val").mkdir()
        for index, _ in readable(images):
            name = f"{index:06d}{images.suffix(index)}"
            (partial / "val" / name).write_bytes(images.content(index))
            rows.append([name, *images.labels[index].int().tolist()])
        with (partial / "val" / TABLE).open("w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows([[FILE, *dataset.classes], *rows])
    return len(rows)
