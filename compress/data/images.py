"""Images with their labels: decoded in memory if they fit, else files that are decoded on access."""

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.placed import Placed, PlacedSource
from compress.data.shards import Rows, ShardListing, read_bytes
from compress.data.stored import Stored
from compress.logs.stage_log import say
from export.errors import DataError
from export.images.decode import (
    RGB,
    BrokenImage,
    Pixel,
    describe_broken,
    image_of,
    read_image,
    read_pixels_of,
    resize,
    values_of,
)
from export.images.folders import File, FolderListing
from export.images.listing import NO_LABEL
from export.images.preprocess import Preprocess
from export.images.read import content_of
from export.runtime.environment import usable_cores

MEMORY_BYTES = 1_500_000_000  # data sets up to this size, decoded, are decoded once


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images as evaluation sees them, for training with random crops also whole; `labels` int64 (n,).

    `broken` has the files that were left out, with the reason. Masks and boxes are `placed`; their images' labels are 0. `paths` are the
    files' (at least n, bytes), None for a named data set.
    """

    still: Stored
    labels: Tensor
    whole: Stored | None = None
    broken: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    placed: Placed | None = None
    paths: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the file's path relative to the root, else the image's number."""
        return f"image {index}" if self.paths is None else os.fsdecode(self.paths[index])

    @property
    def place(self) -> str:
        """Where the images are during training, in words."""
        if self.whole is None:
            return "in memory"
        shrunk = int((self.whole.kept != self.whole.sizes).any(dim=1).sum())
        return "in memory, whole" + (
            f", {shrunk:,} of them shrunk to the size that random crops need" if shrunk else ""
        )

    def stored(self, *, whole: bool) -> Stored:
        """Return the whole images, or those that evaluation sees."""
        found = self.whole if whole else self.still
        assert found is not None, "opened for an augmentation without random crops"
        return found


@dataclass(frozen=True)
class FileImages:
    """Image files that are decoded on access; `labels` int64 (n,) include those of broken files.

    Paths are a numpy array of bytes, as a million Python strings would be copied into every loader process.
    """

    root: Path
    paths: np.ndarray
    labels: Tensor
    skip_broken: bool
    broken: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    placed: PlacedSource | None = None
    pixel: Pixel = RGB
    place: ClassVar[str] = "in files, decoded for each view"  # where they are during training

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> Self:
        """Return the images of these indices."""
        placed = self.placed and self.placed.take(chosen)
        return replace(self, paths=self.paths[chosen], labels=self.labels[torch.from_numpy(chosen)], placed=placed)

    def name(self, index: int) -> str:
        """Return the file's path relative to the root."""
        return os.fsdecode(self.paths[index])

    def file(self, index: int) -> Path | io.BytesIO:
        """Return what is opened to read the image; raise BrokenImage where it cannot be read."""
        return self.root / self.name(index)

    def whole(self, index: int) -> Image.Image:
        """Return one decoded image; raise BrokenImage where that fails."""
        return read_image(self.file(index), upright=True, pixel=self.pixel)

    def content(self, index: int) -> bytes:
        """Return the file's bytes; raise DataError where they cannot be read."""
        return content_of(self.root / self.name(index))

    def suffix(self, index: int) -> str:
        """Return the suffix for a copy of the file."""
        return Path(self.name(index)).suffix or ".jpg"  # shards' rows have none; images are read by content

    def area(self, index: int) -> int:
        """Return an image's height times its width in pixels, 0 where its header cannot be read."""
        return read_pixels_of(self.file(index))[0]

    def stored(self, index: int) -> Pixel | None:
        """Return a file's channels and bits, None where its header cannot be read."""
        return read_pixels_of(self.file(index))[1]

    def report_broken(self, found: dict[int, str]) -> None:
        """Log newly found broken images (reasons by index) if they are to be skipped, else raise DataError."""
        new = {self.name(index): reason for index, reason in found.items() if self.name(index) not in self.broken}
        if not new:
            return
        if not self.skip_broken:
            raise DataError(f"{self.root}: {describe_broken(new, len(self))}; {BROKEN_REPAIR}")
        self.broken.update(new)
        say(f"{self.root}: left out: {describe_broken(new, len(self))}", each_rank=True)


