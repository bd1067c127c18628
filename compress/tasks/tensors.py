"""Any network that maps an image to a tensor, trained to give the uncompressed network's outputs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.data.dataset import Dataset
from compress.data.labelled import open_unlabelled
from compress.data.validation import copied, new_folder
from compress.tasks.aligned import aligning
from compress.tasks.task import Task
from export.onnx_file.outputs import Output, columns
from export.tasks.tensors import TENSORS as OUTPUT

LEAST = 1e-6  # probability, whose logarithm is compared
SCALED_BY = 2000  # training images whose outputs set the scale of the loss


def channels_last(outputs: Tensor) -> Tensor:
    """Return outputs (n, channels), (n, tokens, channels) or (n, channels, height, width) as (n · positions, channels)."""
    return (outputs.movedim(1, -1) if outputs.dim() == 4 else outputs).flatten(0, -2)


def spread(outputs: Tensor) -> Tensor:
    """Return the standard deviation of the values around their channels' means, ()."""
    return channels_last(outputs.float()).var(0, correction=0).mean().sqrt().clamp(min=1e-12)


def squared_error_loss(
    outputs: Tensor,
    truths: Tensor,
    *,
    label_smoothing: float = 0.0,  # noqa: ARG001 (the interface, as the next)
    weights: Tensor | None = None,  # noqa: ARG001
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Return the mean squared error in units of `scale`, which with the outputs' deviation is one minus the score."""
    return ((outputs.float() - truths) / _on(scale, outputs)).square().mean()


def rows(outputs: Tensor, _truths: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    """Return every position's values, (n · positions, channels), in units of `scale`."""
    return channels_last(outputs) / _on(scale, outputs)


def _on(scale: float | Tensor, outputs: Tensor) -> float | Tensor:
    return scale.to(outputs.device) if isinstance(scale, Tensor) else scale


def truth_rows(_outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the same of the truths."""
    return channels_last(truths)


def scaled(task: Task, dataset: Dataset) -> Task:
    """Return the task whose losses are in units of the outputs' variance, so that the same rate suits any network."""
    some, served = dataset.train.labels[:: -(-len(dataset.train) // SCALED_BY)], dataset.outputs
    scale = scales(some, served) if served else float(spread(some))
    fitted = replace(task, rows=partial(rows, scale=scale), loss=partial(squared_error_loss, scale=scale))
    if any(one.softmax for one in served):
        distance = partial(mixed_loss, scale=scale, served=served)
        fitted = replace(fitted, loss=distance, distance=distance)
    return aligning(fitted, served)


def mixed_loss(
    outputs: Tensor, truths: Tensor, *, scale: float | Tensor, served: Sequence[Output], **_settings: object
) -> Tensor:
    """Return the weighted mean of the outputs' losses: KL(softmax(truth) ‖ softmax(output)) in nats where one is declared, else the squared error.

    KL is a mean over images and positions (Hinton, Vinyals & Dean 2015, section 2, at temperature 1).
    """
    wrong = ((outputs.float() - truths) / _on(scale, outputs)).square()
    weight, columns_of = sum(one.weight for one in served), columns(served)
    total = wrong.new_zeros(())
    for one in served:
        place = columns_of[one.name]
        if one.softmax is None:
            total = total + wrong[:, place].sum() / (len(wrong) * wrong.shape[1])
            continue
        mine, true = (part[:, place].reshape(-1, *one.shape).float() for part in (outputs, truths))
        if one.softmax == "probabilities":
            mine, true = mine.clamp(min=LEAST).log(), true.clamp(min=LEAST).log()
        mine, true = (channels_last(part).log_softmax(1) for part in (mine, true))  # (n · positions, classes)
        divergence = F.kl_div(mine, true, reduction="batchmean", log_target=True)
        total = total + one.weight / weight * divergence
    return total


def scales(packed: Tensor, outputs: Sequence[Output]) -> Tensor:
    """Return by column the unit in which a mean square over all columns is the outputs' mean loss, by their weights, (values,).

    One output's loss is its mean squared error over its variance, however many values it has.
    """
    weight, values = sum(one.weight for one in outputs), sum(one.size for one in outputs)
    parts = {name: packed[:, place] for name, place in columns(outputs).items()}
    units = [
        spread(parts[one.name].reshape(-1, *one.shape)) * math.sqrt(weight * one.size / (values * one.weight))
        for one in outputs
    ]
    return torch.cat([unit.expand(one.size) for unit, one in zip(units, outputs, strict=True)])


def write_images(dataset: Dataset, folder: Path) -> int:
    """Write the validation images as a folder; return their number. Raises DataError where the folder exists."""
    with new_folder(folder) as partial_folder:
        return sum(1 for _ in copied(dataset.held_out, lambda _: partial_folder))


TENSORS = Task(
    OUTPUT,
    open_unlabelled,
    write_images,
    squared_error_loss,
    rows=rows,
    truth_rows=truth_rows,
    smooths=False,
    fitted=scaled,
)
