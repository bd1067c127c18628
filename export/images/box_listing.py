"""Images with their boxes, listed by split, and the checks that every format's boxes go through.

BoxTable become fractions of the image in every format, so that resizing an image does not change them.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first
from export.images.decode import BrokenImage
from export.images.listing import TRAIN, VAL_NAMES, SplitListing, check_lengths, is_label
from export.images.orientation import REPAIR, read_header, turn_of, turned_corners
from export.images.preprocess import Preprocess
from export.images.size import Size

BoxTable = NDArray[np.float32]
"""An image's truths (m, 6): class, left, top, right and bottom as fractions of the image, and 1 for a crowd of uncounted objects."""
NO_BOX = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
OUTSIDE = 0.02  # fraction of an image's side by which a box drawn by hand may exceed it
VAL, TEST, ALL = "val", "test", "all"  # beside TRAIN the splits; a data set without splits has all its images in one
T = TypeVar("T")


class Drawn(NamedTuple):
    """An object's class, its box as fractions of the image (None without an area), and whether it is a crowd."""

    label: str
    box: tuple[float, ...] | None
    crowd: bool = False


class BoxFile(NamedTuple):
    """An image's path relative to the root, the file with its boxes, the size (width, height) that this states, and the boxes."""

    path: str
    source: str
    size: tuple[float, float] | None
    drawn: Sequence[Drawn]


@dataclass(frozen=True, kw_only=True)
class BoxListing(SplitListing[str]):
    """Images with the files of their boxes, and all `boxes` by image."""

    boxes: Mapping[str, BoxTable]
    where = "the JSON, list or folder that is named {part}"

    def decisive(self) -> dict[str, object]:
        """Return what decides the data besides the classes' names and the files' content: the boxes as they are read."""
        return {**super().decisive(), "boxes": hashlib.sha256(self.truths(self.every).tobytes()).hexdigest()}

    def truths(self, files: Sequence[tuple[str, str]], *, seen_by: Preprocess | None = None) -> BoxTable:
        """Return the boxes of the listed files (n, most boxes of an image, 6); with a preprocessing as fractions of its input."""
        table = table_of([self.boxes[path] for path, _ in files])
        if seen_by is None or seen_by.stretch:
            return table
        return framed_boxes(table, [self._size(path) for path, _ in files], seen_by)

    def _size(self, path: str) -> Size:
        """Return an image's height and width; any for a broken one, which is refused or skipped once it is read."""
        try:
            width, height = read_header(self.root / path).upright
        except BrokenImage:
            return 1, 1
        return height, width


def framed_boxes(table: BoxTable, sizes: Sequence[Size], preprocess: Preprocess) -> BoxTable:
    """Return boxes (n, most, 6) of images of these sizes as fractions of what the network sees; rows without a box stay as they are."""
    framed = table.copy()
    for row, size in zip(framed, sizes, strict=True):
        real = row[:, 0] >= 0
        row[real, 1:5] = preprocess.boxes(row[real, 1:5], size)
    return framed


def table_of(each: Sequence[BoxTable]) -> BoxTable:
    """Return all images' boxes (n, most boxes of an image, 6), padded with rows without a box."""
    table = np.tile(np.array(NO_BOX, np.float32), (len(each), max([1, *map(len, each)]), 1))
    for row, boxes in zip(table, each, strict=True):
        row[: len(boxes)] = boxes
    return table


def checked(where: str, corners: Sequence[float], size: tuple[float, float]) -> tuple[float, ...] | None:
    """Return a box in pixels (left, top, right, bottom) as fractions of the image's `size` (width, height); None if it has no area.

    Raises DataError for numbers that are not finite, a negative width or height, and a box that exceeds the image.
    """

    def refusal(reason: str) -> DataError:
        brief = ", ".join(f"{one:g}" for one in corners)
        return DataError(f"{where}: the box ({brief}) {reason}: draw it again or remove it")

    if not all(map(math.isfinite, corners)):
        raise refusal("has values that are not finite")
    if corners[2] < corners[0] or corners[3] < corners[1]:
        raise refusal("has a negative width or height")
    found = [corner / side for corner, side in zip(corners, (*size, *size), strict=True)]
    if min(found) < -OUTSIDE or max(found) > 1 + OUTSIDE:
        raise refusal(f"leaves the image of {size[0]:g} x {size[1]:g} pixels")
    left, top, right, bottom = (float(np.float32(min(max(one, 0.0), 1.0))) for one in found)  # as they are kept
    return (left, top, right, bottom) if left < right and top < bottom else None


