"""A data set's digest, from the content of its files; decodes no image and imports no torch."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from compress.data.named import DATA_SETS, FASHION_MNIST
from compress.data.settings import DataSettings
from compress.data.shards import list_shards, shard_files
from compress.logs.stage_log import clock
from compress.ranks import rank
from export.command.digest_memory import digests_of
from export.errors import DataError, first
from export.images.folders import FolderListing, check_folder, images_in, list_folder
from export.images.listing import TRAIN, count
from export.images.preprocess import Look
from export.images.size import written
from export.tasks import TASKS
from export.tasks.listing import Listing

L = TypeVar("L", bound=Listing)
FILES = "images.json"  # in a source's artifact: digests of the files that it was made from
NOTES = "data-notes.json"  # and there the data set's `notes`
# The artifact key covers the task and the unlabelled images; `ignore_index` counts only where it is set.
UNDECIDING = ("task", "ignore_index", "unlabelled")
NEWER = {"stretch": False, "look": asdict(Look())}  # settings that count only where they differ from these
PATIENCE_S = 2  # progress is shown when reading files takes longer
VERSION = 3  # raise it when images become other tensors: every cached stage then runs again


@dataclass(frozen=True)
class Given:
    """The listing of a data set's folder (None unless an `imagefolder`), and the digest of every readable file by path."""

    listing: Listing | None
    digests: dict[str, str]


def given(settings: DataSettings) -> Given:
    """List a data set's files with their digests; downloaded data sets have none, as the download is checked.

    Raises DataError where the folder cannot be used.
    """
    if settings.name == "imagefolder":
        if settings.path is None:
            raise DataError("imagefolder: needs a folder: give DATA=/path/to/images, or set data.path")
        if (shards := shards_in(settings.path, settings.memory)) is not None:
            return shards
        listing = trainable(TASKS[settings.task].listing(settings.path))
        return Given(listing, _digests(listing.root, listing.names(), settings.memory))
    if settings.name == "fashion_mnist" and settings.path is not None:  # may be another data set in its format
        return Given(None, _digests(settings.path, FASHION_MNIST, settings.memory))
    return Given(None, {})


def given_unlabelled(settings: DataSettings) -> dict[str, str]:
    """Return the digest of every unlabelled image by absolute path. Raises DataError where the folder holds none."""
    if settings.unlabelled is None:
        return {}
    check_folder(settings.unlabelled)
    root = settings.unlabelled.resolve()
    names = images_in(root, root)
    if not names:
        raise DataError(f"{root}: holds no image: give data.unlabelled another folder, or leave it out")
    return {str(root / name): digest for name, digest in _digests(root, names, settings.memory).items()}


def unlabelled_digest(settings: DataSettings) -> str:
    """Return a sha256 over the content of the unlabelled images, without their paths."""
    return hashlib.sha256(json.dumps(sorted(given_unlabelled(settings).values())).encode()).hexdigest()


def shards_in(root: Path, memory: Path) -> Given | None:
    """Return the listing and digests of a folder of shards, None for another folder."""
    if not (files := shard_files(root)):
        return None
    digests = _digests(root, files, memory)
    return Given(trainable(list_shards(root, digests, memory)), digests)


def dataset_digest(settings: DataSettings, found: Given) -> str:
    """Return a sha256 over everything that decides pixels and split: the settings, and each file's path, class and content.

    The folder's own path does not count, nor do the unlabelled images: a source does not see them.
    """
    listing = found.listing
    content = {
        **{
            name: value
            for name, value in asdict(settings).items()
            if name not in UNDECIDING and NEWER.get(name) != value
        },
        **({} if settings.ignore_index is None else {"ignore_index": settings.ignore_index}),
        "version": VERSION,
        "image_size": written(settings.size),
        "path": None,
        "memory": None,
        "classes": listing and listing.classes,
        "files": found.digests,
        **({"labels": None} if listing is None else listing.decisive()),
    }
    if not settings.tuning:
        del content["tuning"]  # keys made before the setting existed stay valid
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def images_digest(settings: DataSettings) -> str:
    """Return what identifies all images of a run: its data set's digest and, if there are any, its unlabelled images'."""
    digest = dataset_digest(settings, given(settings))
    return digest if settings.unlabelled is None else f"{digest}-{unlabelled_digest(settings)}"


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return a phrase for the files that changed, are new or are gone, by their digests; empty where all are the same."""
    groups = {
        "changed": [name for name, digest in now.items() if before.get(name, digest) != digest],
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
    }
    return "; ".join(f"{count(names, 'file')} {change} ({first(names)})" for change, names in groups.items() if names)


def _digests(root: Path, names: Sequence[str], memory: Path) -> dict[str, str]:
    names = [name for name in names if os.access(root / name, os.R_OK)]
    file = memory / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    try:
        found = digests_of(root, names, memory=file, progress=_reporter(root, len(names)))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; repair or remove it") from error
    return {name: digest[:16] for name, digest in found.items()}


def _reporter(root: Path, total: int) -> Callable[[int], None]:
    """Return a function that shows on stderr how many files are read, once that takes longer than PATIENCE_S."""
    live = sys.stderr.isatty()
    started_s = shown_s = time.monotonic()

    def report(done: int) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        spent_s, due, finished = now_s - started_s, now_s - shown_s > (0.25 if live else 30), done == total
        if spent_s < PATIENCE_S or not (due or finished) or rank() != 0:
            return
        shown_s = now_s
        state = f"in {clock(spent_s)}" if finished else f"so far, {clock(spent_s / done * (total - done))} left"
        line = f"{root}: {done:,} of {total:,} files read {state}"
        sys.stderr.write(f"\r\033[K{line}" if live else f"{line}\n")
        sys.stderr.write("\n" if live and finished else "")
        sys.stderr.flush()

    return report


def downloaded(settings: DataSettings) -> Listing | None:
    """List a data set that is the folder of a download, fetched now if it is not there; None for others."""
    known = DATA_SETS[settings.name]
    if settings.task not in known.tasks:
        return None
    listing = trainable(TASKS[settings.task].listing(known.fetched(settings.name, settings.path)))
    return replace(listing, classes=known.classes) if isinstance(listing, FolderListing) and known.classes else listing


def training_folder(root: Path) -> FolderListing:
    """List a folder of class folders. Raises DataError where it has no training images or fewer than two classes."""
    return trainable(list_folder(root))


def trainable(listing: L) -> L:
    """Return a listing that has training images, and enough classes to learn them. Raises DataError for others."""
    if not len(listing.train):
        raise DataError(
            f"{listing.root}: has a validation split but no {TRAIN}/; training images belong in {listing.place(TRAIN)}"
        )
    if 0 < len(listing.classes) < listing.fewest:
        raise DataError(
            f"{listing.root}: has one class folder ({listing.classes[0]}); give each of at least two classes a folder"
        )
    return listing
