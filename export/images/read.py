"""Read labelled images and turn them into what the network sees, by the bundle's preprocess.json."""

import hashlib
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte decoded

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Images as the network takes them, (batch, 3, size, size), and their labels, (batch,)."""
Identified = tuple[NDArray[np.float32], NDArray[np.int64], list[str]]
"""The same with each image's digest, which preprocessing leaves alone."""
Example = tuple[NDArray[np.uint8], int, str]
"""One image's pixels after resizing and cropping, (size, size, 3), its label and its digest."""


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalize each channel (red, green, blue)."""

    image_size: int
    resize_to: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, image: "Image.Image") -> NDArray[np.uint8]:
        """Return the centre of the resized RGB image, (size, size, 3); longer side and crop round down."""
        width, height = image.size
        shorter = min(width, height)
        if shorter != self.resize_to:
            from PIL import Image

            width, height = self.resize_to * width // shorter, self.resize_to * height // shorter
            if width * height > MAX_PIXELS:
                raise BundleError(f"an image of {image.width} x {image.height} pixels: too narrow to resize: remove it")
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        return np.asarray(image)[top : top + self.image_size, left : left + self.image_size]

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return uint8 (batch, size, size, 3) as normalized float32 (batch, 3, size, size)."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def labelled_batches(
    data: Path, preprocess: Preprocess, labels: Sequence[str], *, batch_size: int = 32
) -> Iterator[Labelled]:
    """Yield the images of `data` in order: a folder of class folders, or of `val` and others, or an .npz file.

    The .npz file holds `images`, uint8 (n, height, width, 3), and `labels`, integers (n,).
    Raises BundleError for data that do not fit the bundle, and for a broken image.
    """
    for images, targets, _ in identified_batches(data, preprocess, labels, batch_size=batch_size):
        yield images, targets


def identified_batches(
    data: Path, preprocess: Preprocess, labels: Sequence[str], *, batch_size: int = 32
) -> Iterator[Identified]:
    """Yield what `labelled_batches` yields, and each image's digest: of the file's bytes, or of the archive's pixels."""
    require_pillow(data)
    if data.is_dir():
        examples = folder_examples(data / "val" if (data / "val").is_dir() else data, preprocess, labels)
    elif data.suffix == ".npz":
        examples = archive_examples(data, preprocess, len(labels))
    else:
        raise BundleError(f"{data}: must be a folder of class folders or an .npz file")
    while batch := list(islice(examples, batch_size)):
        pixels, targets, digests = zip(*batch, strict=True)
        yield preprocess.normalize(np.stack(pixels)), np.array(targets, np.int64), list(digests)


def folder_examples(folder: Path, preprocess: Preprocess, labels: Sequence[str]) -> Iterator[Example]:
    """Yield every image of every class folder; folders match `labels` by name, or all of them in sorted order."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    by_name = set(names) <= set(labels)
    if not names or not (by_name or len(names) == len(labels)):
        unknown = sorted(set(names) - set(labels))[:3]
        raise BundleError(
            f"{folder}: has {len(names)} class folders (not in {len(labels)} labels: {', '.join(unknown) or 'none'}): "
            "name them as in labels.txt, or give one for each label in sorted order"
        )
    for index, name in enumerate(names):
        label = labels.index(name) if by_name else index
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield preprocess.pixels(read_image(path)), label, digest(path.read_bytes())


def archive_examples(path: Path, preprocess: Preprocess, classes: int) -> Iterator[Example]:
    """Yield every image of an .npz file."""
    from PIL import Image

    try:
        with np.load(path, allow_pickle=False) as archive:
            images, targets = archive["images"], archive["labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: must be an .npz file with images and labels ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or targets.shape != images.shape[:1]:
        raise BundleError(
            f"{path}: images must be uint8 (n, height, width, 3) and labels (n,), got {images.dtype} {images.shape} and {targets.shape}"
        )
    if len(targets) and not (
        np.issubdtype(targets.dtype, np.integer) and 0 <= targets.min() <= targets.max() < classes
    ):
        raise BundleError(f"{path}: labels must be integers from 0 to {classes - 1}, as many as labels.txt has lines")
    for image, label in zip(images, targets, strict=True):
        yield preprocess.pixels(Image.fromarray(image)), int(label), digest(image.tobytes())


def digest(content: bytes) -> str:
    """Return 64 bits of the SHA-256: two of 100,000 images share them once in four thousand million."""
    return hashlib.sha256(content).hexdigest()[:16]


def require_pillow(path: Path) -> None:
    """Raise BundleError where the library that decodes images is missing."""
    if find_spec("PIL") is None:
        raise BundleError(f"{path}: reading images needs Pillow: pip install pillow")


def read_image(path: Path) -> "Image.Image":
    """Return the file's pixels as RGB.

    Raises BundleError for a file that is truncated, of an unexpected format, or larger than Pillow's limit.
    """
    require_pillow(path)
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BundleError(f"{path}: cannot be read as an image ({error}): mend or remove it") from error
