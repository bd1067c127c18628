"""The step of distillation: the student learns from a weighted sum of losses, some against the labels, some against the teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.losses import LOGIT_LOSSES
from compress.recipe import CrossEntropyTerm, LossTerm
from compress.tasks import Task
from compress.train import Step


def supervised_step(task: Task, *, label_smoothing: float) -> Step:
    """Return the step of plain training on the targets."""

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": task.supervised_loss(model(batch.images), batch.targets, label_smoothing=label_smoothing)}

    return step


def distillation_step(terms: Sequence[LossTerm], task: Task, teacher: nn.Module) -> Step:
    """Return the step of a recipe's losses. The teacher sees the very view that the student sees; it runs only where a loss asks for it."""
    needs_teacher = any(not isinstance(term, CrossEntropyTerm) for term in terms)

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        targets = _teach(teacher, batch.images) if needs_teacher else batch.targets
        outputs = model(batch.images)
        measured: dict[str, Tensor] = {term.name: _loss(term, task, outputs, targets, batch) for term in terms}
        return {"loss": torch.stack([term.weight * measured[term.name] for term in terms]).sum(), **measured}

    return step


def _loss(term: LossTerm, task: Task, outputs: Tensor, teacher_outputs: Tensor, batch: Batch) -> Tensor:
    if isinstance(term, CrossEntropyTerm):
        return task.supervised_loss(outputs, batch.targets, label_smoothing=term.label_smoothing)
    return LOGIT_LOSSES[term.name](outputs, teacher_outputs, temperature=term.temperature)


@torch.no_grad()
def _teach(teacher: nn.Module, images: Tensor) -> Tensor:
    return teacher(images)  # type: ignore[no-any-return]
