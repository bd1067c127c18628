"""Open a data set of images with any number of labels each, and write its validation images."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from compress.data.dataset import Dataset, TruthKind, drawn, known, open_images
from compress.data.images import ArrayImages, FileImages, from_files
from compress.data.scenes import CLASSES, Scenes
from compress.data.settings import DataSettings
from compress.data.validation import copied, new_folder
from export.errors import DataError
from export.images.listing import Pair
from export.images.preprocess import Preprocess
from export.images.tables import FILE, TABLE, TableListing


def _files(listing: TableListing, files: Sequence[Pair], settings: DataSettings, _: Preprocess) -> FileImages:
    labels = torch.from_numpy(listing.truths(files))
    return from_files(listing.root, [path for path, _ in files], labels, skip_broken=settings.skip_broken)


def _scenes(scenes: Scenes, _: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(scenes.images), len(CLASSES) - 1)
    for row, boxes in zip(labels, scenes.boxes, strict=True):
        row[boxes[:, 4].astype(int) - 1] = 1
    return ArrayImages(scenes.images, labels)


def _notes(dataset: Dataset) -> tuple[str, ...]:
    """Raise DataError for a class without training images."""
    for name, having in zip(dataset.classes, dataset.train.labels.sum(0).tolist(), strict=True):
        if not having:
            raise DataError(f"class {name!r}: no training image has this label: add some, or remove it from {TABLE}")
    return ()


_TABLES = TruthKind(_files, drawn(_scenes, CLASSES[1:]), missing=known("tables of labels", "multilabel"), notes=_notes)
open_tables = partial(open_images, kind=_TABLES)


def write_table(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their labels as a folder that `list_table` reads; return the number of images.

    Files are copied as they are. Raises DataError where the folder exists.
    """
    labels = dataset.held_out.labels.int().tolist()
    with new_folder(folder) as partial:
        (partial / "val").mkdir()
        rows = [[file.name, *labels[index]] for index, _, file in copied(dataset.held_out, lambda _: partial / "val")]
        with (partial / "val" / TABLE).open("w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows([[FILE, *dataset.classes], *rows])
    return len(rows)
