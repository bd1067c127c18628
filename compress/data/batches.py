"""Batches for training and evaluation, on the device, normalized.

Every training view is a function of (seed, view, image) alone, whatever the batch and the number of loader processes,
ranks or resumes. So a view can be shown again, and a teacher's logits for it can be cached. Pixels are uint8 until they
are on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compress.data.images import ImageSet, MemoryImages
from compress.data.loader import Raw, loaded, still_view
from compress.data.mixing import Mixes, mix
from compress.data.views import Draws, cut
from export.images.listing import NO_LABEL
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


def mixed(batch: Batch, shown: Tensor, share: Tensor, mixes: Mixes, *, classes: int) -> tuple[Batch, Tensor]:
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
            yield normalized(raw, preprocess)


def balanced(labels: Tensor) -> Tensor:
    """Return each image's weight (n,), with which all classes are drawn equally often.

    Images without a label are drawn as often as without weights.
    """
    known = labels != NO_LABEL
    counts = torch.bincount(labels[known]).clamp(min=1)
    weights = torch.ones(len(labels))
    weights[known] = (int(known.sum()) / len(labels[known].unique()) / counts)[labels[known]].float()
    return weights


def normalized(raw: Raw, preprocess: Preprocess) -> Batch:
    """Return a batch as float32; an empty one as it is."""
    device = raw.pixels.device
    if not len(raw.indices):
        return Batch(raw.pixels, raw.truths)
    mean, std = (_channels(part, device) for part in (preprocess.mean, preprocess.std))
    images = (
        (raw.pixels.flip(1) if preprocess.look.bgr else raw.pixels)
        .float()
        .div_(preprocess.pixel.largest)
        .sub_(mean)
        .div_(std)
    )  # three times slower in channels_last
    return Batch(images.contiguous(memory_format=torch.channels_last), raw.truths)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return one number per channel (channels, 1, 1), copied to the device once, as a copy waits for its queued work."""
    with torch.inference_mode(False):  # the first call may come from an evaluation
        return torch.tensor(values, device=device).view(-1, 1, 1)


def _memory_pixels(images: MemoryImages, shares: Sequence[Tensor], *, device: torch.device) -> Iterator[Raw]:
    for share in shares:
        truths = images.labels[share] if images.placed is None else images.placed.still(share)
        yield Raw(images.still.images(share, device), truths.to(device, non_blocking=True), share)


def memory_views(
    images: MemoryImages, shares: Sequence[Tensor], draws: Draws, size: Size, *, device: torch.device
) -> Iterator[Raw]:
    """Yield the views of images in memory, cut on the device."""
    if draws.augmentation.crop == "none" and not draws.augmentation.flip:
        yield from _memory_pixels(images, shares, device=device)
        return
    whole = draws.augmentation.crop == "random_resized"
    stored = images.stored(whole=whole)
    boxes = stored.boxes(draws, torch.arange(len(images))).to(device)
    for share in shares:
        indices = share.to(device, non_blocking=True)
        chosen, placed = boxes[indices], images.placed
        truths = (
            images.labels[share].to(device, non_blocking=True)
            if placed is None
            else placed.seen(share, chosen, size, whole=whole)
        )
        yield Raw(cut(stored.images(share, device), chosen, size), truths, share)
