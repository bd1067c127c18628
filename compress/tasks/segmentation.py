"""Segmentation: one class for each pixel, cross-entropy with it, the pixels that are not judged left out."""

from torch import Tensor
from torch.nn import functional as F

from compress.data.segmented import open_masks, write_masks
from compress.tasks.task import Task
from export.images.preprocess import IGNORED
from export.tasks.segmentation import SEGMENTATION as OUTPUT


def cross_entropy_loss(outputs: Tensor, truths: Tensor, *, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy of logits (batch, classes, height, width) over the judged pixels of masks (batch, height, width)."""
    judged = (truths != IGNORED).sum()
    return F.cross_entropy(
        outputs.float(), truths.long(), ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    ) / judged.clamp(min=1)


def rows(outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the logits of every judged pixel, (pixels, classes)."""
    by_pixel: Tensor = outputs.movedim(1, -1)[truths != IGNORED]
    return by_pixel


def truth_rows(_outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the class of every judged pixel, (pixels,)."""
    return truths[truths != IGNORED].long()


SEGMENTATION = Task(OUTPUT, open_masks, write_masks, cross_entropy_loss, rows=rows, truth_rows=truth_rows)