@dataclass(frozen=True, kw_only=True)
class ShardImages(FileImages):
    """Images in shards, read on access."""

    rows: Rows
    places: tuple[str, ...]
    place: ClassVar[str] = "in shards, decoded for each view"

    def take(self, chosen: np.ndarray) -> Self:
        """Return the images of these indices."""
        return replace(super().take(chosen), rows=self.rows[chosen])

    def file(self, index: int) -> io.BytesIO:
        """Return what is opened to read the image; raise BrokenImage where it cannot be read."""
        return io.BytesIO(self.content(index))

    def content(self, index: int) -> bytes:
        """Return the image file's bytes; raise BrokenImage where they cannot be read."""
        rows = self.rows
        return read_bytes(self.places[rows.shards[index]], int(rows.offsets[index]), int(rows.lengths[index]))


@dataclass(frozen=True)
class ArrayImages:
    """Images of a named data set at their own size, uint8 (n, height, width, channels), resized on access; `labels` int64 (n,)."""

    arrays: np.ndarray
    labels: Tensor
    broken: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)  # none: they are in memory
    placed: PlacedSource | None = None
    pixel: Pixel = RGB
    place: ClassVar[str] = "in memory at their own size, resized for each view"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> Self:
        """Return the images of these indices."""
        placed = self.placed and self.placed.take(chosen)
        return replace(self, arrays=self.arrays[chosen], labels=self.labels[torch.from_numpy(chosen)], placed=placed)

    def name(self, index: int) -> str:
        """Return the image's number."""
        return f"image {index}"

    def whole(self, index: int) -> Image.Image:
        """Return one image."""
        return image_of(self.arrays[index])

    def content(self, index: int) -> bytes:
        """Return the bytes of one image as a BMP file, which are the same from any library."""
        stream = io.BytesIO()
        self.whole(index).save(stream, "BMP")
        return stream.getvalue()

    def suffix(self, _: int) -> str:
        """Return the suffix for a file of `content`."""
        return ".bmp"

    def area(self, _: int) -> int:
        """Return an image's height times its width in pixels; all are of one size."""
        _, height, width, _ = self.arrays.shape
        return int(height * width)


Lazy = FileImages | ArrayImages
ImageSet = MemoryImages | Lazy
BROKEN_REPAIR = "repair or remove them, or set data.skip_broken: true to leave them out"


def from_files(root: Path, names: Sequence[str], labels: Tensor, *, skip_broken: bool) -> FileImages:
    """Return files and their labels (n, ...) as an image set, without opening them."""
    return FileImages(root, np.array([*map(os.fsencode, names)], dtype=np.bytes_), labels, skip_broken)


def images_of(
    listing: FolderListing | ShardListing, rows: Sequence[File] | Rows, *, skip_broken: bool = False
) -> FileImages:
    """Return images listed in a folder or its shards as an image set, without opening them."""
    if isinstance(rows, Rows):
        assert isinstance(listing, ShardListing)
        labels = torch.from_numpy(rows.labels)
        return ShardImages(listing.root, rows.names, labels, skip_broken, rows=rows, places=listing.places)
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return from_files(listing.root, [path for path, _ in rows], labels, skip_broken=skip_broken)


def labelled(images: ImageSet) -> ImageSet:
    """Return the images that have a label; those without one come after them."""
    n = int((images.labels != NO_LABEL).sum())
    if isinstance(images, MemoryImages):
        whole = images.whole and images.whole.first(n)
        return replace(images, still=images.still.first(n), labels=images.labels[:n], whole=whole)
    assert isinstance(images, FileImages), "only folders have unlabelled images"
    return replace(images, paths=images.paths[:n], labels=images.labels[:n])


def readable(images: Lazy) -> Iterator[tuple[int, Image.Image]]:
    """Yield each readable image with its index; raise DataError for broken ones, unless they are to be skipped."""
    for index in range(len(images)):
        try:
            yield index, images.whole(index)
        except BrokenImage as error:
            assert isinstance(images, FileImages)
            images.report_broken({index: str(error)})


