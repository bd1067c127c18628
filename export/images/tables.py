"""List images with any number of labels each, from a labels.csv beside them. docs/images.md has the rules."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first
from export.images.decode import require_pillow
from export.images.folders import check_folder, images_in
from export.images.listing import TRAIN, VAL_NAMES, SplitListing, check_lengths, count, is_label
from export.images.preprocess import Preprocess
from export.images.read import Examples, file_examples, match

TABLE = "labels.csv"
FILE, LABELS = "file", "labels"  # the first line, unless each class has a column


@dataclass(frozen=True, kw_only=True)
class TableListing(SplitListing[str]):
    """Images with their tables, and all `labels` by image."""

    labels: Mapping[str, tuple[str, ...]]
    where = f"{{root}}/{{part}}/, with {{root}}/{{part}}/{TABLE}"

    def truths(self, files: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return 1 for each label of a listed file, else 0, (n, classes)."""
        rows = [[name in self.labels[path] for name in self.classes] for path, _ in files]
        return np.array(rows, np.float32).reshape(-1, len(self.classes))


def list_table(root: Path) -> TableListing:
    """List a folder with one labels.csv, or with one in train/ and one in val/.

    Raises DataError for unusable tables, for missing images or rows, and for labels that no training image has.
    """
    check_folder(root)
    splits = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    wanted = [root, *(splits[name] for name in (TRAIN, *VAL_NAMES) if name in splits)]
    tables = [folder / TABLE for folder in wanted if (folder / TABLE).is_file()]
    tables = tables[:1] if tables[:1] == [root / TABLE] else tables
    if not tables:
        raise DataError(
            f"{root}: has no {TABLE}: put one beside the images, or into {TRAIN}/ and val/, whose first line is `{FILE},{LABELS}`"
        )
    columns, rows, sources = list[tuple[str, ...] | None](), dict[str, tuple[str, ...]](), dict[str, str]()
    for table in tables:
        own, found = _read(root, table)
        columns.append(own)
        rows |= found
        sources |= dict.fromkeys(found, os.path.relpath(table, root))
    train, val = _split(sorted(rows))
    classes = columns[0] or tuple(sorted({label for path in train or val or () for label in rows[path]}))
    check_lengths(tables[0], classes)
    if not classes:
        raise DataError(f"{tables[0]}: not one image has a label: fill its column")
    for table, own in zip(tables, columns, strict=True):
        if own is not None and set(own) != set(classes):
            raise DataError(
                f"{table}: its columns are not the {len(classes)} classes of {tables[0]}: give both the same"
            )
    for path, labels in rows.items():
        if unknown := [label for label in labels if label not in classes]:
            raise DataError(
                f"{root / sources[path]}: {path}: {unknown[0]!r} is none of the {len(classes)} classes ({first(list(classes))}): "
                "correct it, or label a training image with it"
            )
    pairs = [None if part is None else tuple((path, sources[path]) for path in part) for part in (train, val)]
    return TableListing(root, classes, pairs[0] or (), pairs[1], labels=rows)


def _split(paths: list[str]) -> tuple[list[str], list[str] | None]:
    """Return the training images and those of the validation split; None unless all images lie in split folders."""
    parts = {path: path.partition("/")[0].lower() for path in paths}
    if not set(parts.values()) <= {TRAIN, *VAL_NAMES}:
        return paths, None
    held_out = next((name for name in VAL_NAMES if name in parts.values()), None)
    train = [path for path in paths if parts[path] == TRAIN]
    return train, None if held_out is None else [path for path in paths if parts[path] == held_out]


def _read(root: Path, table: Path) -> tuple[tuple[str, ...] | None, dict[str, tuple[str, ...]]]:
    """Return a table's classes, None unless each has a column, and each image's labels, by its path relative to the root."""
    try:
        header, *lines = csv.reader(table.read_text(encoding="utf-8-sig").splitlines(), strict=True)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise DataError(f"{table}: cannot be read ({error}): save it as UTF-8 text with commas") from error
    classes = tuple(name.strip() for name in header[1:])
    if header[0].strip() != FILE or not classes or len(set(classes)) < len(classes) or not all(map(is_label, classes)):
        raise DataError(
            f"{table}: its first line must be `{FILE},{LABELS}`, or `{FILE}` and each class's name once, got {','.join(header)!r:.60}"
        )
    found = dict[str, tuple[str, ...]]()
    for number, cells in enumerate(lines, 2):
        if not cells:
            continue
        path = os.path.relpath(table.parent / cells[0].strip(), root)
        if len(cells) != len(header) or path in found:
            wrong = (
                f"names {cells[0]} again" if path in found else f"has {len(cells)} cells, the first line {len(header)}"
            )
            raise DataError(f"{table}: line {number}: {wrong}: correct it")
        if classes == (LABELS,):
            found[path] = tuple(label for part in cells[1].split(";") if (label := part.strip()))
        elif odd := [cell for cell in cells[1:] if cell.strip() not in ("0", "1")]:
            raise DataError(f"{table}: line {number}: a class's column must hold 0 or 1, got {odd[0]!r:.40}")
        else:
            found[path] = tuple(name for name, cell in zip(classes, cells[1:], strict=True) if cell.strip() == "1")
    _check_images(root, table, found)
    return None if classes == (LABELS,) else classes, found


def _check_images(root: Path, table: Path, found: Mapping[str, object]) -> None:
    """Raise DataError unless a table lists exactly the images beside it."""
    images = {os.path.normpath(name) for name in images_in(root, table.parent)}
    if gone := [path for path in found if path not in images]:
        raise DataError(f"{table}: {count(gone, 'image')} missing: {first(gone)}: add them, or remove their rows")
    if alone := sorted(images - found.keys()):
        raise DataError(
            f"{table}: {len(alone):,} of {len(images):,} images have no row: {first(alone)}: add rows, empty where an image has no label"
        )
    if not images:
        raise DataError(f"{table}: lists no image: add some")


def table_examples(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Return the labelled images of a folder, or of its validation split if it has one; classes match `labels` by name.

    Raises DataError if the data do not fit.
    """
    require_pillow(data)
    listing = list_table(data)
    places, notes = match(data, listing.classes, labels)
    truths = np.zeros((len(listing.judged), len(labels)), np.float32)
    truths[:, places] = listing.truths(listing.judged)
    return file_examples(listing, truths, preprocess, notes)
