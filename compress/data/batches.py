"""Batches for training and evaluation, on the device, normalized.

Every training view is a function of (seed, view, image) alone, whatever the batch and the number of loader processes,
ranks or resumes. So a view can be shown again, and a teacher's logits for it can be cached. Pixels are uint8 until they
are on the device.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compress.data.augment import Augmentation
from compress.data.dataset import Dataset
from compress.data.images import UNLABELLED, FileImages, ImageSet, MemoryImages
from compress.data.loader import Raw, loaded, random_view, still_view
from compress.data.mixing import Mixes, draw_mixes, mix
from compress.data.views import Draws, cut, draw
from compress.ranks import gather
from export.errors import DataError
from export.images.preprocess import Preprocess
from export.images.read import spread
from export.images.size import Size


class Views(NamedTuple):
    """A batch's image numbers, int64 (n,) on the CPU, and the number of their view."""

    indices: Tensor
    view: int


class Batch(NamedTuple):
    """Images float32 (n, channels, height, width), channels_last, normalized, with targets (n, ...).

    Targets are labels int64 (n,), mixed or several ones float32 (n, classes), masks or boxes. Only training batches have `views`.
    `among` is the number of images over all ranks. `share` is there if the batch is split into micro-batches or over
    ranks: it takes a function that counts, in a part, what each loss is a mean over, int64 (losses,), and returns this
    part's fractions of the whole batch's counts.
    """

    images: Tensor
    targets: Tensor
    views: Views | None = None
    among: int | None = None
    share: "Callable[[Callable[[Batch], Tensor]], Tensor] | None" = None

    @property
    def total(self) -> int:
        """Number of images in the batch over all ranks."""
        return self.among or len(self.images)

    def split(self, size: int) -> "Iterator[Batch]":
        """Yield the batch in parts of at most `size` images."""
        for first in range(0, len(self.images), size):
            part = slice(first, first + size)
            views = self.views and Views(self.views.indices[part], self.views.view)
            yield Batch(self.images[part], self.targets[part], views)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of batches in an epoch; a smaller last one is dropped unless it is the only one."""
    return max(num_images // batch_size, 1)


def epoch_shares(
    images: ImageSet, batch_size: int, *, seed: int, epoch: int, rank: int, ranks: int, balance: bool
) -> list[Tensor]:
    """Return a rank's share of each of an epoch's batches as the images' numbers, shuffled by seed and epoch.

    `batch_size` is over all ranks. With `balance` images are drawn with replacement, all classes equally often. Raises
    DataError for fewer images in a batch than ranks.
    """
    if balance and (images.placed is not None or images.labels.ndim > 1):
        raise DataError("data.balance: needs images with one label each: leave it out")
    n, generator = len(images), torch.Generator().manual_seed(_derived_seed(seed, epoch, "order"))
    if balance:
        order = torch.multinomial(balanced(images.labels), n, replacement=True, generator=generator)
    else:
        order = torch.randperm(n, generator=generator)
    shares = [batch[rank::ranks] for batch in torch.split(order, batch_size)[: steps_per_epoch(n, batch_size)]]
    if len(shares[-1]) == 0:
        raise DataError(
            f"batch_size: {min(batch_size, n)} images cannot be shared by {ranks} ranks; raise it or use fewer ranks"
        )
    return shares


def train_batches(dataset: Dataset, batches: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield an epoch's batches with their number of images over all ranks; DataError if one has no image on this rank."""
    for batch in batches:
        if not len(batch.targets):
            raise DataError(
                f"{dataset.name}: no image of a batch can be read; check the folder, or raise the batch size"
            )
        skips = isinstance(dataset.train, FileImages) and dataset.train.skip_broken
        yield batch._replace(among=sum(gather(len(batch.targets))) if skips else min(batch_size, len(dataset.train)))


