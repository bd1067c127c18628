"""A data set's digest, from the content of its files; decodes no image and imports no torch."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.data.shards import ShardListing, list_shards, shard_files
from compress.logs.stage_log import clock
from compress.ranks import rank
from export.command.digest_memory import digests_of
from export.errors import DataError, first
from export.images.box_listing import BoxListing
from export.images.folders import TRAIN, Listing, check_folder, count, images_in, list_folder
from export.images.masks import MaskListing
from export.images.size import Size, size_of, written
from export.images.tables import TableListing
from export.tasks import TASKS

# Default height and width of each data set's images; multiples of 32, as most networks halve the size five times.
NATIVE_SIZE = {
    "digits": 32,
    "imagefolder": 224,
    "cifar10": 32,
    "cifar100": 32,
    "fashion_mnist": 32,
    "imagenette": 224,
    "voc": 320,
    "oxford_pets": 256,
    "scenes": 96,
    "scenes_hard": 96,
    "scenes_plain": 32,
}
# The folders that downloads make.
DOWNLOADED = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "imagenette": "imagenette2-320",
    "voc": "VOCdevkit/VOC2012",
    "oxford_pets": "oxford-iiit-pet",
}
FASHION_MNIST = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
FILES = "images.json"  # in a source's artifact: digests of the files that it was made from
NOTES = "data-notes.json"  # and there the data set's `notes`
# The artifact key covers the task and the unlabelled images; `ignore_index` counts only where it is set.
UNDECIDING = ("task", "ignore_index", "unlabelled")
PATIENCE_S = 2  # progress is shown when reading files takes longer
VERSION = 3  # raise it when images become other tensors: every cached stage then runs again


@dataclass(frozen=True)
class DataSettings:
    """The settings that decide a data set's images, their split and their preprocessing.

    With `tuning` the validation images are held out of the training images, even if the data set has a validation set.
    `memory` is the folder where file digests are cached; it changes no result.
    """

    name: str
    path: Path | None
    image_size: Size | None  # None takes the data set's own
    resize: float
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    val_fraction: float
    limit_per_class: int | None
    skip_broken: bool
    task: str
    ignore_index: int | None
    seed: int
    tuning: bool
    memory: Path
    unlabelled: Path | None = None

    @property
    def size(self) -> Size:
        """What the network sees."""
        return self.image_size or size_of(NATIVE_SIZE[self.name])

    @property
    def resize_to(self) -> Size:
        """What evaluation resizes images to before it crops them."""
        height, width = self.size
        return round(height * self.resize), round(width * self.resize)


@dataclass(frozen=True)
class Given:
    """The listing of a data set's folder (None unless an `imagefolder`), and the digest of every readable file by path."""

    listing: Listing | ShardListing | MaskListing | BoxListing | TableListing | None
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
        listing = TASKS[settings.task].listing(settings.path)
        refuse_untrainable(listing)
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
    listing = list_shards(root, digests, memory)
    refuse_untrainable(listing)
    return Given(listing, digests)


def dataset_digest(settings: DataSettings, found: Given) -> str:
    """Return a sha256 over everything that decides pixels and split: the settings, and each file's path, class and content.

    The folder's own path does not count.
    """
    listing = found.listing
    decisive = {name: value for name, value in asdict(settings).items() if name not in UNDECIDING}
    content = {
        **decisive,
        **({} if settings.ignore_index is None else {"ignore_index": settings.ignore_index}),
        "version": VERSION,
        "image_size": written(settings.size),
        "path": None,
        "memory": None,
        "classes": listing and listing.classes,
        **({"masks": 2} if isinstance(listing, MaskListing) else {}),  # raise it when masks become other tensors
        "labels": None
        if isinstance(listing, ShardListing)
        else listing and sorted(listing.train + (listing.val or ())),
        "files": found.digests,
    }
    if isinstance(listing, BoxListing):  # as they are read, which the files alone do not say
        content["boxes"] = hashlib.sha256(listing.truths(listing.train + (listing.val or ())).tobytes()).hexdigest()
    if not settings.tuning:
        del content["tuning"]  # keys made before the setting existed stay valid
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def cache_folder(path: Path | None) -> Path:
    """Return the folder for downloads: the given path, else the user's cache."""
    if path is not None:
        return path
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"
    except RuntimeError as error:  # in a container whose user has no entry in /etc/passwd
        raise DataError("there is no home folder to download to; give one: DATA=/path/to/a/folder") from error


def to_download(settings: DataSettings) -> Path | None:
    """Return the folder that a run would download the data set to, None where no download is needed."""
    if settings.name not in DOWNLOADED:
        return None
    root = cache_folder(settings.path)
    return None if (root / DOWNLOADED[settings.name]).is_dir() else root


def training_folder(root: Path) -> Listing:
    """List a folder of class folders. Raises DataError where it has no training images or fewer than two classes."""
    listing = list_folder(root)
    refuse_untrainable(listing)
    return listing


def refuse_untrainable(listing: Listing | ShardListing | MaskListing | BoxListing | TableListing) -> None:
    """Raise DataError where a folder has no training images, or only one class folder."""
    if not listing.train:
        raise DataError(
            f"{listing.root}: has a validation split but no {TRAIN}/; training images belong in {listing.place(TRAIN)}"
        )
    if isinstance(listing, Listing | ShardListing) and len(listing.classes) == 1:
        raise DataError(
            f"{listing.root}: has one class folder ({listing.classes[0]}); give each of at least two classes a folder"
        )
