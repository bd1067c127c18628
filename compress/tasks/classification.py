"""Classification: one label for each image, cross-entropy with it."""

from torch import Tensor
from torch.nn import functional as F

from compress.data.dataset import open_dataset
from compress.data.validation import write_validation
from compress.tasks.task import Task
from export.tasks.classification import CLASSIFICATION as OUTPUT


def cross_entropy_loss(outputs: Tensor, truths: Tensor, *, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of logits (batch, classes) with labels (batch,) or class probabilities (batch, classes)."""
    return F.cross_entropy(outputs.float(), truths, label_smoothing=label_smoothing)


def as_they_are(values: Tensor) -> Tensor:
    """Return the logits, or the labels: there is one row for each image."""
    return values


CLASSIFICATION = Task(
    OUTPUT, open_dataset, write_validation, cross_entropy_loss, rows=as_they_are, truth_rows=as_they_are
)
