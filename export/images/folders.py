"""Find the images of a folder, their classes and their split, without opening any; the rules are in docs/images.md."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.errors import DataError, first, nearest
from export.images.listing import TRAIN, VAL_NAMES, SplitListing, check_lengths, count, is_label

# Suffixes of images. The decoder refuses some of these formats: better an error than a photograph silently left out.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".tga"),
)
SHARDS = (".tar", ".arrow", ".parquet")  # only training reads these
# Folders that archives, network drives and file systems add; hidden names are ignored too.
IGNORED_NAMES = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
GROUPED = 0.8  # a subfolder in this fraction of the class folders may be a class
ANNOTATIONS = "val_annotations.txt"

File = tuple[str, int]
"""A path relative to the data set's root, and its class."""


@dataclass(frozen=True)
class FolderListing(SplitListing[int]):
    """Images with one class each, the folder that they lie in."""

    fewest = 2
    where = "{root}/{part}/<class>/"


def list_folder(root: Path) -> FolderListing:
    """List an ImageNet layout (train/ with val/, valid/, validation/ or test/), Tiny-ImageNet's layout, or one folder of class folders.

    Raises DataError for a missing folder, a class without images, a class that only validation has, class folders that may be
    groups of classes, and other layouts.
    """
    check_folder(root)
    parts = _splits(root)
    if not parts:
        _refuse_other_layouts(root)
        classes = _classes(root)
        return FolderListing(root, classes, _files(root, root, classes), None)
    held_out = next((parts[name] for name in VAL_NAMES if name in parts), None)
    if TRAIN not in parts:
        assert held_out is not None
        classes = _classes(held_out)
        return FolderListing(root, classes, (), _files(root, held_out, classes))
    classes = _classes(parts[TRAIN])
    train = _files(root, parts[TRAIN], classes)
    if held_out is None:
        return FolderListing(root, classes, train, None)
    if (held_out / ANNOTATIONS).is_file():
        return FolderListing(root, classes, train, _annotated(root, held_out, classes))
    val_classes = _classes(held_out)
    _refuse_unknown(held_out, val_classes, classes)
    labels = {name: label for label, name in enumerate(classes)}
    val = tuple((path, labels[val_classes[label]]) for path, label in _files(root, held_out, val_classes))
    return FolderListing(root, classes, train, val)


def image_splits(root: Path) -> tuple[list[str], list[str] | None]:
    """Return the training images below a folder, whatever its subfolders are called, and those of its validation split, if any."""
    check_folder(root)
    parts = {name.lower(): root / name for name in _subfolders(root) if name.lower() in (TRAIN, *VAL_NAMES)}
    held_out = next((parts[name] for name in VAL_NAMES if name in parts), None)
    if TRAIN not in parts or held_out is None:
        return images_in(root, root), None
    return images_in(root, parts[TRAIN]), images_in(root, held_out)


def check_folder(root: Path) -> None:
    """Raise DataError unless `root` is a folder, suggesting a similar name."""
    if root.is_dir():
        return
    if root.exists():
        raise DataError(
            f"{root}: is a file, not a folder; unpack it and give the folder with train/ or the class folders"
        )
    ancestor = next(parent for parent in root.absolute().parents if parent.is_dir())
    wanted = root.absolute().relative_to(ancestor).parts[0]
    near = nearest(wanted, _subfolders(ancestor))
    hint = f"did you mean {ancestor / near}?" if near else "give another with --data (DATA= under make)"
    raise DataError(f"{root}: there is no such folder; {hint}")


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_NAMES


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not _is_ignored(entry.name))
    except OSError as error:
        raise _unreadable(error, folder) from error


def _splits(root: Path) -> dict[str, Path]:
    """Return the split folders by their lower-case names.

    A class may be called train or test too: beside other folders, they are a split only if one of them has subfolders.
    """
    folders = _subfolders(root)
    found = {name.lower(): root / name for name in folders if name.lower() in (TRAIN, *VAL_NAMES)}
    if len(found) < len(folders) and not any(_subfolders(path) for path in found.values()):
        return {}
    return found


