"""Find the images of a folder data set, their classes and their split; nothing is decoded here, and no torch is imported."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from compress.errors import DataError

# Suffixes that name an image. Some are formats the decoder refuses: better an error than a photograph silently left out.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2")
VAL_NAMES = ("val", "valid", "validation", "test")
ANNOTATIONS = "val_annotations.txt"
NAMED = 5  # classes that an error names; the rest are counted

File = tuple[str, int]
"""A path relative to the data set's root, and its class."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder data set, in the order of their paths; `val` is None where the folder brings no validation set."""

    root: Path
    classes: tuple[str, ...]
    train: tuple[File, ...]
    val: tuple[File, ...] | None


def list_folder(root: Path) -> Listing:
    """List an ImageNet layout (train/ with val/, valid/, validation/ or test/), Tiny-ImageNet's own, or one folder of class folders.

    Raises `DataError` for a missing folder, a class without images, a class in validation that training lacks, and other layouts.
    """
    check_folder(root)
    parts = {name for name in _subfolders(root) if name in ("train", *VAL_NAMES)}
    if not parts:
        _refuse_nested(root)
        classes = _classes(root)
        return Listing(root, classes, _files(root, root, classes), None)
    if "train" not in parts:
        raise DataError(
            f"{root}: has {'/, '.join(sorted(parts))}/ but no train/; training images belong in {root / 'train'}/<class>/"
        )
    classes = _classes(root / "train")
    train = _files(root, root / "train", classes)
    held_out = next((root / name for name in VAL_NAMES if name in parts), None)
    if held_out is None:
        return Listing(root, classes, train, None)
    if (held_out / ANNOTATIONS).is_file():
        return Listing(root, classes, train, _annotated(root, held_out, classes))
    val_classes = _classes(held_out)
    _refuse_unknown(held_out, val_classes, classes)
    labels = {name: label for label, name in enumerate(classes)}
    val = tuple((path, labels[val_classes[label]]) for path, label in _files(root, held_out, val_classes))
    return Listing(root, classes, train, val)


def check_folder(root: Path) -> None:
    """Raise `DataError` unless `root` is a folder; name a sibling that looks like it."""
    if root.is_dir():
        return
    if root.exists():
        raise DataError(
            f"{root}: is a file, not a folder; unpack it and give the folder that holds train/ or the class folders"
        )
    ancestor = next(parent for parent in root.absolute().parents if parent.is_dir())
    wanted = root.absolute().relative_to(ancestor).parts[0]
    near = difflib.get_close_matches(wanted, _subfolders(ancestor), n=1)
    hint = f"did you mean {ancestor / near[0]}?" if near else "give DATA=/path/to/images"
    raise DataError(f"{root}: there is no such folder; {hint}")


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}; check its permissions") from error


def _refuse_nested(root: Path) -> None:
    for name in _subfolders(root):
        if (root / name / "train").is_dir():
            raise DataError(f"{root}: holds no train/ itself, but {root / name} does; give that folder")


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(_subfolders(folder))
    if len(classes) < 2:
        loose = len(_images(folder, folder))
        found = f"one class folder ({classes[0]})" if classes else f"{loose:,} images and no class folder"
        raise DataError(
            f"{folder}: has {found}; give each class a folder of its own with its images, two classes at least"
        )
    return classes


def _files(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[File, ...]:
    files: list[File] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = _images(root, folder / name)
        files += ((path, label) for path in found)
        if not found:
            empty.append(name)
    if empty:
        raise DataError(
            f"{folder}: {_count(empty, 'class folder')} without an image: {_first(empty)}; add images or remove the folder"
        )
    return tuple(files)


def _images(root: Path, folder: Path) -> list[str]:
    """Return the images under a class folder, at any depth (Tiny-ImageNet keeps them in images/), sorted."""
    found = []
    for parent, _, names in os.walk(folder):
        prefix = os.path.relpath(parent, root)
        found += [f"{prefix}/{name}" for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _annotated(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[File, ...]:
    """Read Tiny-ImageNet's validation set: one line `file<TAB>class<TAB>box` for each image in images/."""
    labels = {name: label for label, name in enumerate(classes)}
    rows = [
        line.split("\t")
        for line in (folder / ANNOTATIONS).read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    odd = next((row for row in rows if len(row) < 2 or Path(row[0]).name != row[0]), None)
    if odd is not None:
        raise DataError(
            f"{folder / ANNOTATIONS}: {odd[0]!r} is not `file<TAB>class`; copy the file anew from Tiny-ImageNet"
        )
    _refuse_unknown(folder, tuple(sorted({row[1] for row in rows})), classes)
    inside = os.path.relpath(folder / "images", root)
    files = tuple(sorted((f"{inside}/{row[0]}", labels[row[1]]) for row in rows))
    if not files:
        raise DataError(f"{folder / ANNOTATIONS}: names no image; copy the file anew from Tiny-ImageNet")
    return files


def _refuse_unknown(folder: Path, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{folder}: {_count(unknown, 'class')} that training lacks: {_first(unknown)}; "
            "add training images for it or remove it from validation"
        )


def _count(names: list[str], noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{len(names):,} {noun}{'' if len(names) == 1 else plural}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
