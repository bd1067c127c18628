"""Name a data set by its content, without decoding an image and without torch."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.artifact import digests_of
from compress.data.shards import ShardListing, list_shards, shard_files
from compress.log import clock
from compress.ranks import rank
from export.errors import DataError
from export.images.annotations import BoxListing
from export.images.folders import TRAIN, Listing, check_folder, count, first, images_in, list_folder
from export.images.masks import MaskListing
from export.tasks import TASKS

# Height and width of each data set's images when the recipe leaves it open; multiples of 32, which most networks halve five times.
NATIVE_SIZE = {
    "digits": 32,
    "imagefolder": 224,
    "cifar10": 32,
    "cifar100": 32,
    "fashion_mnist": 32,
    "imagenette": 224,
    "scenes": 96,
    "scenes_hard": 96,
}
# The folder that a download leaves, where it is one.
DOWNLOADED = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "imagenette": "imagenette2-320"}
FASHION_MNIST = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
FILES = "images.json"  # in a source's artifact: the files that it was made with
# A stage's key has the task and, where it learns from them, the unlabelled images; the index decides where it is set.
UNDECIDING = ("task", "ignore_index", "unlabelled")
PATIENCE_S = 2  # before the reading of files is worth a line
VERSION = 3  # of how images become tensors; a change of it makes every cached stage run again


@dataclass(frozen=True)
class DataSettings:
    """All that decides which images there are, how they are split, and what evaluation makes of them.

    With `tuning` the images that judge are held out of the training images, whatever the data set brings for validation.
    `memory` is a folder where the digests of files are remembered; it decides nothing.
    """

    name: str
    path: Path | None
    image_size: int | None  # None takes the data set's own
    resize: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    val_fraction: float
    limit_per_class: int | None
    skip_broken: bool
    task: str
    ignore_index: int | None
    seed: int
    tuning: bool
    memory: Path
    unlabelled: Path | None = None


@dataclass(frozen=True)
class Given:
    """What a person's folder holds: its listing, where it is an `imagefolder`, and the digest of every file that can be read, by its path."""

    listing: Listing | ShardListing | MaskListing | BoxListing | None
    digests: dict[str, str]


def given(settings: DataSettings) -> Given:
    """Read the digests of a data set's files; sets that are downloaded have none, since whoever downloads them checks them.

    Raises `DataError` where the folder cannot be used.
    """
    if settings.name == "imagefolder":
        root = folder_of(settings.path)
        if (shards := shards_in(root, settings.memory)) is not None:
            return shards
        listing = TASKS[settings.task].listing(root)
        refuse_untrainable(listing)
        return Given(listing, _digests(listing.root, listing.names(), settings.memory))
    if settings.name == "fashion_mnist" and settings.path is not None:  # other sets come in its format, too
        return Given(None, _digests(settings.path, FASHION_MNIST, settings.memory))
    return Given(None, {})


def given_unlabelled(settings: DataSettings) -> dict[str, str]:
    """Return the digest of every image below the folder of unlabelled ones, by its absolute path. Raises `DataError` where there is none."""
    if settings.unlabelled is None:
        return {}
    check_folder(settings.unlabelled)
    root = settings.unlabelled.resolve()
    names = images_in(root, root)
    if not names:
        raise DataError(f"{root}: holds no image: give data.unlabelled another folder, or leave it out")
    return {str(root / name): digest for name, digest in _digests(root, names, settings.memory).items()}


def unlabelled_digest(settings: DataSettings) -> str:
    """Return a sha256 over the content of the unlabelled images, wherever they lie."""
    return hashlib.sha256(json.dumps(sorted(given_unlabelled(settings).values())).encode()).hexdigest()


def shards_in(root: Path, memory: Path) -> Given | None:
    """Return what a folder of shards holds, None where it is none."""
    if not (files := shard_files(root)):
        return None
    digests = _digests(root, files, memory)
    listing = list_shards(root, digests, memory)
    refuse_untrainable(listing)
    return Given(listing, digests)


