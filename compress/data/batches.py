"""Batches for training and evaluation, on the device, normalized.

Every training view is a function of (seed, epoch, image) alone: the number of loader processes, ranks or resumes changes nothing. Pixels
stay uint8 until they are on the device.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from compress.data.augment import Augmentation, batch_transforms, image_transform
from compress.data.dataset import Dataset
from compress.data.decode import BrokenImage
from compress.data.images import FileImages, ImageSet, MemoryImages, to_tensor
from compress.data.preprocess import Preprocess, eval_pixels
from compress.data.views import apply_boxes, draw_boxes
from compress.errors import DataError


class Batch(NamedTuple):
    """Images float32 (n, 3, image_size, image_size), channels_last, normalized; targets int64 (n,), or float32 (n, classes) when mixed."""

    images: Tensor
    targets: Tensor


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of batches in an epoch: the ragged last one is dropped unless it is the only one."""
    return max(num_images // batch_size, 1)


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int | None,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield this rank's share of an epoch's batches; `batch_size` counts the images of all ranks together.

    Raises `DataError` for a broken image that is not to be skipped, and for fewer images in a batch than ranks.
    """
    images, size = dataset.train, dataset.preprocess.image_size
    shares = _shares(len(images), batch_size, seed=seed, epoch=epoch, rank=rank, ranks=ranks)
    if isinstance(images, MemoryImages) and not augmentation.randaugment:
        raw = _memory_views(images, shares, augmentation, size, seed=_derived_seed(seed, epoch, "views"), device=device)
    else:
        view = _random_view(images, augmentation, dataset.preprocess, seed=_derived_seed(seed, epoch, "views"))
        raw = _loaded(images, view, shares, workers=workers, device=device)
    mixes = batch_transforms(augmentation, len(dataset.classes))
    for step, (pixels, labels) in enumerate(raw):
        if not len(labels):
            raise DataError(
                f"{dataset.name}: not one image of a batch can be read; check the folder, or raise the batch size"
            )
        batch = _normalized(pixels, labels, dataset.preprocess)
        if mixes:
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(_derived_seed(seed, epoch, "mix", step, rank))
                mixed, targets = mixes[int(torch.randint(len(mixes), ()))](*batch)
            batch = Batch(mixed.contiguous(memory_format=torch.channels_last), targets)
        yield batch


def eval_batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    device: torch.device,
    workers: int | None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yield all images in order and without chance, on every rank alike; `limit` takes so many, evenly spaced over the set."""
    n = len(images)
    chosen = torch.arange(n) if limit is None or limit >= n else torch.arange(limit) * n // limit
    shares = torch.split(chosen, batch_size)
    if isinstance(images, MemoryImages):
        raw = _memory_pixels(images, shares, preprocess.image_size, device=device)
    else:
        raw = _loaded(images, _still_view(images, preprocess), shares, workers=workers, device=device)
    for pixels, labels in raw:
        if len(labels):
            yield _normalized(pixels, labels, preprocess)


Raw = tuple[Tensor, Tensor]
"""Pixels 0..255 (n, 3, image_size, image_size) and labels int64 (n,), both on the device."""


def _derived_seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _shares(n: int, batch_size: int, *, seed: int, epoch: int, rank: int, ranks: int) -> list[Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_derived_seed(seed, epoch, "order")))
    shares = [batch[rank::ranks] for batch in torch.split(order, batch_size)[: steps_per_epoch(n, batch_size)]]
    if len(shares[-1]) == 0:
        raise DataError(
            f"batch_size: {min(batch_size, n)} images cannot be shared by {ranks} ranks; raise it or use fewer ranks"
        )
    return shares


def _normalized(pixels: Tensor, labels: Tensor, preprocess: Preprocess) -> Batch:
    mean, std = (torch.tensor(part, device=pixels.device).view(3, 1, 1) for part in (preprocess.mean, preprocess.std))
    images = pixels.float().div_(255).sub_(mean).div_(std)  # three times as fast before the layout changes as after
    return Batch(images.contiguous(memory_format=torch.channels_last), labels)


