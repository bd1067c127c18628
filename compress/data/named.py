"""Data sets by name: built into scikit-learn, packaged by Debian, or downloaded by torchvision, which are imported when needed.

To add one, add a row to DATA_SETS. Imports no torch.
"""

import gzip
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from export.errors import DataError

T = TypeVar("T")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
FASHION_MNIST = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


@dataclass(frozen=True)
class Arrays:
    """Decoded images uint8 (n, height, width, channels) and their labels (n,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class InMemory:
    """A data set in memory; `val` is None where it has no validation set."""

    classes: tuple[str, ...]
    train: Arrays
    val: Arrays | None


@dataclass(frozen=True)
class Difficulty:
    """Scenes: number of digits, their sizes as fractions of the image, contrast, noise, and the number of scenes of each part."""

    digits: tuple[int, int]
    sizes: tuple[float, float]
    contrast: tuple[float, float]
    noise: float
    train: int
    val: int
    plain: bool = False  # a dark background of one colour


@dataclass(frozen=True)
class NamedSet:
    """A data set with a name: `arrays` with one label each, `scenes` for other tasks, or the folder of a download for `tasks`.

    `arrays` takes `data.path`, which may hold the data set already.
    """

    size: int  # default height and width; a multiple of 32, as most networks halve the size five times
    arrays: Callable[[Path | None], InMemory] | None = None
    scenes: Difficulty | None = None
    tasks: tuple[str, ...] = ()
    folder: str | None = None  # that the download makes
    download: tuple[str, Mapping[str, str]] | None = None  # torchvision's class and its arguments
    classes: tuple[str, ...] = ()  # names for people, in the order of the folders
    embedded: bool = False  # in a package, so without a folder

    def fetched(self, name: str, path: Path | None) -> Path:
        """Return the folder, downloaded to the path if it is not there."""
        assert self.folder is not None
        assert self.download is not None
        root, (kind, arguments) = cache_folder(path), self.download
        if not (root / self.folder).is_dir():
            _download(name, root, lambda: _torchvision(kind)(root, download=True, **arguments))
        return root / self.folder


def digits(_: Path | None) -> InMemory:
    """Return scikit-learn's 1,797 handwritten digits, 8 × 8, with their 17 grey levels scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return InMemory(tuple(str(digit) for digit in range(10)), Arrays(grey[..., None], bunch.target), None)


def cifar(name: str, path: Path | None) -> InMemory:
    """Return CIFAR-10 or CIFAR-100, downloaded to the path."""
    root, kind = cache_folder(path), _torchvision(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of the old pickles, whose digest torchvision checks
        train, val = (
            _download(name.lower(), root, partial(kind, root, train=part, download=True)) for part in (True, False)
        )
    arrays = [Arrays(part.data, np.asarray(part.targets)) for part in (train, val)]
    return InMemory(tuple(train.classes), *arrays)


def fashion_mnist(path: Path | None) -> InMemory:
    """Return Fashion-MNIST from its four .gz files in the path or in Debian's package, else downloaded to the path."""
    found = [folder for folder in (path, DEBIAN_FASHION_MNIST) if folder and (folder / FASHION_MNIST[0]).is_file()]
    if not found:
        root, kind = cache_folder(path), _torchvision("FashionMNIST")
        _download("fashion_mnist", root, lambda: kind(root, download=True))
        found = [root / "FashionMNIST" / "raw"]
    return InMemory(DATA_SETS["fashion_mnist"].classes, _idx(found[0], "train"), _idx(found[0], "t10k"))


DATA_SETS = {
    "digits": NamedSet(32, digits, embedded=True),
    "imagefolder": NamedSet(224),
    "cifar10": NamedSet(32, partial(cifar, "CIFAR10"), folder="cifar-10-batches-py"),
    "cifar100": NamedSet(32, partial(cifar, "CIFAR100"), folder="cifar-100-python"),
    "fashion_mnist": NamedSet(
        32,
        fashion_mnist,
        classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "imagenette": NamedSet(
        224,
        tasks=("classification",),
        folder="imagenette2-320",
        download=("Imagenette", {"size": "320px"}),
        classes=(  # in the order of their folders, n01440764 to n03888257
            "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck", "gas pump",
            "golf ball", "parachute",
        ),
    ),
    "voc": NamedSet(
        320,
        tasks=("segmentation", "detection"),
        folder="VOCdevkit/VOC2012",
        download=("VOCSegmentation", {"year": "2012"}),
    ),
    "oxford_pets": NamedSet(
        256, tasks=("segmentation",), folder="oxford-iiit-pet", download=("OxfordIIITPet", {})
    ),
    "scenes": NamedSet(
        96, scenes=Difficulty((2, 4), (0.3, 0.5), (0.45, 0.9), 0.03, train=800, val=200), embedded=True
    ),
    "scenes_hard": NamedSet(
        96, scenes=Difficulty((3, 7), (0.18, 0.45), (0.2, 0.6), 0.08, train=800, val=200), embedded=True
    ),
    "scenes_plain": NamedSet(
        32, scenes=Difficulty((1, 3), (0.4, 0.5), (0.6, 0.9), 0.02, train=3000, val=400, plain=True), embedded=True
    ),
}  # fmt: skip
if TYPE_CHECKING:  # mypy takes no computed Literal; pydantic does
    DataName = str
else:
    DataName = Literal[tuple(DATA_SETS)]


def cache_folder(path: Path | None) -> Path:
    """Return the folder for downloads: the given path, else the user's cache."""
    if path is not None:
        return path
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"
    except RuntimeError as error:  # in a container whose user has no entry in /etc/passwd
        raise DataError("there is no home folder to download to; give one: DATA=/path/to/a/folder") from error


def download(name: str, path: Path | None, task: str) -> None:
    """Download a data set that is not there yet; do nothing for others."""
    known = DATA_SETS[name]
    if known.arrays is not None:
        known.arrays(path)
    elif task in known.tasks:
        known.fetched(name, path)


def to_download(name: str, path: Path | None) -> Path | None:
    """Return the folder that a run would download the data set to, None where no download is needed."""
    if (folder := DATA_SETS[name].folder) is None:
        return None
    root = cache_folder(path)
    return None if (root / folder).is_dir() else root


def _torchvision(kind: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module("torchvision.datasets"), kind)
    return found


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
