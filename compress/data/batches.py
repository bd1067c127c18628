"""Batches for training and evaluation, on the device, normalized.

Every training view is a function of (seed, epoch, image) alone: the number of loader processes, ranks or resumes changes nothing. Pixels
stay uint8 until they are on the device.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.data.augment import Augmentation, batch_transforms
from compress.data.dataset import Dataset
from compress.data.images import ImageSet, MemoryImages, centre
from compress.data.loader import Raw, loaded, random_view, still_view
from compress.data.preprocess import Preprocess
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
        view = random_view(images, augmentation, dataset.preprocess, seed=_derived_seed(seed, epoch, "views"))
        raw = loaded(images, view, shares, workers=workers, device=device)
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
        raw = loaded(images, still_view(images, preprocess), shares, workers=workers, device=device)
    for pixels, labels in raw:
        if len(labels):
            yield _normalized(pixels, labels, preprocess)


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


def _memory_pixels(images: MemoryImages, shares: Sequence[Tensor], size: int, *, device: torch.device) -> Iterator[Raw]:
    pixels = centre(images.pixels_on(device), size)
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
        pixels = centre(pixels, size)
    generator = torch.Generator().manual_seed(seed)
    boxes = draw_boxes(augmentation, len(images), side=pixels.shape[-1], image_size=size, generator=generator).to(
        device
    )
    labels = images.labels.to(device)
    for share in shares:
        indices = share.to(device)
        yield apply_boxes(pixels[indices], boxes[indices], size), labels[indices]
