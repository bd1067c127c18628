"""Outputs whose rows are a set: the teacher's are laid in the order of the student's before a loss compares them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compress.tasks.task import Task
from export.onnx_file.outputs import Output, matched


def aligned(outputs: Tensor, taught: Tensor, *, served: Sequence[Output]) -> Tensor:
    """Return the teacher's packed outputs (n, values) with the rows of sets in the order of the student's, by `matched`."""
    its, mine = (part.detach().float().cpu().numpy() for part in (taught, outputs))
    return torch.from_numpy(matched(its, mine, served)).to(taught)


def aligning(task: Task, outputs: Sequence[Output]) -> Task:
    """Return the task whose losses compare the rows of unordered outputs after matching; the same where there are none."""
    if not any(one.unordered for one in outputs):
        return task
    align = partial(aligned, served=tuple(outputs))

    def loss(found: Tensor, truths: Tensor, **settings: object) -> Tensor:
        return task.loss(found, align(found, truths), **settings)

    return replace(task, aligned=align, loss=task.loss if task.output.has_classes else loss)
