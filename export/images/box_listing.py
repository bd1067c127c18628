"""Images with their boxes, listed by split, and the checks that every format's boxes go through.

Boxes become fractions of the image in every format, so that resizing an image does not change them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first
from export.images.folders import TRAIN, VAL_NAMES, is_label

Boxes = NDArray[np.float32]
"""An image's truths (m, 6): class, left, top, right and bottom as fractions of the image, and 1 for a crowd of uncounted objects."""
NO_BOX = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
OUTSIDE = 0.02  # fraction of an image's side by which a box drawn by hand may exceed it


class BoxFile(NamedTuple):
    """An image's path relative to the root, the file with its boxes, and the boxes."""

    path: str
    source: str
    boxes: Boxes


@dataclass(frozen=True)
class BoxListing:
    """The images of a data set in the order of their paths, each with the file of its boxes, and all `boxes` by image.

    `val` is None if the folder has no validation set.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, str], ...]
    val: tuple[tuple[str, str], ...] | None
    boxes: Mapping[str, Boxes]

    def place(self, part: str) -> str:
        """Return where the images of a split belong."""
        return f"the JSON, list or folder that is named {part}"

    def names(self) -> list[str]:
        """Return the paths of all files."""
        return sorted({name for pair in self.train + (self.val or ()) for name in pair})

    def truths(self, files: Sequence[tuple[str, str]]) -> Boxes:
        """Return the boxes of the listed files (n, most boxes of an image, 6)."""
        return table_of([self.boxes[path] for path, _ in files])


def table_of(each: Sequence[Boxes]) -> Boxes:
    """Return all images' boxes (n, most boxes of an image, 6), padded with rows without a box."""
    table = np.tile(np.array(NO_BOX, np.float32), (len(each), max([1, *map(len, each)]), 1))
    for row, boxes in zip(table, each, strict=True):
        row[: len(boxes)] = boxes
    return table


def checked(where: str, corners: Sequence[float], size: tuple[float, float]) -> tuple[float, ...] | None:
    """Return a box in pixels (left, top, right, bottom) as fractions of the image's `size` (width, height); None if it has no area.

    Raises DataError for numbers that are not finite, and for a box that exceeds the image.
    """
    if not np.isfinite(corners).all():
        raise DataError(
            f"{where}: the box {_brief(corners)} has values that are not finite: draw it again or remove it"
        )
    found = np.array(corners, np.float64) / (*size, *size)
    if found.min() < -OUTSIDE or found.max() > 1 + OUTSIDE:
        raise DataError(
            f"{where}: the box {_brief(corners)} leaves the image of {size[0]:g} x {size[1]:g} pixels: draw it again or remove it"
        )
    left, top, right, bottom = np.clip(found, 0, 1).tolist()
    return (left, top, right, bottom) if left < right and top < bottom else None


def _brief(corners: Sequence[float]) -> str:
    return f"({', '.join(f'{one:g}' for one in corners)})"


def table(rows: Sequence[tuple[float, ...]]) -> Boxes:
    """Return one image's boxes."""
    return np.array(rows, np.float32).reshape(-1, 6)


def split_of(name: str) -> str | None:
    """Return the split that a file or folder is named after: train, val, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    if TRAIN in words:
        return TRAIN
    return "val" if any(word in VAL_NAMES for word in words) else None


def listing_of(root: Path, classes: Sequence[str], parts: Mapping[str, list[BoxFile]]) -> BoxListing:
    """Return a listing of the splits found; validation images are from `val`, else from `test`."""
    if not 1 <= len(classes) == len(set(classes)) or not all(map(is_label, classes)):
        raise DataError(
            f"{root}: must name its classes, each once and on one line, got {first(list(classes)) or 'none'}"
        )
    for name, files in parts.items():
        if not files:
            raise DataError(f"{root}: its {name} split has no images: add some or remove the split")
    val = next((parts[name] for name in ("val", "test") if name in parts), None)
    train = parts.get(TRAIN, parts.get("all", []))
    if train and not any(len(file.boxes) for file in train):
        raise DataError(f"{root}: none of its {len(train):,} training images has a box: check the annotations")
    pairs = [
        None if part is None else tuple(sorted((file.path, file.source) for file in part)) for part in (train, val)
    ]
    boxes = {file.path: file.boxes for part in (train, val or []) for file in part}
    return BoxListing(root, tuple(classes), pairs[0] or (), pairs[1], boxes)
