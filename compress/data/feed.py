"""A data set's images in batches, as each stage wants them: to train, to calibrate, to choose, to judge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.augment import Augmentation
from compress.data.batches import Batch, epoch_shares, eval_batches, in_order, train_batches, view_batches
from compress.data.dataset import Dataset
from compress.data.images import ImageSet
from compress.data.split import sampled

CALIBRATION_BATCH = 32
TUNING_IMAGES = 2000


@dataclass(frozen=True)
class Feed:
    """What turns a data set into batches on a device; the same on every rank but for `rank`."""

    dataset: Dataset
    augmentation: Augmentation
    device: torch.device
    seed: int
    batch_size: int  # of images without augmentation
    workers: int | None
    balanced: bool  # draw all classes equally often in training
    rank: int = 0
    ranks: int = 1

    def validation(self, *, limit: int | None = None, shared: bool = False) -> Iterator[Batch]:
        """Return the validation batches in order; `limit` takes n images, spread over the set, `shared` this rank's part."""
        images = self.dataset.val
        shares = in_order(len(images), limit).split(self.batch_size)
        return self._unchanged(images, shares[self.rank :: self.ranks] if shared else shares)

    def calibration(self, images: int, *, labelled: bool = False) -> Iterator[Batch]:
        """Return n unaugmented training images in batches, spread over the set; `labelled` excludes others."""
        shown = self.dataset.train if labelled else self.dataset.with_unlabelled.train
        return self._unchanged(shown, in_order(len(shown), images).split(min(self.batch_size, CALIBRATION_BATCH)))

    def tuning(self) -> Iterator[Batch]:
        """Return the tuning split: unaugmented training images, drawn by seed, on which stages choose."""
        images = self.dataset.train
        # Without classes all images are one stratum.
        strata = torch.zeros(len(images), dtype=torch.int64) if images.labels.is_floating_point() else images.labels
        chosen = sampled(strata.numpy(), len(self.dataset.classes), images=TUNING_IMAGES, seed=self.seed)
        return self._unchanged(images, torch.from_numpy(chosen).split(self.batch_size))

    def views(self, images: int) -> Iterator[Batch]:
        """Return n augmented training images in batches, spread over the set, the same on every rank."""
        n = len(self.dataset.train)
        chosen = torch.arange(min(images, n)) * n // min(images, n)
        return self.view(0, chosen.split(CALIBRATION_BATCH))

    def view(self, number: int, shares: Sequence[Tensor]) -> Iterator[Batch]:
        """Return the training images of each share (indices) under one augmented view, without broken ones."""
        return (batch for batch in self._shown(number, shares) if len(batch.targets))

    def training(self, batch_size: int, *, epoch: int, view: int) -> Iterator[Batch]:
        """Return this rank's share of an epoch's batches, under one view; `batch_size` is over all ranks."""
        shares = epoch_shares(
            self.dataset.train,
            batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            ranks=self.ranks,
            balance=self.balanced,
        )
        return train_batches(self.dataset, self._shown(view, shares), batch_size)

    def _unchanged(self, images: ImageSet, shares: Sequence[Tensor]) -> Iterator[Batch]:
        return eval_batches(images, self.dataset.preprocess, shares, device=self.device, workers=self.workers)

    def _shown(self, view: int, shares: Sequence[Tensor]) -> Iterator[Batch]:
        return view_batches(
            self.dataset,
            shares,
            augmentation=self.augmentation,
            seed=self.seed,
            view=view,
            workers=self.workers,
            device=self.device,
        )


def as_numpy(batches: Iterator[Batch]) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Yield (images (n, channels, height, width), truths (n, ...)) as contiguous arrays for ONNX Runtime."""
    for batch in batches:
        yield batch.images.cpu().contiguous().numpy(), batch.targets.cpu().numpy()
