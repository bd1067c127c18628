"""What training needs to know of what a network is for; what its outputs mean wherever it runs is the other half, `export.tasks`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.augment import Augmentation
from compress.data.batches import Batch
from compress.data.dataset import Dataset
from compress.data.digest import DataSettings
from compress.data.images import ImageSet
from compress.quant.layers import deployed_once
from compress.ranks import gather
from export.tasks.task import OutputTask


@dataclass(frozen=True)
class Task:
    """One task."""

    output: OutputTask
    open: Callable[[DataSettings, Augmentation], Dataset]
    """The images with their truths; a network has one output for each of the set's `classes`."""
    write: Callable[[Dataset, Path], int]
    """Write the validation images and their truths as a folder that the other half reads; returns how many."""
    loss: Callable[..., Tensor]
    """(outputs, truths, label_smoothing=) to (): what plain training minimizes, a mean over images; with `class_weights` also (…, weights=)."""
    rows: Callable[[Tensor, Tensor], Tensor]
    """(outputs, truths) to logits (rows, classes), on which every loss between logits works."""
    truth_rows: Callable[[Tensor, Tensor], Tensor]
    """(outputs, truths) to one truth for each of those rows."""
    places: Callable[[Tensor, Tensor], Tensor] | None = None
    """(student's outputs, teacher's) to (): how far apart they put what the teacher is sure of; None where answers have no places."""
    smooths: bool = True
    """Whether the loss takes a label smoothing above 0."""
    class_weights: Callable[[ImageSet, int], Tensor] | None = None
    """(training images, number of classes) to the weights (classes,) that make up for unequal classes; None where the loss takes none."""


def inverse_frequency(counts: Tensor) -> Tensor:
    """Return a weight for each class in inverse proportion to its count, (classes,), whose mean over all that is counted is 1."""
    there = counts > 0
    return torch.where(there, counts.sum() / (there.sum() * counts.clamp(min=1)), 1.0)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], task: Task) -> dict[str, float]:
    """Return the task's score and loss over the batches of all ranks; the model's mode is left as it was found."""
    training = model.training
    model.eval()
    rows, losses = [], []
    with deployed_once(model):
        for batch in batches:
            outputs = model(batch.images).float()
            loss = task.loss(outputs, batch.targets, label_smoothing=0.0)
            losses.append((float(loss), len(outputs)))
            answers = task.output.decode(outputs.cpu().numpy())
            rows.append(task.output.statistics(answers, batch.targets.cpu().numpy(), outputs.shape[1:]))
    model.train(training)
    of_all = [part for rank in gather(rows) for part in rank]
    found = [part for rank in gather(losses) for part in rank]
    # Exactly rounded, so that it does not matter which rank had which batch.
    total, images = math.fsum(loss * images for loss, images in found), sum(images for _, images in found)
    return {"score": task.output.total(np.concatenate(of_all)), "val_loss": total / images}
