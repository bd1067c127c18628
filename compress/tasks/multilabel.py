"""Multi-label: any number of labels for each image, trained by binary cross-entropy."""

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.data.images import ImageSet
from compress.data.many_labels import open_tables, write_table
from compress.tasks.task import Task
from export.tasks.multilabel import MULTILABEL as OUTPUT


def binary_cross_entropy_loss(
    outputs: Tensor, truths: Tensor, *, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Return the mean binary cross-entropy of logits with truths in [0, 1], (batch, classes) each.

    `weights` (classes,) are the factors of true labels' losses.
    """
    smooth = truths * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(outputs.float(), smooth, pos_weight=weights)


def rows(outputs: Tensor, _truths: Tensor) -> Tensor:
    """Return a row for each image and class, (batch · classes, 2): the softmax of (0, z) is the sigmoid of z."""
    single = outputs.flatten()
    return torch.stack([torch.zeros_like(single), single], dim=1)


def truth_rows(_outputs: Tensor, truths: Tensor) -> Tensor:
    """Return 1 for each of those rows whose label is true, else 0."""
    return truths.round().long().flatten()


def class_weights(images: ImageSet, _classes: int) -> Tensor:
    """Return each class's ratio of images without it to images with it, which gives both the same weight."""
    having = images.labels.sum(0)
    return (len(images) - having) / having


MULTILABEL = Task(
    OUTPUT,
    open_tables,
    write_table,
    binary_cross_entropy_loss,
    rows=rows,
    truth_rows=truth_rows,
    class_weights=class_weights,
)
