"""List images with the boxes of Pascal VOC's XML."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from export.errors import DataError, first
from export.images.box_listing import BoxFile, BoxListing, checked, listing_of, table
from export.images.folders import SUFFIXES, TRAIN, VAL_NAMES

VOC = "Annotations"
MAX_XML = 1_000_000  # bytes of one image's file


def list_voc(root: Path) -> BoxListing:
    """List the images of a folder with an XML file each."""
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
            table([(places[name], *corners, crowd) for name, corners, crowd in found]),
        )
        for one, found in objects.items()
    }
    return listing_of(root, classes, {split: [files[one] for one in ids] for split, ids in parts.items()})


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
