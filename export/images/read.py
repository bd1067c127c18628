"""Find labelled images and preprocess them by the bundle's preprocess.json."""

import hashlib
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first
from export.images.decode import BrokenImage, image_of, read_image, require_pillow
from export.images.folders import list_folder
from export.images.listing import SplitListing, count
from export.images.preprocess import Preprocess

Labelled = tuple[NDArray[np.float32], NDArray[Any]]
"""Network inputs (batch, channels, height, width) and their truths (batch, ...)."""
Pixels = NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """Labelled images of a folder or an archive, decoded on demand; `chosen` are the indices to use.

    `pixels` returns an image after resizing and cropping, (height, width, channels), `content` the bytes that identify it (the file's, or
    the pixels' in an archive). `taught` gives a batch's truths where nobody labelled the images. `notes` are sentences to print with a
    score.
    """

    preprocess: Preprocess
    truths: NDArray[Any]  # (n, ...)
    pixels: Callable[[int], Pixels]
    content: Callable[[int], bytes]
    chosen: NDArray[np.int64]  # (m,)
    taught: Callable[[NDArray[np.float32]], NDArray[Any]] | None = None
    files: tuple[Path, ...] = ()  # of all images (n,), where they are files
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def spread(self, limit: int) -> "Examples":
        """Return at most `limit` of the images, evenly spaced."""
        return replace(self, chosen=self.chosen[spread(len(self), limit)])

    def judged(self, validation: Sequence[str]) -> "Examples":
        """Return the images whose digests are in `validation`, or all if none is, with a note on the others."""
        left, kept = Counter(validation), list[int]()
        for index in self.chosen:
            with suppress(DataError):  # an unreadable image is not among them
                if left[one := digest(self.content(index))] > 0:
                    left[one] -= 1
                    kept.append(index)
        if not kept:
            note = (
                f"none of the {len(self):,} images is one of the network's {len(validation):,} validation images: all are "
                "scored, and the score means nothing if it was trained on them"
            )
            return replace(self, notes=(*self.notes, note))
        notes = list(self.notes)
        if others := len(self) - len(kept):
            notes.append(
                f"{len(kept):,} of {len(self):,} images are the network's validation images; the other {others:,} are "
                "left out: it may have been trained on them"
            )
        if missing := left.total():
            notes.append(f"{missing:,} of the network's {len(validation):,} validation images are not here")
        return replace(self, chosen=np.array(kept), notes=tuple(notes))

    def paths(self) -> list[Path]:
        """Return the images' files; DataError where they are in an archive."""
        if not self.files:
            raise DataError(
                "a metric of your own finds an image by its path, and these are in an archive: give a folder"
            )
        return [self.files[index] for index in self.chosen]

    def digests(self) -> list[str]:
        """Return the digest of each image before preprocessing."""
        return [digest(self.content(index)) for index in self.chosen]

    def batches(self, *, batch_size: int = 32) -> Iterator[Labelled]:
        """Yield the images in order; DataError for a broken one."""
        for start in range(0, len(self), batch_size):
            part = self.chosen[start : start + batch_size]
            images = self.preprocess.normalize(np.stack([self.pixels(index) for index in part]))
            yield images, self.taught(images) if self.taught else self.truths[part]


