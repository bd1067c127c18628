"""Images with their labels: decoded in memory where they fit, files that are decoded when asked for where they do not."""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.decode import BrokenImage, describe_broken, read_image
from compress.data.folders import File
from compress.data.preprocess import Preprocess, square_pixels
from compress.errors import DataError

MEMORY_BYTES = 1_500_000_000  # a data set whose decoded images fit is decoded once
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images: `pixels` uint8 (n, 3, side, side), their centre crop being what evaluation sees; `labels` int64 (n,).

    `broken` names the files that were left out, with the reason.
    """

    pixels: Tensor
    labels: Tensor
    broken: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def whole(self, index: int) -> Tensor:
        """Return an image's pixels (3, side, side), as much of them as is kept."""
        return self.pixels[index]

    def pixels_on(self, device: torch.device) -> Tensor:
        """Return the pixels on the device; the first call copies them there, and they stay."""
        if device not in self._on_device:
            self._on_device[device] = self.pixels.to(device)
        return self._on_device[device]


@dataclass(frozen=True)
class FileImages:
    """Image files that are decoded when asked for; `labels` int64 (n,) counts those that turn out broken, too.

    Paths are one numpy array of bytes: a million Python strings would be copied into every loader process.
    """

    root: Path
    paths: np.ndarray
    labels: Tensor
    skip_broken: bool
    broken: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the file's path relative to the root."""
        return os.fsdecode(self.paths[index])

    def whole(self, index: int) -> Image.Image:
        """Return one decoded RGB image; raise `BrokenImage` where that fails."""
        return read_image(self.root / self.name(index))

    def report_broken(self, found: dict[int, str]) -> None:
        """Log newly found broken images (by index, with the reason) where they are to be skipped; raise `DataError` where they are not."""
        new = {self.name(index): reason for index, reason in found.items() if self.name(index) not in self.broken}
        if not new:
            return
        if not self.skip_broken:
            raise DataError(f"{self.root}: {describe_broken(new, len(self))}; {REPAIR}")
        self.broken.update(new)
        log.error("%s: left out: %s", self.root, describe_broken(new, len(self)))


@dataclass(frozen=True)
class ArrayImages:
    """Images of a named data set at their own size, uint8 (n, height, width, 3), resized when asked for; `labels` int64 (n,)."""

    arrays: np.ndarray
    labels: Tensor
    broken: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)  # none: they are in memory

    def __len__(self) -> int:
        return len(self.labels)

    def whole(self, index: int) -> Image.Image:
        """Return one RGB image."""
        return Image.fromarray(self.arrays[index])


ImageSet = MemoryImages | FileImages | ArrayImages
REPAIR = "repair or remove them, or set data.skip_broken: true to leave them out"


def from_files(root: Path, files: Sequence[File], *, skip_broken: bool) -> FileImages:
    """Return the listed files as an image set; nothing is opened."""
    paths = np.array([os.fsencode(path) for path, _ in files], dtype=np.bytes_)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return FileImages(root, paths, labels, skip_broken)


def decode_all(images: FileImages | ArrayImages, preprocess: Preprocess, *, side: int) -> MemoryImages:
    """Decode every image into memory, on all cores.

    Raises `DataError` that counts and names the broken files, unless they are to be skipped: then they are logged and left out.
    """
    pixels = np.empty((len(images), 3, side, side), dtype=np.uint8)
    broken: dict[int, str] = {}

    def decode(indices: range) -> None:
        for index in indices:
            try:
                square = square_pixels(
                    images.whole(index), resize_to=preprocess.resize_to, side=side, centre=preprocess.image_size
                )
            except BrokenImage as error:
                broken[index] = str(error)
            else:
                pixels[index] = square.transpose(2, 0, 1)

    cores = usable_cores()
    with ThreadPoolExecutor(cores) as threads:  # Pillow decodes and resizes outside Python's lock
        list(threads.map(decode, (range(first, len(images), cores) for first in range(cores))))
    if isinstance(images, FileImages):
        images.report_broken(broken)
    good = np.setdiff1d(np.arange(len(images)), list(broken))
    return MemoryImages(torch.from_numpy(pixels[good] if broken else pixels), images.labels[good], images.broken)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def centre(pixels: Tensor, size: int) -> Tensor:
    """Return the middle (..., size, size) of square images."""
    offset = (pixels.shape[-1] - size) // 2
    return pixels[..., offset : offset + size, offset : offset + size]


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return uint8 (height, width, 3) as a tensor (3, height, width)."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
