"""Name a data set by its content, without decoding an image and without torch."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from export.errors import DataError
from export.images.folders import TRAIN, Listing, list_folder

# Height and width of each data set's images when the recipe leaves it open; multiples of 32, which most networks halve five times.
NATIVE_SIZE = {
    "digits": 32,
    "imagefolder": 224,
    "cifar10": 32,
    "cifar100": 32,
    "fashion_mnist": 32,
    "imagenette": 224,
}
# The folder that a download leaves, where it is one.
DOWNLOADED = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "imagenette": "imagenette2-320"}
VERSION = 2  # of how images become tensors; a change of it makes every cached stage run again


@dataclass(frozen=True)
class DataSettings:
    """All that decides which images there are, how they are split, and what evaluation makes of them."""

    name: str
    path: Path | None
    image_size: int | None  # None takes the data set's own
    resize: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    val_fraction: float
    limit_per_class: int | None
    skip_broken: bool
    seed: int


def dataset_digest(settings: DataSettings) -> str:
    """Return a sha256 over all that decides the pixels and the split: the settings and, for a folder, every image's path and size.

    Where the folder lies does not matter. Raises `DataError` where it cannot be used.
    """
    content = {
        **asdict(settings),
        "version": VERSION,
        "image_size": settings.image_size or NATIVE_SIZE[settings.name],
        "path": None,
        "files": folder_digest(folder_of(settings.path)) if settings.name == "imagefolder" else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cache_folder(path: Path | None) -> Path:
    """Return where downloads lie: the path given, else the user's cache."""
    if path is not None:
        return path
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"


def to_download(settings: DataSettings) -> Path | None:
    """Return the folder that a run would download the data set to; None where it lies there already, or needs no download."""
    root = cache_folder(settings.path)
    folder = DOWNLOADED.get(settings.name)
    return None if folder is None or (root / folder).is_dir() else root


def folder_of(path: Path | None) -> Path:
    """Return the folder of an `imagefolder`; raise `DataError` where none was given."""
    if path is None:
        raise DataError("imagefolder: needs its folder: give DATA=/path/to/images, or set data.path")
    return path


def training_folder(root: Path) -> Listing:
    """List a folder to train on. Raises `DataError` where it brings no training images or fewer than two classes."""
    listing = list_folder(root)
    if not listing.train:
        raise DataError(
            f"{root}: has a validation split but no train/; training images belong in {root / TRAIN}/<class>/"
        )
    if len(listing.classes) == 1:
        raise DataError(
            f"{root}: has one class folder ({listing.classes[0]}); give each class a folder of its own, two classes at least"
        )
    return listing


def folder_digest(root: Path) -> str:
    """Return a sha256 over the sorted (path, class, size) of every image; where it lies does not matter."""
    listing = training_folder(root)
    content = hashlib.sha256(json.dumps(listing.classes).encode())
    for relative, label in sorted(listing.train + (listing.val or ())):
        file = root / relative
        size = file.stat().st_size if file.exists() else None
        content.update(f"{relative}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
    return content.hexdigest()
