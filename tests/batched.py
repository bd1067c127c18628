"""Batches of a data set as a run draws them, without a recipe."""

from collections.abc import Iterator

import torch

from compress.data import batches
from compress.data.augment import Augmentation
from compress.data.batches import Batch
from compress.data.dataset import Dataset
from compress.data.feed import Feed
from compress.data.images import ImageSet
from export.images.preprocess import Preprocess

CPU = torch.device("cpu")


def train_batches(
    data: Dataset,
    *,
    batch_size: int,
    augmentation: Augmentation,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int | None = 0,
) -> Iterator[Batch]:
    """Return a rank's share of an epoch."""
    feed = Feed(data, augmentation, CPU, seed, batch_size, workers, balanced=False, rank=rank, ranks=ranks)
    return feed.training(batch_size, epoch=epoch, view=view)


def eval_batches(
    images: ImageSet, preprocess: Preprocess, *, batch_size: int, workers: int | None = 0, limit: int | None = None
) -> Iterator[Batch]:
    """Return the images unchanged and in order."""
    shares = batches.in_order(len(images), limit).split(batch_size)
    return batches.eval_batches(images, preprocess, shares, workers=workers, device=CPU)
