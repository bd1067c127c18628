"""Make batches image by image, in loader processes where that pays: from files, or from memory if pixel values change."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from compress.data.augment import colours
from compress.data.images import ArrayImages, FileImages, ImageSet, MemoryImages, to_tensor
from compress.data.views import Draws, cut
from compress.ranks import local_ranks
from export.images.decode import BrokenImage, values_of
from export.images.preprocess import Preprocess
from export.runtime.environment import usable_cores

CPU = torch.device("cpu")


class Raw(NamedTuple):
    """Pixels from 0 to their type's largest (n, channels, height, width) and truths (n, ...) on the device, image numbers int64 (n,) on the CPU."""

    pixels: Tensor
    truths: Tensor
    indices: Tensor


View = Callable[[int], tuple[Tensor, Tensor]]
"""(image number) to its pixels (channels, height, width) and its truth (...); raises BrokenImage."""


def random_view(images: ImageSet, draws: Draws, preprocess: Preprocess, *, seed: int) -> View:
    """Return an augmented view: boxes by the draws, pixel values changed by (seed, image)."""
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
            pixels = to_tensor(values_of(image) if whole else preprocess.pixels(image))[None]
            boxes = draws.boxes(one, torch.tensor([pixels.shape[2:]]))
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(seeds[index]))
            changed: Tensor = transform(cut(pixels, boxes, size)[0])
        placed = images.placed
        return changed, (placed.seen(one, boxes, size, whole=whole) if placed else images.labels[one])[0]

    return view


def still_view(images: FileImages | ArrayImages, preprocess: Preprocess) -> View:
    """Return the view of evaluation, without random changes."""

    def view(index: int) -> tuple[Tensor, Tensor]:
        one, placed = torch.tensor([index]), images.placed
        pixels = to_tensor(preprocess.pixels(images.whole(index)))
        return pixels, (placed.still(one) if placed else images.labels[one])[0]

    return view


class _Loaded(NamedTuple):
    raw: Raw
    broken: dict[int, str]


class _Batches(TorchDataset[_Loaded]):
    """Makes a batch from image numbers, in a loader process."""

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
    """Yield the shares' batches in order; with `workers` None the number of processes is chosen.

    Broken images that are to be skipped are left out, so a batch can be empty. Raises DataError for other broken images.
    """
    processes = min(_num_workers(images, device) if workers is None else workers, len(shares))
    loader = DataLoader(
        _Batches(images, view),
        batch_size=None,  # each entry of the sampler is a batch
        sampler=[share.tolist() for share in shares],
        num_workers=processes,
        multiprocessing_context="fork" if processes else None,  # views are closures, which cannot be pickled
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or the loader would draw its seed from the training's generator
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork of a process with threads; the loader's processes wait for none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = iter(loader)
    for (pixels, truths, indices), broken in batches:
        if isinstance(images, FileImages):
            images.report_broken(broken)
        yield Raw(pixels.to(device, non_blocking=True), truths.to(device, non_blocking=True), indices)


def _num_workers(images: ImageSet, device: torch.device) -> int:
    """Return the number of loader processes: one per core of this rank, none if images are in memory and the CPU trains."""
    if isinstance(images, MemoryImages) and device.type == "cpu":
        return 0
    return max(usable_cores() // local_ranks(), 1)
