"""Classification: one label for each image, trained by cross-entropy."""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.data.images import ImageSet
from compress.data.labelled import open_dataset, write_validation
from compress.tasks.task import Task, inverse_frequency
from export.images.listing import NO_LABEL
from export.tasks.classification import CLASSIFICATION as OUTPUT


def cross_entropy_loss(
    outputs: Tensor, truths: Tensor, *, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of logits (batch, classes) with labels (batch,) or probabilities (batch, classes).

    An image without a label adds nothing and counts, so that few labels among many images weigh little in a batch: with the mean over
    the labelled ones, a tenth of the labels disturbed what the teacher taught (docs/results.md).
    """
    if truths.ndim > 1:
        return F.cross_entropy(outputs.float(), truths, weights, label_smoothing=label_smoothing)
    # torch's mean divides by the batch's sum of weights, so a batch of one rare class would lose that class's weight.
    total = F.cross_entropy(
        outputs.float(), truths, weights, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / len(truths)


def class_weights(images: ImageSet, classes: int) -> Tensor:
    """Return each class's weight, inverse to its number of images; the mean over the labelled images is 1."""
    return inverse_frequency(torch.bincount(images.labels[images.labels != NO_LABEL], minlength=classes))


CLASSIFICATION = Task(
    OUTPUT,
    open_dataset,
    write_validation,
    cross_entropy_loss,
    rows=lambda outputs, _truths: outputs,
    truth_rows=lambda _outputs, truths: truths,
    class_weights=class_weights,
)
