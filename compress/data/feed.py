"""A data set's images in batches, as each stage wants them: to train, to calibrate, to choose, to judge."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.augment import Augmentation
from compress.data.batches import (
    Batch,
    Views,
    balanced,
    eval_batches,
    in_order,
    memory_views,
    mixed,
    normalized,
    steps_per_epoch,
)
from compress.data.dataset import Dataset
from compress.data.images import FileImages, ImageSet, MemoryImages
from compress.data.loader import loaded, random_view
from compress.data.mixing import draw_mixes
from compress.data.split import sampled
from compress.data.views import draw
from compress.ranks import gather
from export.errors import DataError
from export.images.preprocess import Preprocess

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
    seen: Callable[[int], None] = lambda _: (
        None
    )  # gets the number of images of each batch without augmentation, once it was used

    def validation(self, *, limit: int | None = None, shared: bool = False) -> Iterator[Batch]:
        """Return the validation batches in order; `limit` takes n images, spread over the set, `shared` this rank's part."""
        images = self.dataset.val
        shares = in_order(len(images), limit).split(self.batch_size)
        return self._unchanged(images, shares[self.rank :: self.ranks] if shared else shares)

    def chosen(self, numbers: Tensor) -> Batch:
        """Return the validation images of these numbers, one batch."""
        return next(self._unchanged(self.dataset.val, [numbers]))

    def calibration(self, images: int, *, labelled: bool = False) -> Iterator[Batch]:
        """Return n unaugmented training images in batches, spread over the set; `labelled` excludes others."""
        shown = self.dataset.train if labelled else self.dataset.with_unlabelled.train
        return self._unchanged(shown, in_order(len(shown), images).split(min(self.batch_size, CALIBRATION_BATCH)))

    def calibration_names(self, images: int) -> list[str]:
        """Return the files of the readable images that `calibration` gives, in its order, once it has read them."""
        shown = self.dataset.with_unlabelled.train
        names = map(shown.name, in_order(len(shown), images).tolist())
        return [name for name in names if name not in shown.broken]

    def tuning(self, *, limit: int | None = None) -> Iterator[Batch]:
        """Return the tuning split: unaugmented training images, drawn by seed, on which stages choose; `limit` as in validation."""
        images = self.dataset.train
        # Without classes all images are one stratum.
        strata = torch.zeros(len(images), dtype=torch.int64) if images.labels.is_floating_point() else images.labels
        chosen = sampled(strata.numpy(), len(self.dataset.classes), images=TUNING_IMAGES, seed=self.seed)
        return self._unchanged(images, torch.from_numpy(chosen)[in_order(len(chosen), limit)].split(self.batch_size))

    def views(self, images: int) -> Iterator[Batch]:
        """Return n augmented training images in batches, spread over the set, the same on every rank."""
        n = len(self.dataset.train)
        chosen = torch.arange(min(images, n)) * n // min(images, n)
        return self.view(0, chosen.split(CALIBRATION_BATCH))

    def view(self, number: int, shares: Sequence[Tensor]) -> Iterator[Batch]:
        """Return the training images of each share (indices) under one augmented view, without broken ones."""
        return (batch for batch in self._shown(number, shares) if len(batch.targets))

    def training(
        self, batch_size: int, *, epoch: int, view: int, without: Sequence[int] | Tensor = ()
    ) -> Iterator[Batch]:
        """Return this rank's share of an epoch's batches, under one view; `batch_size` is over all ranks.

        The images `without` (indices) are left out. Raises DataError for fewer images in a batch than ranks, and for a
        batch without a readable image.
        """
        shares = self._shares(batch_size, epoch, torch.as_tensor(without, dtype=torch.int64))
        return self._counted(self._shown(view, shares), min(batch_size, len(self.dataset.train) - len(without)))

    def _shares(self, batch_size: int, epoch: int, without: Tensor) -> list[Tensor]:
        """Return this rank's image indices for every batch of an epoch, shuffled by (seed, epoch).

        Where classes are balanced, they are drawn with replacement, all equally often.
        """
        images = self.dataset.train
        if self.balanced and (images.placed is not None or images.labels.ndim > 1):
            raise DataError("data.balance: needs images with one label each: leave it out")
        n, generator = len(images), torch.Generator().manual_seed(_derived_seed(self.seed, epoch, "order"))
        if self.balanced:
            weights = balanced(images.labels).index_fill(0, without, 0.0)
            order = torch.multinomial(weights, n - len(without), replacement=True, generator=generator)
        else:
            order = torch.randperm(n, generator=generator)
            order = order[~torch.isin(order, without)]
        batches = torch.split(order, batch_size)[: steps_per_epoch(len(order), batch_size)]
        shares = [batch[self.rank :: self.ranks] for batch in batches]
        if len(shares[-1]) == 0:
            raise DataError(
                f"batch_size: {min(batch_size, len(order))} images cannot be shared by {self.ranks} ranks; raise it or use fewer ranks"
            )
        return shares

    def _counted(self, batches: Iterator[Batch], whole: int) -> Iterator[Batch]:
        """Yield batches with their number of images over all ranks, `whole` if none is broken."""
        images = self.dataset.train
        for batch in batches:
            if not len(batch.targets):
                raise DataError(
                    f"{self.dataset.name}: no image of a batch can be read; check the folder, or raise the batch size"
                )
            skips = isinstance(images, FileImages) and images.skip_broken
            yield batch._replace(among=sum(gather(len(batch.targets))) if skips else whole)

    def _unchanged(self, images: ImageSet, shares: Sequence[Tensor]) -> Iterator[Batch]:
        batches = eval_batches(images, self.dataset.preprocess, shares, device=self.device, workers=self.workers)
        return self._watched(batches)

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            self.seen(len(batch.targets))

    def _shown(self, view: int, shares: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield the training images of each share (indices) under one view, without broken images that are to be skipped."""
        images, preprocess = self.dataset.train, self.dataset.preprocess
        size = preprocess.image_size
        mixes = draw_mixes(self.augmentation, len(images), size=size, seed=_derived_seed(self.seed, view, "mix"))
        shown = shares if mixes is None else [torch.cat([share, mixes.partner[share]]) for share in shares]
        seed = _derived_seed(self.seed, view, "views")
        draws = draw(self.augmentation, len(images), size=size, seed=seed)
        if isinstance(images, MemoryImages) and not self.augmentation.changes_colours:
            raws = memory_views(images, shown, draws, size, device=self.device)
        else:
            change = random_view(images, draws, preprocess, seed=seed)
            raws = loaded(images, change, shown, workers=self.workers, device=self.device)
        for share, raw in zip(shares, raws, strict=True):
            batch, indices = normalized(raw, preprocess), raw.indices
            if mixes is not None and len(indices):
                batch, indices = mixed(batch, indices, share, mixes, classes=len(self.dataset.classes))
            yield batch._replace(views=Views(indices, view))


def _derived_seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def as_numpy(batches: Iterator[Batch]) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
    """Yield (images (n, channels, height, width), truths (n, ...)) as contiguous arrays for ONNX Runtime."""
    for batch in batches:
        yield batch.images.cpu().contiguous().numpy(), batch.targets.cpu().numpy()


def as_pixels(images: NDArray[np.float32], preprocess: Preprocess) -> NDArray[Any]:
    """Return normalized images (n, channels, height, width) as decoded, uint8 or uint16 (n, height, width, channels)."""
    mean, std = (np.array(part, np.float32) for part in (preprocess.mean, preprocess.std))
    pixels = np.rint((images.transpose(0, 2, 3, 1) * std + mean) * preprocess.pixel.largest)
    return np.asarray((pixels[..., ::-1] if preprocess.look.bgr else pixels).astype(preprocess.pixel.dtype))
