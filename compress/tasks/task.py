"""Everything that depends on what the network is for: one row for each task."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.distillation.logits import cross_entropy_loss
from compress.ranks import gather


@dataclass(frozen=True)
class Task:
    """How outputs become a loss and a score."""

    metric: str
    supervised_loss: Callable[..., Tensor]  # (outputs, targets, label_smoothing=) -> ()
    scores: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> (batch,) in [0, 1], whose mean is the metric


def _top1(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()


TASKS = {"classification": Task("top1", cross_entropy_loss, _top1)}


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], task: Task) -> dict[str, float]:
    """Return the task's metric and loss over the batches of all ranks; the model's mode is left as it was found."""
    training = model.training
    model.eval()
    sums: list[tuple[Tensor, Tensor, int]] = []
    for batch in batches:
        outputs = model(batch.images).float()
        loss = task.supervised_loss(outputs, batch.targets, label_smoothing=0.0) * len(outputs)
        sums.append((task.scores(outputs, batch.targets).sum(), loss, len(outputs)))
    model.train(training)
    of_all = itertools.chain(*gather([(float(score), float(loss), images) for score, loss, images in sums]))
    # Exactly rounded, so that it does not matter which rank had which batch.
    total_score, total_loss, images = (math.fsum(column) for column in zip(*of_all, strict=True))
    return {task.metric: total_score / images, "val_loss": total_loss / images}
