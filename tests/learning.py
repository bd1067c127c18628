"""Trainings on labels alone, for tests of a detector's own loss."""

import torch
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.distillation.step import distillation, no_teacher
from compress.recipe.losses import CrossEntropyTerm
from compress.tasks.task import Task


def learned_losses(
    student: nn.Module, task: Task, images: Tensor, truths: Tensor, *, rate: float, steps: int
) -> list[float]:
    """Train a network on one batch by the loss of its labels; return the loss of each step."""
    term = CrossEntropyTerm(name="cross_entropy")
    learner, step = distillation([term], task, student=student, teacher=no_teacher, images=images[:1], seed=0)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = step(learner.train(), Batch(images, truths), 0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