def text_of(file: Path) -> str:
    """Return a file's text, without UTF-8's mark at its start. Raises DataError for another encoding."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}): repair or remove it") from error
    except UnicodeDecodeError as error:
        raise other_encoding(file, error) from error


def other_encoding(file: Path, error: UnicodeDecodeError) -> DataError:
    """Return the refusal of text that is not UTF-8."""
    return DataError(f"{file}: byte {error.start:,} is not UTF-8 (is it Latin-1?): save the file as UTF-8")


def split_of(name: str) -> str | None:
    """Return the split that a file or folder is named after: train, val, test, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    if TRAIN in words:
        return TRAIN
    return next((TEST if word == TEST else VAL for word in VAL_NAMES if word in words), None)


def used_splits(root: Path, found: Mapping[str, T]) -> tuple[dict[str, T], list[str]]:
    """Return the splits to read, train first, and notes: `test` is used for validation only where there is no `val`."""
    parts = {name: found[name] for name in (TRAIN, VAL, ALL) if name in found}
    if TEST not in found or VAL in found:
        return parts, []
    return parts | {VAL: found[TEST]}, [f"{root}: has no val split: its test split is used for validation"]


def only(root: Path, split: str, found: Sequence[Path]) -> Path:
    """Return the only path of a split. Raises DataError for several."""
    if len(found) > 1:
        names = first([str(path.relative_to(root)) for path in found])
        raise DataError(f"{root}: has {len(found)} {split} splits ({names}): keep one, or rename the others")
    return found[0]


def listing_of(
    root: Path, classes: Sequence[str], parts: Mapping[str, Sequence[BoxFile]], notes: Sequence[str] = ()
) -> BoxListing:
    """Return a listing of the splits train and val, or of all images. Raises DataError for an image that is listed twice."""
    if not 1 <= len(classes) == len(set(classes)) or not all(map(is_label, classes)):
        raise DataError(
            f"{root}: must name its classes, each once and on one line, got {first(list(classes)) or 'none'}"
        )
    check_lengths(root, classes)
    split_by_path = dict[str, str]()
    for name, files in parts.items():
        if not files:
            raise DataError(f"{root}: its {name} split has no images: add some or remove the split")
        for file in files:
            if (other := split_by_path.get(file.path)) is not None:
                raise DataError(
                    f"{root}: lists the image {file.path} twice ({other}, {name}; {file.source}): remove one entry"
                )
            split_by_path[file.path] = name
        if not any(one.box for file in files for one in file.drawn):
            kind = "validation" if name == VAL else "training"
            raise DataError(f"{root}: none of its {len(files):,} {kind} images has a box: check the annotations")
    every = [file for files in parts.values() for file in files]
    places = {name: place for place, name in enumerate(classes)}
    boxes, turns = dict[str, BoxTable](), _turns(root, every)
    for file in every:
        rows = [(places[one.label], *one.box, one.crowd) for one in file.drawn if one.box is not None]
        boxes[file.path] = np.array(rows, np.float32).reshape(-1, 6)
        boxes[file.path][:, 1:5] = turned_corners(boxes[file.path][:, 1:5], turns.get(file.path, 1))
    if turned := sum(turn != 1 for turn in turns.values()):
        notes = [
            *notes,
            f"{root}: the boxes of {turned:,} of {len(every):,} images were turned upright with them, as they fit the stored pixels",
        ]
    if empty := [file.source for file in every for one in file.drawn if one.box is None]:
        notes = [*notes, f"{root}: {len(empty):,} boxes without an area are left out: {first(sorted(set(empty)), 3)}"]
    train, val = parts.get(TRAIN, parts.get(ALL, ())), parts.get(VAL)
    pairs = [None if part is None else tuple(sorted(file[:2] for file in part)) for part in (train, val)]
    return BoxListing(root, tuple(classes), pairs[0] or (), pairs[1], tuple(notes), boxes=boxes)


def _turns(root: Path, files: Sequence[BoxFile]) -> dict[str, int]:
    """Return the EXIF orientation by which each image's boxes are to be turned. Raises DataError where their size does not say."""
    found, refused = dict[str, int](), dict[str, str]()
    for file in files:
        if not file.drawn:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about damaged metadata
                header = read_header(root / file.path)
        except BrokenImage:
            continue  # it is refused, or skipped, once it is read
        try:
            if file.size is None and header.orientation != 1:
                raise BrokenImage(
                    f"has EXIF orientation {header.orientation}, and {file.source} does not say if its boxes are for the stored "
                    f"or the upright pixels: {REPAIR}"
                )
            found[file.path] = 1 if file.size is None else turn_of(header, (round(file.size[0]), round(file.size[1])))
        except BrokenImage as error:
            refused[file.path] = str(error)
    if refused:
        named = first([f"{path} ({reason})" for path, reason in sorted(refused.items())], 3)
        raise DataError(f"{root}: the boxes of {len(refused):,} of {len(files):,} images may not fit them: {named}")
    return found
