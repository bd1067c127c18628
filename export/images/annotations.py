"""Find images with their boxes in COCO's JSON, YOLO's text files or Pascal VOC's XML; the rules are in docs/detection.md.

Boxes become fractions of the image in every format, so that resizing an image does not change them.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first
from export.images.decode import require_pillow
from export.images.folders import SUFFIXES, TRAIN, VAL_NAMES, check_folder, is_label
from export.images.preprocess import Preprocess
from export.images.read import Examples, file_examples, match

Boxes = NDArray[np.float32]
"""An image's truths (m, 6): class, left, top, right and bottom as fractions of the image, and 1 for a crowd of uncounted objects."""
NO_BOX = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
OUTSIDE = 0.02  # fraction of an image's side by which a box drawn by hand may exceed it
COCO, YOLO, VOC = "annotations", "labels", "Annotations"
MAX_XML = 1_000_000  # bytes of one image's file


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


def list_boxes(root: Path) -> BoxListing:
    """List a folder in one of the three formats. Raises DataError for other layouts and for boxes that cannot be used."""
    check_folder(root)
    if (root / VOC).is_dir():
        return _voc(root)
    if files := sorted([*root.glob("*.json"), *root.glob(f"{COCO}/*.json"), *root.glob("*/*.coco.json")]):
        return _coco(root, files)
    if _yolo_splits(root):
        return _yolo(root)
    raise DataError(
        f"{root}: has no boxes in a known layout: give COCO's {COCO}/*.json, YOLO's images/ and {YOLO}/, or Pascal VOC's "
        f"JPEGImages/ and {VOC}/"
    )


def table_of(each: Sequence[Boxes]) -> Boxes:
    """Return all images' boxes (n, most boxes of an image, 6), padded with rows without a box."""
    table = np.tile(np.array(NO_BOX, np.float32), (len(each), max([1, *map(len, each)]), 1))
    for row, boxes in zip(table, each, strict=True):
        row[: len(boxes)] = boxes
    return table