def _centre(pixels: Tensor, size: int) -> Tensor:
    offset = (pixels.shape[-1] - size) // 2
    return pixels[..., offset : offset + size, offset : offset + size]


def _memory_pixels(images: MemoryImages, shares: Sequence[Tensor], size: int, *, device: torch.device) -> Iterator[Raw]:
    pixels = _centre(images.pixels_on(device), size)
    labels = images.labels.to(device)
    for share in shares:
        indices = share.to(device)
        yield pixels[indices], labels[indices]


def _memory_views(
    images: MemoryImages,
    shares: Sequence[Tensor],
    augmentation: Augmentation,
    size: int,
    *,
    seed: int,
    device: torch.device,
) -> Iterator[Raw]:
    if augmentation.crop == "none" and not augmentation.flip:
        yield from _memory_pixels(images, shares, size, device=device)
        return
    pixels = images.pixels_on(device)
    if augmentation.crop != "random_resized":
        pixels = _centre(pixels, size)
    generator = torch.Generator().manual_seed(seed)
    boxes = draw_boxes(augmentation, len(images), side=pixels.shape[-1], image_size=size, generator=generator).to(
        device
    )
    labels = images.labels.to(device)
    for share in shares:
        indices = share.to(device)
        yield apply_boxes(pixels[indices], boxes[indices], size), labels[indices]


View = Callable[[int], Tensor]
"""Gives an image's pixels uint8 (3, image_size, image_size); raises `BrokenImage`."""


def _random_view(images: ImageSet, augmentation: Augmentation, preprocess: Preprocess, *, seed: int) -> View:
    transform = image_transform(augmentation, preprocess.image_size)
    seeds = torch.randint(2**62, (len(images),), generator=torch.Generator().manual_seed(seed))
    still = _still_view(images, preprocess)

    def view(index: int) -> Tensor:
        source = images.whole(index) if augmentation.crop == "random_resized" else still(index)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(seeds[index]))
            changed: Tensor = transform(source)
        return changed

    return view


def _still_view(images: ImageSet, preprocess: Preprocess) -> View:
    if isinstance(images, MemoryImages):
        centre = _centre(images.pixels, preprocess.image_size)
        return lambda index: centre[index]
    return lambda index: to_tensor(eval_pixels(images.whole(index), preprocess))


class _Loaded(NamedTuple):
    pixels: Tensor
    labels: Tensor
    broken: dict[int, str]


class _Reader(TorchDataset[_Loaded]):
    """Makes one batch from its images' indices; runs in the loader processes."""

    def __init__(self, images: ImageSet, view: View) -> None:
        self.images = images
        self.view = view

    def __getitem__(self, indices: list[int]) -> _Loaded:
        views: list[Tensor] = []
        kept: list[int] = []
        broken: dict[int, str] = {}
        for index in indices:
            try:
                views.append(self.view(index))
                kept.append(index)
            except BrokenImage as error:
                broken[index] = str(error)
        return _Loaded(torch.stack(views) if views else torch.empty(0), self.images.labels[kept], broken)


def _loaded(
    images: ImageSet, view: View, shares: Sequence[Tensor], *, workers: int | None, device: torch.device
) -> Iterator[Raw]:
    loader = DataLoader(
        _Reader(images, view),
        batch_size=None,  # each key is a batch already
        sampler=[share.tolist() for share in shares],
        num_workers=min(_num_workers(images, device) if workers is None else workers, len(shares)),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # keeps the loader from drawing its own seed out of the training's
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads; the loader's processes call nothing that waits on them.
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = iter(loader)
    for pixels, labels, broken in batches:
        if isinstance(images, FileImages):
            images.report_broken(broken)
        yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _num_workers(images: ImageSet, device: torch.device) -> int:
    """Choose loader processes: each core this rank can use, none where images are in memory and the cores are training."""
    if isinstance(images, MemoryImages) and device.type == "cpu":
        return 0
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