def dataset_digest(settings: DataSettings, found: Given) -> str:
    """Return a sha256 over all that decides the pixels and the split: the settings, and of a folder every image's path, class and content.

    Where the folder lies does not matter.
    """
    listing = found.listing
    decisive = {name: value for name, value in asdict(settings).items() if name not in UNDECIDING}
    content = {
        **decisive,
        **({} if settings.ignore_index is None else {"ignore_index": settings.ignore_index}),
        "version": VERSION,
        "image_size": settings.image_size or NATIVE_SIZE[settings.name],
        "path": None,
        "memory": None,
        "classes": listing and listing.classes,
        "labels": None
        if isinstance(listing, ShardListing)
        else listing and sorted(listing.train + (listing.val or ())),
        "files": found.digests,
    }
    if not settings.tuning:
        del content["tuning"]  # as every key was made before there was a choice
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say which files are others than before, by their digests; nothing where none is."""
    groups = {
        "changed": [name for name, digest in now.items() if before.get(name, digest) != digest],
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
    }
    return "; ".join(f"{count(names, 'file')} {what} ({first(names)})" for what, names in groups.items() if names)


def _digests(root: Path, names: Sequence[str], memory: Path) -> dict[str, str]:
    names = [name for name in names if os.access(root / name, os.R_OK)]
    file = memory / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    try:
        found = digests_of(root, names, memory=file, progress=_reporter(root, len(names)))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; repair or remove it") from error
    return {name: digest[:16] for name, digest in found.items()}


def _reporter(root: Path, total: int) -> Callable[[int], None]:
    """Return what says on stderr how far the reading of the files is, where it takes more than seconds."""
    live = sys.stderr.isatty()
    started_s = shown_s = time.monotonic()

    def report(done: int) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        spent_s, due, finished = now_s - started_s, now_s - shown_s > (0.25 if live else 30), done == total
        if spent_s < PATIENCE_S or not (due or finished) or rank() != 0:
            return
        shown_s = now_s
        state = f"after {clock(spent_s)}" if finished else f"so far, {clock(spent_s / done * (total - done))} left"
        line = f"{root}: the content of {done:,} of {total:,} files is known {state}"
        sys.stderr.write(f"\r\033[K{line}" if live else f"{line}\n")
        sys.stderr.write("\n" if live and finished else "")
        sys.stderr.flush()

    return report


def cache_folder(path: Path | None) -> Path:
    """Return where downloads lie: the path given, else the user's cache."""
    if path is not None:
        return path
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"
    except RuntimeError as error:  # as in a container that runs as a user whom it does not know
        raise DataError("there is no home folder to download to; give one: DATA=/path/to/a/folder") from error


def to_download(settings: DataSettings) -> Path | None:
    """Return the folder that a run would download the data set to; None where it lies there already, or needs no download."""
    if settings.name not in DOWNLOADED:
        return None
    root = cache_folder(settings.path)
    return None if (root / DOWNLOADED[settings.name]).is_dir() else root


def folder_of(path: Path | None) -> Path:
    """Return the folder of an `imagefolder`; raise `DataError` where none was given."""
    if path is None:
        raise DataError("imagefolder: needs its folder: give DATA=/path/to/images, or set data.path")
    return path


def training_folder(root: Path) -> Listing:
    """List a folder of class folders to train on. Raises `DataError` where it brings no training images or fewer than two classes."""
    listing = list_folder(root)
    refuse_untrainable(listing)
    return listing


def refuse_untrainable(listing: Listing | ShardListing | MaskListing | BoxListing) -> None:
    """Raise `DataError` where a folder brings no training images, or one class folder."""
    if not listing.train:
        raise DataError(
            f"{listing.root}: has a validation split but no {TRAIN}/; training images belong in {listing.place(TRAIN)}"
        )
    if isinstance(listing, Listing | ShardListing) and len(listing.classes) == 1:
        raise DataError(
            f"{listing.root}: has one class folder ({listing.classes[0]}); give each class a folder of its own, two classes at least"
        )