def find_examples(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of a folder (of its validation split, if it has one) or an .npz file, with a bundle's `labels` as classes.

    The .npz file has `images`, uint8 (n, height, width, channels) or uint16, and `labels`, integers (n,).
    Raises DataError for data that do not fit.
    """
    require_pillow(data)
    return (archive_examples if data.suffix == ".npz" else folder_examples)(data, preprocess, labels)


def folder_examples(folder: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of a folder; its class folders match `labels` by name or, if none does, by order."""
    listing = list_folder(folder)
    places, notes = match(folder, listing.classes, labels)
    truths = np.array([places[label] for _, label in listing.judged], np.int64)
    return file_examples(listing, truths, preprocess, notes)


def file_examples(
    listing: SplitListing[Any], truths: NDArray[Any], preprocess: Preprocess, notes: tuple[str, ...] = ()
) -> Examples:
    """Return the images of a folder, or of its validation split if it has one, with their truths (n, ...)."""
    files = [listing.root / path for path, _ in listing.judged]
    return Examples(
        preprocess,
        truths,
        lambda index: read_pixels(files[index], preprocess),
        lambda index: content_of(files[index]),
        np.arange(len(files)),
        files=tuple(files),
        notes=(*listing.notes, *notes),
    )


def match(folder: Path, classes: Sequence[str], labels: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Return each class folder's index in the labels, and a note if they are matched by order.

    Raises DataError if only some folders are labels, or none is and their numbers differ.
    """
    unknown = [name for name in classes if name not in labels]
    if not unknown:
        return [labels.index(name) for name in classes], ()
    if len(unknown) < len(classes):
        raise DataError(
            f"{folder}: {len(unknown):,} of {count(classes, 'class folder')} not in the {len(labels):,} labels of the bundle: "
            f"{first(unknown)}: rename or remove them"
        )
    if len(classes) != len(labels):
        raise DataError(
            f"{folder}: none of its {count(unknown, 'class folder')} ({first(unknown)}) is one of the {len(labels)} labels of "
            "the bundle: name them as in labels.txt, or give one for each label in sorted order"
        )
    pairs = [f"{name} is {label}" for name, label in zip(classes, labels, strict=True)]
    return list(range(len(labels))), (
        f"{folder}: no class folder is a label, so they are matched in order: {first(pairs)}",
    )


def archive_examples(path: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of an .npz file."""
    pixel = preprocess.pixel
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, targets = archive["images"], archive["labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: must be an .npz file with images and labels ({error})") from error
    fits = images.dtype == pixel.dtype and images.ndim == 4 and images.shape[3] == pixel.channels
    if not fits or targets.shape != images.shape[:1]:
        raise DataError(
            f"{path}: images must be uint{pixel.bits} (n, height, width, {pixel.channels}) and labels (n,), got {images.dtype} {images.shape} "
            f"and {targets.shape}"
        )
    if len(targets) and not (
        np.issubdtype(targets.dtype, np.integer) and 0 <= targets.min() <= targets.max() < len(labels)
    ):
        raise DataError(f"{path}: labels must be integers from 0 to {len(labels) - 1}, as many as labels.txt has lines")
    return Examples(
        preprocess,
        targets.astype(np.int64),
        lambda index: preprocess.pixels(image_of(images[index])),
        lambda index: bytes(images[index].tobytes()),
        np.arange(len(targets)),
    )


def read_pixels(path: Path, preprocess: Preprocess) -> Pixels:
    """Return an image file resized and cropped, (height, width, channels); DataError if it is broken."""
    require_pillow(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata
            return preprocess.pixels(read_image(path, upright=preprocess.upright, pixel=preprocess.pixel))
    except BrokenImage as error:
        raise DataError(f"{path}: cannot be read as an image ({error}): repair or remove it") from error


def content_of(path: Path) -> bytes:
    """Return a file's bytes; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): repair or remove it") from error


def spread(n: int, limit: int) -> NDArray[np.int64]:
    """Return at most `limit` of n indices, evenly spaced, in an order in which every prefix is evenly spread too.

    The order is that of the golden ratio's multiples modulo 1 (a Kronecker sequence).
    """
    m = min(limit, n)
    ranks = np.argsort(np.argsort(np.arange(m) * ((5**0.5 - 1) / 2) % 1))
    return np.asarray(ranks * n // max(m, 1), np.int64)


def digest(content: bytes) -> str:
    """Return 64 bits of the SHA-256; the chance of a collision among 100,000 images is 1 in 4 thousand million."""
    return hashlib.sha256(content).hexdigest()[:16]
