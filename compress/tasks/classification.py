"""Classification: one label for each image, cross-entropy with it."""

from torch import Tensor
from torch.nn import functional as F

from compress.data.dataset import open_dataset
from compress.data.images import UNLABELLED
from compress.data.validation import write_validation
from compress.tasks.task import Task
from export.tasks.classification import CLASSIFICATION as OUTPUT


def cross_entropy_loss(outputs: Tensor, truths: Tensor, *, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of logits (batch, classes) with labels (batch,), the mean over those that are labelled, or probabilities (batch, classes)."""
    if truths.ndim > 1:
        return F.cross_entropy(outputs.float(), truths, label_smoothing=label_smoothing)
    total = F.cross_entropy(
        outputs.float(), truths, ignore_index=UNLABELLED, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (truths != UNLABELLED).sum().clamp(min=1)


def rows(outputs: Tensor, _truths: Tensor) -> Tensor:
    """Return the logits: there is one row for each image."""
    return outputs


def truth_rows(_outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the labels."""
    return truths


CLASSIFICATION = Task(OUTPUT, open_dataset, write_validation, cross_entropy_loss, rows=rows, truth_rows=truth_rows)
