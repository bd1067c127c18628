"""Data sets by name: built into scikit-learn, packaged by Debian, or downloaded by torchvision."""

import gzip
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torchvision.datasets as downloads
from sklearn.datasets import load_digits

from compress.data.digest import DOWNLOADED, cache_folder, training_folder
from export.errors import DataError
from export.images.folders import Listing

T = TypeVar("T")
# By a data set's name, what returns its folder; `data.path` may hold it already.
Folders = Mapping[str, Callable[[Path | None], Path]]
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGENETTE_CLASSES = (  # in the order of their folders, n01440764 to n03888257
    "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck", "gas pump",
    "golf ball", "parachute",
)  # fmt: skip


@dataclass(frozen=True)
class Arrays:
    """Decoded images uint8 (n, height, width, channels) and their labels (n,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class NamedSet:
    """A data set in memory; `val` is None where it has no validation set."""

    classes: tuple[str, ...]
    train: Arrays
    val: Arrays | None


def digits(_: Path | None) -> NamedSet:
    """Return scikit-learn's 1,797 handwritten digits, 8 × 8, with their 17 grey levels scaled to 0..255."""
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return NamedSet(tuple(str(digit) for digit in range(10)), Arrays(grey[..., None], bunch.target), None)


def cifar10(path: Path | None) -> NamedSet:
    """Return CIFAR-10, downloaded to the path."""
    return _cifar("cifar10", downloads.CIFAR10, path)


def cifar100(path: Path | None) -> NamedSet:
    """Return CIFAR-100, downloaded to the path."""
    return _cifar("cifar100", downloads.CIFAR100, path)


def fashion_mnist(path: Path | None) -> NamedSet:
    """Return Fashion-MNIST from its four .gz files in the path or in Debian's package, else downloaded to the path."""
    for folder in (path, DEBIAN_FASHION_MNIST):
        if folder is not None and (folder / "train-images-idx3-ubyte.gz").is_file():
            return NamedSet(FASHION_MNIST_CLASSES, _idx(folder, "train"), _idx(folder, "t10k"))
    root = cache_folder(path)
    _download("fashion_mnist", root, partial(downloads.FashionMNIST, root, download=True))
    raw = root / "FashionMNIST" / "raw"
    return NamedSet(FASHION_MNIST_CLASSES, _idx(raw, "train"), _idx(raw, "t10k"))


def imagenette(path: Path | None) -> Listing:
    """List Imagenette (320 pixels), downloaded to the path."""
    root = cache_folder(path)
    folder = root / "imagenette2-320"
    if not folder.is_dir():
        _download("imagenette", root, partial(downloads.Imagenette, root, size="320px", download=True))
    return replace(training_folder(folder), classes=IMAGENETTE_CLASSES)


def _voc(kind: Callable[..., object], path: Path | None) -> Path:
    """Return the folder of Pascal VOC 2012, downloaded to the path."""
    root = cache_folder(path)
    folder = root / DOWNLOADED["voc"]
    if not folder.is_dir():
        _download("voc", root, partial(kind, root, year="2012", download=True))
    return folder


def _oxford_pets(path: Path | None) -> Path:
    """Return the folder of Oxford-IIIT Pet, downloaded to the path."""
    root = cache_folder(path)
    folder = root / DOWNLOADED["oxford_pets"]
    if not folder.is_dir():
        _download("oxford_pets", root, partial(downloads.OxfordIIITPet, root, download=True))
    return folder


WITH_MASKS: Folders = {"voc": partial(_voc, downloads.VOCSegmentation), "oxford_pets": _oxford_pets}
WITH_BOXES: Folders = {"voc": partial(_voc, downloads.VOCDetection)}
NAMED: dict[str, Callable[[Path | None], NamedSet | Listing]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion_mnist": fashion_mnist,
    "imagenette": imagenette,
}


def _cifar(name: str, kind: Callable[..., downloads.CIFAR10], path: Path | None) -> NamedSet:
    root = cache_folder(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of the old pickles, whose digest torchvision checks
        train, val = (_download(name, root, partial(kind, root, train=part, download=True)) for part in (True, False))
    arrays = [Arrays(part.data, np.asarray(part.targets)) for part in (train, val)]
    return NamedSet(tuple(train.classes), *arrays)


def _download(name: str, root: Path, fetch: Callable[[], T]) -> T:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return fetch()
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for a file that arrived damaged
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: could not be downloaded to {root} ({reason}); "
            "download it on a machine with network access and give its folder: DATA=/path/to/it"
        ) from error


def _idx(folder: Path, part: str) -> Arrays:
    """Read MNIST's own format: a header of 16 (images) or 8 (labels) bytes, then one byte a value."""
    images = _bytes(folder / f"{part}-images-idx3-ubyte.gz", header=16)
    labels = _bytes(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    if images.size != labels.size * 28 * 28:
        raise DataError(
            f"{folder}: {part} holds {images.size:,} pixels for {labels.size:,} labels; download the files again"
        )
    return Arrays(images.reshape(-1, 28, 28, 1), labels)


def _bytes(file: Path, *, header: int) -> np.ndarray:
    try:
        return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=header)
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read ({error}); download it again") from error