def view_batches(
    dataset: Dataset,
    shares: Sequence[Tensor],
    *,
    augmentation: Augmentation,
    seed: int,
    view: int,
    workers: int | None,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield the training images of each share (indices) under one view, without broken images that are to be skipped."""
    images, size = dataset.train, dataset.preprocess.image_size
    mixes = draw_mixes(augmentation, len(images), size=size, seed=_derived_seed(seed, view, "mix"))
    shown = shares if mixes is None else [torch.cat([share, mixes.partner[share]]) for share in shares]
    views_seed = _derived_seed(seed, view, "views")
    draws = draw(augmentation, len(images), size=size, seed=views_seed)
    if isinstance(images, MemoryImages) and not augmentation.changes_colours:
        raws = _memory_views(images, shown, draws, size, device=device)
    else:
        change = random_view(images, draws, dataset.preprocess, seed=views_seed)
        raws = loaded(images, change, shown, workers=workers, device=device)
    for share, raw in zip(shares, raws, strict=True):
        batch = _normalized(raw, dataset.preprocess)
        indices = raw.indices
        if mixes is not None and len(indices):
            batch, indices = _mixed(batch, indices, share, mixes, classes=len(dataset.classes))
        yield batch._replace(views=Views(indices, view))


def _mixed(batch: Batch, shown: Tensor, share: Tensor, mixes: Mixes, *, classes: int) -> tuple[Batch, Tensor]:
    """Mix the share's images with their partners, which follow them in the batch; without a readable partner, with none."""
    row = {index: place for place, index in reversed(list(enumerate(shown.tolist())))}
    own = [index for index in share.tolist() if index in row]
    rows = torch.tensor([row[index] for index in own], device=batch.images.device)
    partners = [row.get(partner, row[index]) for index, partner in zip(own, mixes.partner[own].tolist(), strict=True)]
    others = torch.tensor(partners, device=batch.images.device)
    images, targets = batch.images[rows], batch.targets[rows]
    chosen = mixes[torch.tensor(own, dtype=torch.int64)]
    images, targets = mix(images, targets, batch.images[others], batch.targets[others], chosen, classes=classes)
    return Batch(images.contiguous(memory_format=torch.channels_last), targets), torch.tensor(own, dtype=torch.int64)


def in_order(n: int, limit: int | None = None) -> Tensor:
    """Return the numbers of n images, or `limit` of them in an order whose every prefix is spread over the set."""
    return torch.arange(n) if limit is None else torch.from_numpy(spread(n, limit))


def eval_batches(
    images: ImageSet, preprocess: Preprocess, shares: Sequence[Tensor], *, device: torch.device, workers: int | None
) -> Iterator[Batch]:
    """Yield the images of each share (numbers) unchanged."""
    if isinstance(images, MemoryImages):
        raws = _memory_pixels(images, shares, device=device)
    else:
        raws = loaded(images, still_view(images, preprocess), shares, workers=workers, device=device)
    for raw in raws:
        if len(raw.indices):
            yield _normalized(raw, preprocess)


def _derived_seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def balanced(labels: Tensor) -> Tensor:
    """Return each image's weight (n,), with which all classes are drawn equally often.

    Images without a label are drawn as often as without weights.
    """
    known = labels != UNLABELLED
    counts = torch.bincount(labels[known]).clamp(min=1)
    weights = torch.ones(len(labels))
    weights[known] = (int(known.sum()) / len(labels[known].unique()) / counts)[labels[known]].float()
    return weights


def _normalized(raw: Raw, preprocess: Preprocess) -> Batch:
    device = raw.pixels.device
    if not len(raw.indices):
        return Batch(raw.pixels, raw.truths)
    mean, std = (_channels(part, device) for part in (preprocess.mean, preprocess.std))
    images = (
        raw.pixels.float().div_(preprocess.pixel.largest).sub_(mean).div_(std)
    )  # three times slower in channels_last
    return Batch(images.contiguous(memory_format=torch.channels_last), raw.truths)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel (channels, 1, 1), copied to the device once, as a copy waits for its queued work."""
    with torch.inference_mode(False):  # the first call may come from an evaluation
        return torch.tensor(values, device=device).view(-1, 1, 1)


def _memory_pixels(images: MemoryImages, shares: Sequence[Tensor], *, device: torch.device) -> Iterator[Raw]:
    labels = images.labels.to(device)
    for share in shares:
        truths = labels[share.to(device, non_blocking=True)] if images.placed is None else images.placed.still(share)
        yield Raw(images.still.images(share, device), truths.to(device, non_blocking=True), share)


def _memory_views(
    images: MemoryImages, shares: Sequence[Tensor], draws: Draws, size: Size, *, device: torch.device
) -> Iterator[Raw]:
    if draws.augmentation.crop == "none" and not draws.augmentation.flip:
        yield from _memory_pixels(images, shares, device=device)
        return
    whole = draws.augmentation.crop == "random_resized"
    stored, labels = images.stored(whole=whole), images.labels.to(device)
    boxes = stored.boxes(draws, torch.arange(len(images))).to(device)
    for share in shares:
        indices = share.to(device, non_blocking=True)
        chosen, placed = boxes[indices], images.placed
        truths = labels[indices] if placed is None else placed.seen(share, chosen, size, whole=whole)
        yield Raw(cut(stored.images(share, device), chosen, size), truths, share)