def box_examples(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of a folder (of its validation split, if it has one) with their boxes; classes match `labels` by name.

    Raises DataError for data that do not fit.
    """
    require_pillow(data)
    listing = list_boxes(data)
    files = listing.train if listing.val is None else listing.val
    places, notes = match(data, listing.classes, labels)
    truths = listing.truths(files)
    real = truths[..., 0] >= 0
    truths[real, 0] = np.array(places, np.float32)[truths[real, 0].astype(int)]
    return file_examples(data, files, truths, preprocess, notes)


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


def _table(rows: Sequence[tuple[float, ...]]) -> Boxes:
    return np.array(rows, np.float32).reshape(-1, 6)


def _split(name: str) -> str | None:
    """Return the split that a file or folder is named after: train, val, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    if TRAIN in words:
        return TRAIN
    return "val" if any(word in VAL_NAMES for word in words) else None


def _listing(root: Path, classes: Sequence[str], parts: Mapping[str, list[BoxFile]]) -> BoxListing:
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


# COCO


def _coco(root: Path, files: Sequence[Path]) -> BoxListing:
    named = {split: file for file in reversed(files) if (split := _split(f"{file.parent.name} {file.stem}"))}
    parts = named or {"all": files[0]}
    documents = {split: _json(file) for split, file in parts.items()}
    names: dict[int, str] = {}
    for split, document in documents.items():
        for category in _objects(document, "categories", parts[split]):
            names.setdefault(category.get("id", -1), str(category.get("name", "")))
    used = {
        entry.get("category_id")
        for split in documents
        for entry in _objects(documents[split], "annotations", parts[split])
    }
    ids = [one for one in sorted(names) if one in used] or sorted(names)  # skip gaps in COCO's ids
    places = {one: place for place, one in enumerate(ids)}
    found = {split: list(_coco_files(root, parts[split], document, places)) for split, document in documents.items()}
    return _listing(root, [names[one] for one in ids], found)


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(document, dict):
        raise DataError(
            f"{file}: must be COCO's object of images, annotations and categories, got a {type(document).__name__}"
        )
    return document


def _objects(document: Mapping[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{file}: {key}: must be a list of objects, as in COCO: export the annotations again")
    return found


def _coco_files(root: Path, file: Path, document: Mapping[str, Any], places: Mapping[int, int]) -> Iterator[BoxFile]:
    """Yield one annotation file's images, including those without a box."""
    images = _objects(document, "images", file)
    if not images:
        raise DataError(f"{file}: images: is empty: export the annotations again, with their images")
    rows: dict[Any, list[tuple[float, ...]]] = {entry.get("id"): [] for entry in images}
    sizes = {entry.get("id"): (entry.get("width"), entry.get("height")) for entry in images}
    for entry in _objects(document, "annotations", file):
        where = f"{file}: annotation {entry.get('id')}"
        image, category, box = entry.get("image_id"), entry.get("category_id", -1), entry.get("bbox")
        if image not in rows or category not in places:
            kind, value = ("image_id", image) if image not in rows else ("category_id", category)
            raise DataError(f"{where}: {kind}: no entry has the id {value!r:.40}: export the annotations again")
        numbers = [*box, *sizes[image]] if isinstance(box, list) else []
        if len(numbers) != 6 or not all(isinstance(one, int | float) for one in numbers) or min(numbers[4:]) <= 0:
            raise DataError(f"{where}: needs bbox as four numbers and its image's width and height, got {box!r:.60}")
        left, top, across, down, width, height = numbers
        corners = checked(where, (left, top, left + across, top + down), (width, height))
        if corners is not None:
            rows[image].append((places[int(category)], *corners, float(bool(entry.get("iscrowd", 0)))))
    folders = _image_folders(root, file)
    for entry in images:
        path = _within(root, folders, str(entry.get("file_name", "")), file)
        yield BoxFile(path, str(file.relative_to(root)), _table(rows[entry.get("id")]))


def _image_folders(root: Path, file: Path) -> list[Path]:
    """Return the folders where an annotation file's images may be, nearest first."""
    split = file.stem.rpartition("_")[2]
    return [file.parent, root / "images" / split, root / split, root / "images", root]


def _within(root: Path, folders: Sequence[Path], name: str, source: Path) -> str:
    for folder in folders:
        path = folder / name
        if name and path.is_file() and path.resolve().is_relative_to(root.resolve()):
            return str(path.relative_to(root))
    raise DataError(
        f"{source}: names the image {name!r:.80}, which does not exist: put it into {folders[-2]}, or remove its entry"
    )


# YOLO


def _yolo_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return each split's folders of images and labels: images/train and labels/train, train/images and train/labels, or images and labels."""
    pairs = [(path, root / YOLO / path.name) for path in root.glob("images/*/")]
    pairs += [(path, path.with_name(YOLO)) for path in root.glob("*/images/")]
    found = {}
    for images, labels in sorted(pairs, reverse=True):
        split = _split(images.name if images.parent.name == "images" else images.parent.name)
        if split and images.is_dir() and labels.is_dir():
            found[split] = (images, labels)
    if not found and (root / "images").is_dir() and (root / YOLO).is_dir():
        found["all"] = (root / "images", root / YOLO)
    return found


def _yolo(root: Path) -> BoxListing:
    splits = _yolo_splits(root)
    classes = _yolo_classes(root)
    return _listing(
        root, classes, {split: list(_yolo_files(root, *folders, len(classes))) for split, folders in splits.items()}
    )


def _yolo_classes(root: Path) -> list[str]:
    for name in ("classes.txt", f"{YOLO}/classes.txt", "obj.names"):
        if (root / name).is_file():
            return [line.strip() for line in (root / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    if (file := next(iter(sorted(root.glob("*.yaml"))), None)) is not None:
        text = file.read_text(encoding="utf-8")
        inline = re.search(r"^names:\s*\[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        if inline:
            return [name.strip().strip("'\"") for name in inline[1].split(",") if name.strip()]
        if block := re.search(r"^names:\s*\n((?:[ \t]*(?:-|\d+:).*\n?)+)", text, re.MULTILINE):
            return [
                re.sub(r"^\s*(?:-|\d+:)\s*", "", line).strip().strip("'\"")
                for line in block[1].splitlines()
                if line.strip()
            ]
    raise DataError(
        f"{root}: does not name its classes: write them into classes.txt, one per line in the order of their indices"
    )


def _yolo_files(root: Path, images: Path, labels: Path, classes: int) -> Iterator[BoxFile]:
    """Yield one split's images; an image without a label file has no box."""
    for image in sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES):
        file = labels / image.relative_to(images).with_suffix(".txt")
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = []
        for number, line in enumerate(lines, 1):
            where = f"{file}: line {number}"
            try:
                label, *numbers = (float(part) for part in line.split())
            except ValueError:
                raise DataError(f"{where}: must be `class x y width height`, got {line!r:.60}") from None
            if len(numbers) != 4:
                raise DataError(f"{where}: must be `class x y width height`, got {len(numbers) + 1} numbers")
            if not (label.is_integer() and 0 <= label < classes):
                raise DataError(f"{where}: names the class {label:g}, but there are {classes} (0 to {classes - 1})")
            x, y, across, down = numbers
            corners = checked(where, (x - across / 2, y - down / 2, x + across / 2, y + down / 2), (1, 1))
            if corners is not None:
                rows.append((label, *corners, 0.0))
        source = file if file.is_file() else image
        yield BoxFile(str(image.relative_to(root)), str(source.relative_to(root)), _table(rows))


# Pascal VOC


def _voc(root: Path) -> BoxListing:
    lists = {
        path.stem: path
        for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))
        if path.stem in (TRAIN, *VAL_NAMES)
    }
    parts = {"val" if name in ("valid", "validation") else name: _ids(path) for name, path in lists.items()}
    parts = parts or {"all": sorted(path.stem for path in (root / VOC).glob("*.xml"))}
    images = {path.stem: path for path in (root / "JPEGImages").glob("*") if path.suffix.lower() in SUFFIXES}
    objects = {one: _voc_objects(root / VOC / f"{one}.xml") for ids in parts.values() for one in ids}
    classes = sorted({name for found in objects.values() for name, _, _ in found})
    places = {name: place for place, name in enumerate(classes)}
    if missing := sorted(objects.keys() - images.keys()):
        raise DataError(
            f"{root / 'JPEGImages'}: has no image of {len(missing):,} annotations ({first(missing)}): add it or remove them"
        )
    files = {
        one: BoxFile(
            str(images[one].relative_to(root)),
            f"{VOC}/{one}.xml",
            _table([(places[name], *corners, crowd) for name, corners, crowd in found]),
        )
        for one, found in objects.items()
    }
    return _listing(root, classes, {split: [files[one] for one in ids] for split, ids in parts.items()})


def _ids(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _voc_objects(file: Path) -> list[tuple[str, tuple[float, ...], float]]:
    """Return an image's objects: class, box, and 1 if marked difficult, which are not judged."""
    try:
        content = file.read_bytes()
        if len(content) > MAX_XML or b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise DataError(f"{file}: must be a plain Pascal VOC file of at most {MAX_XML:,} bytes, without entities")
        tree = ElementTree.fromstring(content)
        size = tuple(float(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        boxes = [
            (
                one.findtext("name", "").strip(),
                [float(one.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")],
                float(one.findtext("difficult", "0") or 0),
            )
            for one in tree.iter("object")
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as Pascal VOC's XML ({error}): repair or remove it") from error
    if min(size) <= 0:
        raise DataError(
            f"{file}: size: must be the image's width and height, got {size[0]:g} x {size[1]:g}: write it there"
        )
    found = []
    for number, (name, corners, difficult) in enumerate(boxes, 1):
        where = f"{file}: object {number}"
        if (place := checked(where, corners, (size[0], size[1]))) is not None:
            found.append((name, place, difficult))
    return found
