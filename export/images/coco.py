"""List images with the boxes of COCO's JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.errors import DataError
from export.images.box_listing import BoxFile, BoxListing, checked, listing_of, split_of, table

COCO = "annotations"


def list_coco(root: Path, files: Sequence[Path]) -> BoxListing:
    """List the images of annotation files, each split in its own."""
    named = {split: file for file in reversed(files) if (split := split_of(f"{file.parent.name} {file.stem}"))}
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
    return listing_of(root, [names[one] for one in ids], found)


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
        yield BoxFile(path, str(file.relative_to(root)), table(rows[entry.get("id")]))


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
