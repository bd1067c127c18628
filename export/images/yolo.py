"""List images with the boxes of YOLO's text files."""

import re
from collections.abc import Iterator
from pathlib import Path

from export.errors import DataError
from export.images.box_listing import BoxFile, BoxListing, checked, listing_of, split_of, table
from export.images.folders import SUFFIXES

YOLO = "labels"


def yolo_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return each split's folders of images and labels: images/train and labels/train, train/images and train/labels, or images and labels."""
    pairs = [(path, root / YOLO / path.name) for path in root.glob("images/*/")]
    pairs += [(path, path.with_name(YOLO)) for path in root.glob("*/images/")]
    found = {}
    for images, labels in sorted(pairs, reverse=True):
        split = split_of(images.name if images.parent.name == "images" else images.parent.name)
        if split and images.is_dir() and labels.is_dir():
            found[split] = (images, labels)
    if not found and (root / "images").is_dir() and (root / YOLO).is_dir():
        found["all"] = (root / "images", root / YOLO)
    return found


def list_yolo(root: Path) -> BoxListing:
    """List the images of a folder with label files."""
    splits = yolo_splits(root)
    classes = _yolo_classes(root)
    return listing_of(
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
        yield BoxFile(str(image.relative_to(root)), str(source.relative_to(root)), table(rows))
