"""List images with the boxes of Pascal VOC's XML."""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection
from pathlib import Path

from export.errors import DataError, first
from export.images.box_listing import (
    ALL,
    VAL,
    BoxFile,
    BoxListing,
    Drawn,
    checked,
    listing_of,
    only,
    other_encoding,
    split_of,
    text_of,
    used_splits,
)
from export.images.folders import SUFFIXES
from export.images.listing import TRAIN, VAL_NAMES

FOLDER = "Annotations"
MAX_XML = 1_000_000  # bytes of one image's file


def list_voc(root: Path) -> BoxListing:
    """List the images of a folder with an XML file each."""
    lists = dict[str, list[Path]]()
    for name in (TRAIN, *VAL_NAMES):
        if (path := root / "ImageSets" / "Main" / f"{name}.txt").is_file():
            lists.setdefault(split_of(name) or ALL, []).append(path)
    stand_ins, said = trainval(root, root / "ImageSets" / "Main")
    lists = {part: [path] for part, path in stand_ins.items()} or lists
    known = dict.fromkeys(sorted(path.stem for path in (root / FOLDER).glob("*.xml") if path.name[0] != "."))
    named, notes = used_splits(root, lists)
    parts = {split: _ids(only(root, split, paths), known) for split, paths in named.items()} or {ALL: list(known)}
    images = _images(root / "JPEGImages")
    if missing := sorted({one for ids in parts.values() for one in ids} - images.keys()):
        raise DataError(
            f"{root / 'JPEGImages'}: has no image of {len(missing):,} annotations ({first(missing)}): add it or remove them"
        )
    found = {
        split: [
            BoxFile(str(images[one].relative_to(root)), f"{FOLDER}/{one}.xml", *_read(root / FOLDER / f"{one}.xml"))
            for one in ids
        ]
        for split, ids in parts.items()
    }
    classes = sorted({one.label for part in found.values() for file in part for one in file.drawn})
    return listing_of(root, classes, found, [*said, *notes])


def trainval(root: Path, folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return trainval.txt and test.txt as the lists of training and of validation, with a note; nothing beside a list of train or val."""
    found = {part: folder / f"{name}.txt" for part, name in ((TRAIN, "trainval"), (VAL, "test"))}
    found = {part: path for part, path in found.items() if path.is_file()}
    if TRAIN not in found or any((folder / f"{name}.txt").is_file() for name in (TRAIN, "val", "valid", "validation")):
        return {}, ()
    more = ", test for validation" if VAL in found else ""
    return found, (f"{root}: has no lists of train and val: trainval is used for training{more}",)


def _images(folder: Path) -> dict[str, Path]:
    """Return the images by their names without suffix."""
    found = dict[str, Path]()
    for path in sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != "."):
        if (other := found.setdefault(path.stem, path)) is not path:
            raise DataError(f"{folder}: {other.name} and {path.name} have the same boxes: rename or remove one")
    return found


def _ids(path: Path, known: Collection[str]) -> list[str]:
    """Return the names in a list. A line is a name, and may end in 1, -1 or 0, as in VOC's lists of a class."""
    lines = filter(None, map(str.strip, text_of(path).splitlines()))
    return [line if line in known else re.sub(r"\s+(-?1|0)$", "", line) for line in lines]


def _read(file: Path) -> tuple[tuple[float, float], list[Drawn]]:
    """Return an image's size and its objects; those that are marked difficult are not judged, as crowds."""
    try:
        content = file.read_bytes()
        plain = content.replace(b"\0", b"")  # of UTF-16
        if len(content) > MAX_XML or b"<!DOCTYPE" in plain or b"<!ENTITY" in plain:
            raise DataError(f"{file}: must be a plain Pascal VOC file of at most {MAX_XML:,} bytes, without entities")
        tree = _tree(file, content)
        width, height = (float(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        objects = [
            (
                one.findtext("name", "").strip(),
                [float(one.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")],
                float(one.findtext("difficult", "0") or 0) != 0,
            )
            for one in tree.iter("object")
        ]
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{file}: cannot be read as Pascal VOC's XML ({error}): repair or remove it") from error
    if not all(0 < side < math.inf for side in (width, height)):
        raise DataError(
            f"{file}: size: must be the image's width and height, got {width:g} x {height:g}: write it there"
        )
    return (width, height), [
        Drawn(name, checked(f"{file}: object {number}", corners, (width, height)), difficult)
        for number, (name, corners, difficult) in enumerate(objects, 1)
    ]


def _tree(file: Path, content: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            if b"encoding" not in content[:100]:
                raise other_encoding(file, error) from error
        raise
