"""Batches of a data set as a run draws them, without a recipe."""

from collections.abc import Iterator

import torch

from compress.data import batches
from compress.data.augment import Augmentation
from compress.data.batches import Batch
from compress.data.dataset import Dataset
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
    balance: bool = False,
) -> Iterator[Batch]:
    """Return a rank's share of an epoch."""
    shares = batches.epoch_shares(
        data.train, batch_size, seed=seed, epoch=epoch, rank=rank, ranks=ranks, balance=balance
    )
    shown = batches.view_batches(
        data, shares, augmentation=augmentation, seed=seed, view=view, workers=workers, device=CPU
    )
    return batches.train_batches(data, shown, batch_size)


def eval_batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int | None = 0,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Return the images unchanged and in order."""
    shares = batches.in_order(len(images), limit).split(batch_size)
    return batches.eval_batches(images, preprocess, shares, workers=workers, device=CPU)
