"""What training needs to know of a task. The other half, `export.tasks`, says what a network's outputs mean."""

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
from compress.data.images import ImageSet
from compress.data.settings import DataSettings
from compress.quant.layers import deployed_once
from compress.ranks import gather
from export.tasks.task import OutputTask


def count_images(_outputs: Tensor, truths: Tensor) -> int:
    """Return the number of images."""
    return len(truths)


@dataclass(frozen=True)
class Task:
    """How networks are trained for one task."""

    output: OutputTask
    open: Callable[[DataSettings, Augmentation], Dataset]
    """Open the images with their truths; a network has one output for each of the data set's `classes`."""
    write: Callable[[Dataset, Path], int]
    """Write the validation images and their truths as a folder that `export.tasks` reads; return the number of images."""
    loss: Callable[..., Tensor]
    """(outputs, truths, label_smoothing=, weights=) to (): plain training's loss, a mean."""
    rows: Callable[[Tensor, Tensor], Tensor]
    """(outputs, truths) to logits (rows, classes), which losses between logits compare."""
    truth_rows: Callable[[Tensor, Tensor], Tensor]
    """(outputs, truths) to one truth for each of those rows."""
    loss_count: Callable[[Tensor, Tensor], Tensor | int] = count_images
    """(outputs of any images, truths) to the number that the loss is a mean over."""
    row_count: Callable[[Tensor, Tensor], Tensor | int] = count_images
    """(outputs of any images, truths) to a number proportional to that of the truths' rows."""
    places: Callable[[Tensor, Tensor], Tensor] | None = None
    """(student's outputs, teacher's) to (): distance of their boxes where the teacher is sure; None without boxes."""
    places_count: Callable[[Tensor], Tensor] | None = None
    """(teacher's outputs) to the number of boxes where it is sure; None without boxes."""
    pairs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """(student's outputs, teacher's) to both logits (rows, classes), which losses between logits compare; None takes each one's `rows`."""
    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    """(student's outputs, teacher's) to (): what `mse` is where some outputs are classes; None for the mean square of the rows' difference."""
    aligned: Callable[[Tensor, Tensor], Tensor] | None = None
    """(student's outputs, teacher's) to the teacher's, whose rows lie in the order of the student's; None where rows have a fixed order."""
    supervised: bool = True
    """Whether there is a loss from labels."""
    blank: Callable[[Tensor], Tensor] = torch.zeros_like
    """A network's outputs to those of one that knows nothing: zeros, but for what no network learns."""
    fitted: Callable[["Task", Dataset], "Task"] | None = None
    """(task, data) to the task with what its losses need to know of the data."""
    smooths: bool = True
    """Whether the loss allows label smoothing."""
    class_weights: Callable[[ImageSet, int], Tensor] | None = None
    """(training images, number of classes) to weights (classes,) for the loss; None where it takes none."""


def inverse_frequency(counts: Tensor) -> Tensor:
    """Return each class's weight (classes,), inverse to its count; the mean weight over all that is counted is 1."""
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 1.0)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], task: Task) -> dict[str, float]:
    """Return the task's score, and its loss if there is one, over the batches of all ranks; restore the model's mode."""
    training = model.training
    model.eval()
    rows, losses = [], []
    with deployed_once(model):
        for batch in batches:
            outputs = model(batch.images).float()
            if task.supervised:
                loss = task.loss(outputs, batch.targets, label_smoothing=0.0)
                losses.append((float(loss), max(1, int(task.loss_count(outputs, batch.targets)))))
            predictions = task.output.decode(outputs.cpu().numpy())
            rows.append(task.output.statistics(predictions, batch.targets.cpu().numpy(), outputs.shape[1:]))
    model.train(training)
    of_all = [part for rank in gather(rows) for part in rank]
    found = [part for rank in gather(losses) for part in rank]
    score = {"score": task.output.total(np.concatenate(of_all))}
    if not task.supervised:
        return score
    # fsum rounds exactly, so it does not matter which rank had which batch.
    return score | {"val_loss": math.fsum(mean * count for mean, count in found) / sum(count for _, count in found)}
