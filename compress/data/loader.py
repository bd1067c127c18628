"""Make batches image by image, in loader processes where that pays: files, and images in memory whose colours change."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from compress.data.augment import colours
from compress.data.images import ArrayImages, FileImages, ImageSet, MemoryImages, to_tensor
from compress.data.views import Draws, cut
from compress.ranks import local_ranks
from export.images.decode import BrokenImage
from export.images.preprocess import Preprocess
from export.runtime.environment import usable_cores

CPU = torch.device("cpu")


class Raw(NamedTuple):
    """Pixels 0..255 (n, 3, image_size, image_size) and truths (n, ...), both on the device; which images they are, int64 (n,), on the CPU."""

    pixels: Tensor
    truths: Tensor
    indices: Tensor


View = Callable[[int], tuple[Tensor, Tensor]]
"""Gives an image's pixels uint8 (3, image_size, image_size) and its truth (...); raises `BrokenImage`."""


def random_view(images: ImageSet, draws: Draws, preprocess: Preprocess, *, seed: int) -> View:
    """Return the view of each image by its draws, with its colours by the seed and the image alone."""
    transform, size = colours(draws.augmentation), preprocess.image_size
    seeds = torch.randint(2**62, (len(images),), generator=torch.Generator().manual_seed(seed))
    whole = draws.augmentation.crop == "random_resized"

    def view(index: int) -> tuple[Tensor, Tensor]:
        one = torch.tensor([index])
        if isinstance(images, MemoryImages):
            stored = images.stored(whole=whole)
            pixels, boxes = stored.images(one, CPU), stored.boxes(draws, one)
        else:
            image = images.whole(index)
            pixels = to_tensor(np.asarray(image) if whole else preprocess.pixels(image))[None]
            boxes = draws.boxes(one, torch.tensor([pixels.shape[2:]]))
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(seeds[index]))
            changed: Tensor = transform(cut(pixels, boxes, size)[0])
        placed = images.placed
        return changed, (placed.seen(one, boxes, size, whole=whole) if placed else images.labels[one])[0]

    return view


def still_view(images: FileImages | ArrayImages, preprocess: Preprocess) -> View:
    """Return the view that evaluation sees."""

    def view(index: int) -> tuple[Tensor, Tensor]:
        one, placed = torch.tensor([index]), images.placed
        pixels = to_tensor(preprocess.pixels(images.whole(index)))
        return pixels, (placed.still(one) if placed else images.labels[one])[0]

    return view


class _Loaded(NamedTuple):
    raw: Raw
    broken: dict[int, str]


class _Reader(TorchDataset[_Loaded]):
    """Makes one batch from its images' indices; runs in the loader processes."""

    def __init__(self, images: ImageSet, view: View) -> None:
        self.images = images
        self.view = view

    def __getitem__(self, indices: list[int]) -> _Loaded:
        views: list[tuple[Tensor, Tensor]] = []
        kept: list[int] = []
        broken: dict[int, str] = {}
        for index in indices:
            try:
                views.append(self.view(index))
                kept.append(index)
            except BrokenImage as error:
                broken[index] = str(error)
        pixels, truths = map(torch.stack, zip(*views, strict=True)) if views else (torch.empty(0), torch.empty(0))
        return _Loaded(Raw(pixels, truths, torch.tensor(kept, dtype=torch.int64)), broken)


def loaded(
    images: ImageSet, view: View, shares: Sequence[Tensor], *, workers: int | None, device: torch.device
) -> Iterator[Raw]:
    """Yield the shares' batches in their order; `workers` None chooses the number of processes.

    Leaves out broken images that are to be skipped, be it all of a batch. Raises `DataError` for the others.
    """
    processes = min(_num_workers(images, device) if workers is None else workers, len(shares))
    loader = DataLoader(
        _Reader(images, view),
        batch_size=None,  # each key is a batch already
        sampler=[share.tolist() for share in shares],
        num_workers=processes,
        multiprocessing_context="fork" if processes else None,  # views are closures, which no other start can carry
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # keeps the loader from drawing its own seed out of the training's
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads; the loader's processes call nothing that waits on them.
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = iter(loader)
    for (pixels, truths, indices), broken in batches:
        if isinstance(images, FileImages):
            images.report_broken(broken)
        yield Raw(pixels.to(device, non_blocking=True), truths.to(device, non_blocking=True), indices)


def _num_workers(images: ImageSet, device: torch.device) -> int:
    """Choose loader processes: each core this rank can use, none where images are in memory and the cores are training."""
    if isinstance(images, MemoryImages) and device.type == "cpu":
        return 0
    return max(usable_cores() // local_ranks(), 1)
