"""Segmentation: one class for each pixel, trained by cross-entropy; pixels marked IGNORED do not count."""

from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.data.images import ImageSet
from compress.data.segmented import open_masks, write_masks
from compress.tasks.task import Task, inverse_frequency
from export.images.decode import BrokenImage
from export.images.preprocess import IGNORED
from export.tasks.segmentation import SEGMENTATION as OUTPUT


def cross_entropy_loss(
    outputs: Tensor, truths: Tensor, *, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of logits (batch, classes, height, width) with masks (batch, height, width)."""
    total = F.cross_entropy(
        outputs.float(), truths.long(), weights, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / count_pixels(outputs, truths).clamp(min=1)


def count_pixels(_outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the number of pixels that count."""
    return (truths != IGNORED).sum()


def rows(outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the logits of every pixel that counts, (pixels, classes)."""
    by_pixel: Tensor = outputs.movedim(1, -1)[truths != IGNORED]
    return by_pixel


def truth_rows(_outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the class of every pixel that counts, (pixels,)."""
    return truths[truths != IGNORED].long()


def class_weights(images: ImageSet, classes: int) -> Tensor:
    """Return each class's weight, inverse to its number of pixels; the mean over the pixels that count is 1."""
    assert images.placed is not None
    counts = torch.zeros(IGNORED + 1, dtype=torch.int64)
    for index in range(len(images)):
        with suppress(BrokenImage):  # training reports it
            counts += torch.bincount(images.placed.still(torch.tensor([index])).flatten(), minlength=len(counts))
    return inverse_frequency(counts[:classes])


SEGMENTATION = Task(
    OUTPUT,
    open_masks,
    write_masks,
    cross_entropy_loss,
    rows=rows,
    truth_rows=truth_rows,
    loss_count=count_pixels,
    row_count=count_pixels,
    class_weights=class_weights,
)