def _refuse_other_layouts(root: Path) -> None:
    """Raise DataError if the data set is one folder deeper, or the folders are a split under other names."""
    folders = _subfolders(root)
    for name in folders:
        if (root / name / TRAIN).is_dir():
            raise DataError(f"{root}: has no {TRAIN}/, but {root / name} has; give that folder")
    like = [[name for name in folders if word in name.lower()] for word in ("train", "test", "val")]
    if like[0] and (like[1] or like[2]) and all(_subfolders(root / name) for name in folders):
        raise DataError(
            f"{root}: {first(folders)} look like a split, not like classes; name them {TRAIN} and {VAL_NAMES[0]}"
        )


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(_subfolders(folder))
    if not classes:
        if any(path.suffix in SHARDS for path in folder.iterdir()):
            raise DataError(
                f"{folder}: has shards, which only training can read; here give a folder of class folders "
                "(`compress export-data RUN DIR` writes a run's validation images as one)"
            )
        loose = len(images_in(folder, folder))
        raise DataError(
            f"{folder}: has {loose:,} images and no class folder; put each class's images into a folder of its own"
        )
    if odd := [name for name in classes if not is_label(name)]:
        raise DataError(f"{folder}: class folder {odd[0]!r}: must be one printable line; rename it")
    check_lengths(folder, classes)
    return classes


def _files(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[File, ...]:
    files: list[File] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = images_in(root, folder / name)
        files += ((path, label) for path in found)
        if not found:
            empty.append(name)
    if empty:
        raise DataError(
            f"{folder}: {count(empty, 'class folder')} without an image: {first(empty)}; add images or remove the folder"
        )
    _refuse_groups(root, folder, classes, files)
    return tuple(files)


def _refuse_groups(root: Path, folder: Path, classes: tuple[str, ...], files: Sequence[File]) -> None:
    """Raise DataError where the class folders may be groups of class folders, as years or cameras are.

    They have no images of their own, and at least two subfolders in common: one alone may be Tiny-ImageNet's images/.
    """
    depth = len(Path(os.path.relpath(folder / classes[0], root)).parts)
    within: list[set[str]] = [set() for _ in classes]
    for path, label in files:
        below = path.split("/", depth + 1)[depth:]
        if len(below) == 1:
            return
        within[label].add(below[0])
    shared = Counter(name for names in within for name in names)
    common = sorted(name for name, times in shared.items() if times >= GROUPED * len(classes))
    if len(classes) > 1 and len(common) > 1:
        raise DataError(
            f"{folder}: {first(classes)} have no images of their own but the same subfolders ({first(common)}), so either may "
            f"be the classes: if {common[0]} is one, gather its images in one folder {common[0]}; if {classes[0]} is, move "
            f"its images up into {folder / classes[0]}"
        )


def images_in(root: Path, folder: Path) -> list[str]:
    """Return the images below a class folder, at any depth (Tiny-ImageNet keeps them in images/), sorted.

    Links are followed, except to a parent folder, and no folder is listed twice.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error, folder) from error

    found = []
    seen = {_identity(parent) for parent in folder.resolve().parents}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (identity := _identity(parent)) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not _is_ignored(name))
        prefix = os.path.relpath(parent, root)
        found += [f"{prefix}/{name}" for name in names if name.lower().endswith(SUFFIXES) and not _is_ignored(name)]
    return sorted(found)


def _identity(folder: Path | str) -> tuple[int, int]:
    found = Path(folder).stat()
    return found.st_dev, found.st_ino


def _unreadable(error: OSError, folder: Path) -> DataError:
    return DataError(f"{error.filename or folder}: cannot be listed: {error.strerror}; check its permissions")


def _annotated(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[File, ...]:
    """Read Tiny-ImageNet's validation set: a line `file<TAB>class<TAB>box` for each image in images/."""
    labels = {name: label for label, name in enumerate(classes)}
    rows = [
        line.split("\t")
        for line in (folder / ANNOTATIONS).read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    odd = next((row for row in rows if len(row) < 2 or Path(row[0]).name != row[0]), None)
    if odd is not None:
        raise DataError(
            f"{folder / ANNOTATIONS}: {odd[0]!r} is not `file<TAB>class`; copy the file again from Tiny-ImageNet"
        )
    _refuse_unknown(folder, tuple(sorted({row[1] for row in rows})), classes)
    inside = os.path.relpath(folder / "images", root)
    files = tuple(sorted((f"{inside}/{row[0]}", labels[row[1]]) for row in rows))
    if not files:
        raise DataError(f"{folder / ANNOTATIONS}: names no images; copy the file again from Tiny-ImageNet")
    return files


def _refuse_unknown(folder: Path, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{folder}: {count(unknown, 'class')} that training lacks: {first(unknown)}; "
            "add training images for it or remove it from validation"
        )
