"""Index the images of shards by their place in them, and read an image by its place.

With the index any image takes a single read, so shards work as files do for views, cached logits and resumed runs.
Imports no torch.
"""

import hashlib
import importlib
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compress.data.shard_files import Found, scan_shard, seekable
from export.command.files import writing
from export.errors import DataError
from export.images.decode import BrokenImage
from export.images.folders import SHARDS
from export.images.listing import TRAIN, VAL_NAMES, check_lengths, is_label

INDEX, CLASSES = "index.npz", "classes.txt"
VERSION = 1  # of the index
PART = re.compile(rf"(?:^|[/_.-])({'|'.join((TRAIN, *VAL_NAMES))})(?=[/_.-])")


@dataclass(frozen=True)
class Rows:
    """The places of n images: name, shard, offset and length in bytes; and the label."""

    names: NDArray[np.bytes_]
    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: NDArray[Any]) -> "Rows":
        return Rows(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class ShardListing:
    """The images of a folder of shards, in their order there; `places` are the shards' paths or URLs.

    `val` is None where no shard's name marks a validation set.
    """

    root: Path
    places: tuple[str, ...]
    classes: tuple[str, ...]
    train: Rows
    val: Rows | None
    notes: ClassVar[tuple[str, ...]] = ()
    fewest: ClassVar[int] = 2

    def place(self, part: str) -> str:
        """Return where the images of a split belong."""
        return f"{self.root / part}-*.tar"

    def names(self) -> list[str]:
        """Return the paths of all shards."""
        return [*self.places]

    def decisive(self) -> dict[str, object]:
        """Return what decides the data besides the classes' names and the files' content: nothing."""
        return {"labels": None}


def shard_files(root: Path) -> list[str]:
    """Return the paths of a folder's shards, in it or in folders of its parts, and of its classes.txt.

    For shards behind URLs it is their index; for any other folder the list is empty.
    """
    if not root.is_dir():
        return []
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if all(folder.name.lower() in (TRAIN, *VAL_NAMES, "data") for folder in folders):  # class folders may be huge
        found = [_shards_of(folder) for folder in (root, *folders)]
        if any(found) and all(found[1:]):
            named = [root / CLASSES] if (root / CLASSES).is_file() else []
            return [str(file.relative_to(root)) for file in (*chain.from_iterable(found), *named)]
    return [INDEX] if (root / INDEX).is_file() else []


def _shards_of(folder: Path) -> list[Path]:
    """Return the shards in a folder, without the files that `datasets` caches there."""
    found = (path for path in folder.iterdir() if path.suffix in SHARDS and not path.name.startswith((".", "cache-")))
    return sorted(found)


def list_shards(root: Path, digests: Mapping[str, str], memory: Path) -> ShardListing:
    """List the shards with these digests, from the index beside them or in `memory`; write one there if neither fits.

    Raises DataError for shards that are empty or truncated, and for images without a label or with the same name.
    """
    kept = memory / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
    for file in (root / INDEX, kept):
        if (index := _load(file)) and (INDEX in digests or (_digests(index) == digests and _is_here(root, index))):
            return _listing(root, index)
    if INDEX in digests:
        raise DataError(f"{root / INDEX}: is no index of this version; make it again with compress shards URL DIR")
    files = [name for name in digests if name != CLASSES]
    seen = [seekable(root / name, memory, digests[name]) for name in files]
    index = index_of(root, digests, [os.path.relpath(file, root) for file in seen], [scan_shard(file) for file in seen])
    memory.mkdir(parents=True, exist_ok=True)
    save_index(kept, index)
    return _listing(root, index)


def save_index(file: Path, index: Mapping[str, NDArray[Any]]) -> None:
    """Write an index, complete or not at all."""
    with writing(file) as stream:
        np.savez(stream, allow_pickle=False, **index)


def index_of(
    root: Path, digests: Mapping[str, str], places: Sequence[str], found: Sequence[Found]
) -> dict[str, NDArray[Any]]:
    """Return the index of shards: their images, their places (paths from `root`, or URLs), and every file's digest."""
    classes, labels = _classes(root, found)
    files = [name for name in digests if name != CLASSES]
    names = [b"%s/%s" % (os.fsencode(file), name) for file, one in zip(files, found, strict=True) for name in one.names]
    return {
        "version": np.array(VERSION),
        "files": np.array(list(digests)),
        "sha256": np.array(list(digests.values())),
        "places": np.array(places),
        "classes": np.array(classes),
        "names": np.array(names, np.bytes_),
        "shards": np.repeat(np.arange(len(found), dtype=np.int32), [len(one.names) for one in found]),
        "offsets": np.concatenate([one.offsets for one in found]),
        "lengths": np.concatenate([one.lengths for one in found]),
        "labels": labels,
    }


def _digests(index: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    return dict(zip(index["files"].tolist(), index["sha256"].tolist(), strict=True))


def _is_here(root: Path, index: Mapping[str, NDArray[Any]]) -> bool:
    return all((root / place).exists() for place in index["places"].tolist())


def _load(file: Path) -> dict[str, NDArray[Any]] | None:
    """Return the index in a file, None where there is none of this version."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            index = dict(archive)
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return index if index.get("version") == VERSION else None


def _listing(root: Path, index: Mapping[str, NDArray[Any]]) -> ShardListing:
    rows = Rows(*(index[field.name] for field in fields(Rows)))
    files = [name for name in index["files"].tolist() if name != CLASSES]
    parts = [found[1] if (found := PART.search(name.lower())) else TRAIN for name in files]
    held_out = next((name for name in VAL_NAMES if name in parts), None)
    train, val = (
        rows[np.isin(rows.shards, [i for i, one in enumerate(parts) if one == part])] for part in (TRAIN, held_out)
    )
    places = tuple(place if "://" in place else str(root / place) for place in index["places"].tolist())
    return ShardListing(root, places, tuple(index["classes"].tolist()), train, val if held_out else None)


def _classes(root: Path, found: Sequence[Found]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the classes' names and every image's class; names are the shards', else those in classes.txt, else numbers."""
    labels = np.concatenate([one.labels for one in found])
    if labels.dtype.kind != "i":
        found_names, labels = np.unique(labels, return_inverse=True)
        check_lengths(root, found_names.tolist())
        return found_names.tolist(), labels
    own = {one.classes for one in found if one.classes}
    if len(own) > 1:
        raise DataError(f"{root}: its shards have different class names; give shards of one data set")
    listed = (root / CLASSES).read_text(encoding="utf-8").split("\n") if (root / CLASSES).is_file() else []
    names = list(*own) or [line for line in map(str.strip, listed) if line] or list(map(str, range(labels.max() + 1)))
    if not 0 <= labels.min() <= labels.max() < len(names):
        raise DataError(
            f"{root}: labels must be from 0 to {len(names) - 1}, one for each class, got {labels.min()} to {labels.max()}"
        )
    if len(set(names)) < len(names) or not all(map(is_label, names)):
        raise DataError(f"{root / CLASSES}: must name one class a line, each once, in the order of the labels")
    check_lengths(root, names)
    return names, labels


class _Open:
    """An open file, closed when no thread uses it any more: the cache may drop it while another thread reads."""

    def __init__(self, place: str) -> None:
        self.number = os.open(place, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=256)  # a process may usually have 1,024 files open
def _opened(place: str) -> _Open:
    return _Open(place)


def read_bytes(place: str, offset: int, length: int) -> bytes:
    """Return an image's bytes from its shard, a path or URL. Raises BrokenImage where they cannot be read."""
    try:
        if "://" in place:
            system, path = importlib.import_module("fsspec").core.url_to_fs(place)
            found: bytes = system.cat_file(path, start=offset, end=offset + length)
        else:
            file = _opened(place)  # kept until it is read: of two threads' first files the cache drops one
            found = os.pread(file.number, length, offset)
    except (OSError, ImportError) as error:
        raise BrokenImage(getattr(error, "strerror", None) or str(error)) from error
    if len(found) != length:  # the file is too short, or its server ignores ranges
        raise BrokenImage(f"its shard returned {len(found):,} bytes instead of {length:,}")
    return found
