"""List images with the boxes of COCO's JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from export.errors import DataError, first
from export.images.box_listing import (
    ALL,
    BoxFile,
    BoxListing,
    Drawn,
    checked,
    listing_of,
    other_encoding,
    split_of,
    used_splits,
)
from export.images.listing import TRAIN

FOLDER = "annotations"
INSTANCES = "instances"  # how COCO's own files of boxes begin; captions and key points lie beside them
Id = str | int | float


class Document(NamedTuple):
    """A file of annotations and its content."""

    file: Path
    content: Mapping[str, Any]

    def objects(self, key: str) -> list[dict[str, Any]]:
        """Return one of its lists of objects."""
        found = self.content.get(key)
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise DataError(f"{self.file}: {key}: must be a list of objects, as in COCO: export the annotations again")
        return found


def coco_files(root: Path) -> list[Path]:
    """Return the JSON files that may have boxes, none for another layout."""
    found = {*root.glob("*.json"), *root.glob(f"{FOLDER}/*.json"), *root.glob("*/*.coco.json")}
    return sorted(file for file in found if not file.name.startswith("."))


def list_coco(root: Path, files: Sequence[Path]) -> BoxListing:
    """List the images of annotation files; their names, or else their folders', say the split. Categories match by name."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        folder = "" if file.parent == root else file.parent.name
        groups.setdefault(split_of(file.stem) or split_of(folder) or ALL, []).append(file)
    unnamed = groups.pop(ALL) if len(groups) > 1 and ALL in groups else []
    groups, notes = used_splits(root, groups)
    documents = {split: _document(root, group) for split, group in groups.items()}
    chosen = {document.file for document in documents.values()}
    if aside := {file for group in (unnamed, *groups.values()) for file in group} - chosen:
        names = [first(sorted(str(file.relative_to(root)) for file in some), 3) for some in (chosen, aside)]
        notes.append(f"{root}: boxes are read from {names[0]}, not from {names[1]}")
    categories = {split: _categories(document) for split, document in documents.items()}
    parts = {split: _files(root, document, categories[split]) for split, document in documents.items()}
    used = {one.label for part in parts.values() for file in part for one in file.drawn}
    if TRAIN in parts and (unknown := sorted(used - {*categories[TRAIN].values()})):
        names = [str(documents[split].file) for split in documents]
        raise DataError(
            f"{names[-1]}: has boxes of {first(unknown)}, a category that {names[0]} lacks: add it or remove them"
        )
    classes = list(dict.fromkeys(name for each in categories.values() for name in each.values()))
    return listing_of(root, [name for name in classes if name in used] or classes, parts, notes)  # COCO's ids have gaps


def _document(root: Path, group: Sequence[Path]) -> Document:
    """Return the file of a split that has boxes."""
    files = [file for file in group if file.stem.startswith(INSTANCES)] or group
    found = [(file, _json(file)) for file in files]
    if len(found) > 1:
        found = [(file, content) for file, content in found if _has_boxes(content)]
    if len(found) != 1:
        names = first([str(file.relative_to(root)) for file in files])
        raise DataError(
            f"{root}: {len(found)} of {names} have boxes: keep one for all images, or name one after train and one after val"
        )
    ((file, content),) = found
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{file}: must be COCO's object of images, annotations and categories, got a {kind}")
    return Document(file, content)


def _has_boxes(content: object) -> bool:
    """Tell whether any annotation has a box of a category."""
    entries = content.get("annotations") if isinstance(content, dict) else None
    return isinstance(entries, list) and any(
        isinstance(entry, dict) and entry.get("bbox") and "category_id" in entry for entry in entries
    )


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise other_encoding(file, error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}): fetch it again") from error


