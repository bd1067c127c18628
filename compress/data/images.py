"""Images with their labels: decoded in memory where they fit, files that are decoded when asked for where they do not."""

import io
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

from compress.data.views import Boxes, Draws
from export.errors import DataError
from export.images.decode import BrokenImage, describe_broken, longer_side, read_image
from export.images.folders import File
from export.images.preprocess import Preprocess

MEMORY_BYTES = 1_500_000_000  # a data set whose decoded images fit is decoded once
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Canvases:
    """Images in memory, each in the top left corner of `pixels` uint8 (n, 3, side, side); `sizes` (n, 2) are their own heights and widths.

    What was longer than the side was shrunk to it.
    """

    pixels: Tensor
    sizes: Tensor
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def image(self, index: int) -> Image.Image:
        """Return what one image fills of its canvas."""
        height, width = self.sizes[index].clamp(max=self.pixels.shape[-1]).tolist()
        return Image.fromarray(self.pixels[index, :, :height, :width].permute(1, 2, 0).contiguous().numpy())

    def boxes(self, draws: Draws, chosen: Tensor) -> Boxes:
        """Return the boxes of the chosen images (m,) on their canvases."""
        sizes = self.sizes[chosen]
        return draws.boxes(chosen, sizes).scaled(sizes.clamp(max=self.pixels.shape[-1]) / sizes)

    def pixels_on(self, device: torch.device) -> Tensor:
        """Return the pixels on the device; the first call copies them there, and they stay."""
        if device not in self._on_device:
            self._on_device[device] = self.pixels.to(device)
        return self._on_device[device]


@dataclass(frozen=True)
class MemoryImages:
    """Decoded images: as evaluation sees them, and where they are trained on with random crops, also whole; `labels` int64 (n,).

    `broken` names the files that were left out, with the reason.
    """

    still: Canvases
    labels: Tensor
    whole: Canvases | None = None
    broken: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def place(self) -> str:
        """Say where the images are while they are trained on."""
        side = self.whole.pixels.shape[-1] if self.whole else 0
        return f"in memory, whole, shrunk to {side} pixels a side where longer" if side else "in memory"

    def canvases(self, *, whole: bool) -> Canvases:
        """Return the images whole, or as evaluation sees them."""
        found = self.whole if whole else self.still
        assert found is not None, "opened for an augmentation without random crops"
        return found


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

    @property
    def place(self) -> str:
        """Say where the images are while they are trained on."""
        return "in their files, decoded anew for each view"

    def name(self, index: int) -> str:
        """Return the file's path relative to the root."""
        return os.fsdecode(self.paths[index])

    def whole(self, index: int) -> Image.Image:
        """Return one decoded RGB image; raise `BrokenImage` where that fails."""
        return read_image(self.root / self.name(index), upright=True)

    def longer_side(self, index: int) -> int:
        """Return an image's longer side in pixels, 0 where its header cannot be read."""
        return longer_side(self.root / self.name(index))

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
    """Images of a named data set at their own size, uint8 (n, height, width, 3), each resized when asked for; `labels` int64 (n,)."""

    arrays: np.ndarray
    labels: Tensor
    broken: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)  # none: they are in memory

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def place(self) -> str:
        """Say where the images are while they are trained on."""
        return "in memory at their own size, resized anew for each view"

    def whole(self, index: int) -> Image.Image:
        """Return one RGB image."""
        return Image.fromarray(self.arrays[index])

    def file(self, index: int) -> bytes:
        """Return one image as a BMP file, whose bytes are the same whichever library writes it."""
        stream = io.BytesIO()
        self.whole(index).save(stream, "BMP")
        return stream.getvalue()

    def longer_side(self, _: int) -> int:
        """Return an image's longer side in pixels; all are of one size."""
        _, height, width, _ = self.arrays.shape
        return int(max(height, width))


ImageSet = MemoryImages | FileImages | ArrayImages
REPAIR = "repair or remove them, or set data.skip_broken: true to leave them out"


def from_files(root: Path, files: Sequence[File], *, skip_broken: bool) -> FileImages:
    """Return the listed files as an image set; nothing is opened."""
    paths = np.array([os.fsencode(path) for path, _ in files], dtype=np.bytes_)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return FileImages(root, paths, labels, skip_broken)


def canvas_side(images: FileImages | ArrayImages, *, at_most: int) -> int:
    """Return the longest side of the images in pixels, by their headers, but at most so many."""
    longest = 0
    for index in range(len(images)):
        if longest == at_most:
            break
        longest = max(longest, min(at_most, images.longer_side(index)))
    return longest


def decode_all(images: FileImages | ArrayImages, preprocess: Preprocess, *, whole_side: int) -> MemoryImages:
    """Decode every image into memory, on all cores; also whole, on canvases of `whole_side`, where that is not 0.

    Raises `DataError` that counts and names the broken files, unless they are to be skipped: then they are logged and left out.
    """
    n, size = len(images), preprocess.image_size
    still = np.empty((n, 3, size, size), dtype=np.uint8)
    whole = np.zeros((n, 3, whole_side, whole_side), dtype=np.uint8)
    sizes = np.zeros((n, 2), dtype=np.int64)
    broken: dict[int, str] = {}

    def decode(indices: range) -> None:
        for index in indices:
            try:
                image = images.whole(index)
                still[index] = preprocess.pixels(image).transpose(2, 0, 1)
            except BrokenImage as error:
                broken[index] = str(error)
                continue
            sizes[index] = image.height, image.width
            if whole_side:
                width, height = (min(length, whole_side) for length in image.size)
                if (width, height) != image.size:
                    image = image.resize((width, height), Image.Resampling.BILINEAR)
                whole[index, :, :height, :width] = np.asarray(image).transpose(2, 0, 1)

    cores = usable_cores()
    with ThreadPoolExecutor(cores) as threads:  # Pillow decodes and resizes outside Python's lock
        list(threads.map(decode, (range(first, n, cores) for first in range(cores))))
    if isinstance(images, FileImages):
        images.report_broken(broken)
    good = np.setdiff1d(np.arange(n), list(broken))
    kept = [torch.from_numpy(array[good] if broken else array) for array in (still, whole, sizes)]
    squares = Canvases(kept[0], torch.full((len(good), 2), size))
    return MemoryImages(squares, images.labels[good], Canvases(kept[1], kept[2]) if whole_side else None, images.broken)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return uint8 (height, width, 3) as a tensor (3, height, width)."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