def with_pixels(train: Lazy, val: Lazy, preprocess: Preprocess) -> tuple[tuple[Lazy, Lazy], Preprocess]:
    """Return images of one data set and what becomes of them, with the preprocessing's channels and the bits of the first image.

    Three channels are made of any image, 8 bits of each. Raises DataError for a named data set of other channels.
    """
    if isinstance(train, FileImages) and len(preprocess.mean) == 1:
        first = next((found for index in range(len(train)) if (found := train.stored(index))), RGB)
        preprocess = replace(preprocess, bits=first.bits)
    return (_with_pixel(train, preprocess.pixel), _with_pixel(val, preprocess.pixel)), preprocess


def _with_pixel(images: Lazy, pixel: Pixel) -> Lazy:
    if isinstance(images, FileImages):
        return replace(images, pixel=pixel)
    *sizes, channels = images.arrays.shape
    if channels not in (1, pixel.channels) or pixel.channels == 4:
        raise DataError(f"data.channels: these images have {channels}, got {pixel.channels}: leave it out")
    return replace(images, arrays=np.broadcast_to(images.arrays, (*sizes, pixel.channels)), pixel=pixel)


def largest_area(images: Lazy, *, at_most: int) -> int:
    """Return the largest image's area in pixels, from the headers, limited to `at_most`."""
    largest = 0
    for index in range(len(images) if at_most else 0):
        if (largest := max(largest, images.area(index))) >= at_most:
            return at_most
    return largest


def decode_all(images: Lazy, preprocess: Preprocess, *, area: int) -> MemoryImages:
    """Decode every image into memory, on all cores; with `area` > 0 also whole, shrunk to at most `area` pixels.

    Broken files are logged and left out if they are to be skipped; else DataError names them.
    """
    n, size, placed, pixel = len(images), preprocess.image_size, images.placed, images.pixel
    still = np.empty((n, pixel.channels, math.prod(size)), pixel.dtype)
    whole = np.zeros((n, pixel.channels, area), pixel.dtype)
    sizes, kept = np.full((n, 2), size), np.full((n, 2), size)
    fill = placed.begin(area) if placed else None
    broken: dict[int, str] = {}

    def decode(indices: range) -> None:
        for index in indices:
            try:
                image = images.whole(index)
                still[index] = flat(preprocess.pixels(image))
                height, width = _shrunk(image.size, area)
                if fill:
                    fill.put_(index, (height, width))
            except BrokenImage as error:
                broken[index] = str(error)
                continue
            if area:
                sizes[index], kept[index] = (image.height, image.width), (height, width)
                if (width, height) != image.size:
                    image = resize(image, (width, height), Image.Resampling.BILINEAR)
                whole[index, :, : height * width] = flat(values_of(image))

    cores = usable_cores()
    with ThreadPoolExecutor(cores) as threads:  # Pillow releases Python's lock
        list(threads.map(decode, (range(first, n, cores) for first in range(cores))))
    if isinstance(images, FileImages):
        images.report_broken(broken)
    good = np.setdiff1d(np.arange(n), list(broken))
    seen = torch.tensor(size).expand(len(good), 2)
    read = [torch.from_numpy(array[good] if broken else array) for array in (still, whole, sizes, kept)]
    whole_ones = Stored(read[1], read[2], read[3]) if area else None
    still_ones = Stored(read[0], seen, seen)
    truths = fill.filled(good, still_ones, whole_ones) if fill else None
    paths = images.paths[good] if isinstance(images, FileImages) else None
    return MemoryImages(still_ones, images.labels[good], whole_ones, images.broken, truths, paths)


def _shrunk(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Return the height and width that shrink an image of this (width, height) to at most `area` pixels (0: no limit)."""
    width, height = size
    factor = min(1.0, math.sqrt(area / (height * width))) if area else 1.0
    return max(int(height * factor), 1), max(int(width * factor), 1)


def flat(pixels: np.ndarray) -> np.ndarray:
    """Return values (height, width, channels) as (channels, height * width)."""
    return pixels.transpose(2, 0, 1).reshape(pixels.shape[2], -1)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return values (height, width, channels) as a tensor (channels, height, width)."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