def _categories(document: Document) -> dict[Id, str]:
    """Return the categories' names in the order of their ids, numbers before texts."""
    names = dict[Id, str]()
    where = f"{document.file}: categories"
    for entry in document.objects("categories"):
        number, name = _id(where, entry, "id"), entry.get("name")
        if not isinstance(name, str | int):
            raise DataError(f"{where}: the id {number!r:.40} needs a name, got {name!r:.40}: write it there")
        if names.setdefault(number, str(name)) != str(name):
            raise DataError(f"{where}: the id {number!r:.40} is {names[number]:.80} and {name:.80}: give each its own")
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _files(root: Path, document: Document, names: Mapping[Id, str]) -> list[BoxFile]:
    """Return one document's images, including those without a box."""
    file, images = document.file, document.objects("images")
    if not images:
        raise DataError(f"{file}: images: is empty: export the annotations again, with their images")
    entries = dict[Id, dict[str, Any]]()
    for entry in images:
        if (other := entries.setdefault(_id(f"{file}: images", entry, "id"), entry)) is not entry:
            both = f"{other.get('file_name')!r:.80} and {entry.get('file_name')!r:.80}"
            raise DataError(f"{file}: images: {both} have the same id {entry['id']!r:.40}: give each its own")
    sizes = {number: _size(entry) for number, entry in entries.items()}
    drawn: dict[Id, list[Drawn]] = {number: [] for number in entries}
    ids = dict[str, Id]()
    for entry in document.objects("annotations"):
        where = f"{file}: annotation {entry.get('id')!r:.40}"
        image, category = (_id(where, entry, key) for key in ("image_id", "category_id"))
        if image not in entries or category not in names:
            kind, value = ("image_id", image) if image not in entries else ("category_id", category)
            raise DataError(f"{where}: {kind}: no entry has the id {value!r:.40}: export the annotations again")
        if ids.setdefault(name := names[category], category) != category:
            both = f"{ids[name]!r:.40} and {category!r:.40}"
            raise DataError(f"{file}: categories: {both} are both called {name:.80}: merge or rename them")
        drawn[image].append(_drawn(where, entry, name, sizes[image]))
    folders = _image_folders(root, file)
    source = str(file.relative_to(root))
    return [
        BoxFile(_within(root, folders, entry.get("file_name"), file), source, sizes[number], drawn[number])
        for number, entry in entries.items()
    ]


def _id(where: str, entry: Mapping[str, Any], key: str) -> Id:
    found = entry.get(key)
    if isinstance(found, bool) or not (
        isinstance(found, str | int) or (isinstance(found, float) and math.isfinite(found))
    ):
        raise DataError(f"{where}: {key}: must be a number or a text, got {found!r:.40}: export the annotations again")
    return found


def _drawn(where: str, entry: Mapping[str, Any], name: str, size: tuple[float, float] | None) -> Drawn:
    """Return an annotation's box."""
    box, crowd = entry.get("bbox"), entry.get("iscrowd") or 0
    numbers = _numbers(box) if isinstance(box, list) else []
    if len(numbers) != 4:
        raise DataError(f"{where}: needs bbox as four numbers, got {box!r:.60}: export the annotations again")
    if size is None:
        raise DataError(
            f"{where}: its image {entry['image_id']!r:.40} needs a width and a height above 0: write them there"
        )
    if crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd: must be 0 or 1, got {crowd!r:.40}: correct it")
    left, top, across, down = numbers
    return Drawn(name, checked(where, (left, top, left + across, top + down), size), bool(crowd))


def _size(image: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return an image's width and height, None if it has none."""
    found = _numbers([image.get("width"), image.get("height")])
    return (found[0], found[1]) if len(found) == 2 and all(0 < side < math.inf for side in found) else None


def _numbers(values: Sequence[object]) -> list[float]:
    """Return the values if all are numbers, infinity for those too large for one."""
    try:
        return [float(value) for value in values if isinstance(value, int | float)]
    except OverflowError:
        return [math.inf] * len(values)


def _image_folders(root: Path, file: Path) -> list[Path]:
    """Return the folders where an annotation file's images may be, nearest first."""
    split = file.stem.rpartition("_")[2]
    return [file.parent, root / "images" / split, root / split, root / "images", root]


def _within(root: Path, folders: Sequence[Path], name: object, source: Path) -> str:
    """Return the path of the image with this name, relative to the root."""
    for path in (folder / name for folder in folders if isinstance(name, str) and name):
        try:
            if path.is_file() and path.resolve().is_relative_to(root.resolve()):
                return os.path.relpath(path, root)
        except OSError:  # a name that no file can have
            continue
    raise DataError(
        f"{source}: names the image {name!r:.80}, which does not exist: put it into {folders[-2]}, or remove its entry"
    )
