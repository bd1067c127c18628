"""Importance of channels: how much a group of coupled layers loses without one of them.

Every criterion scores one layer's slices (channels, rest) → (channels,). `score` sums over the layers that the dependency graph couples
(Fang et al. 2023, DepGraph, eq. 6) and divides by the mean over channels, so that groups of different size can compete.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from compress.pruning.costs import is_output_cut


@dataclass(frozen=True)
class Slices:
    """One layer's weights in a group, one row per channel."""

    module: nn.Module
    weight: Tensor  # (channels, rest)
    grad: Tensor | None  # (channels, rest)
    is_output: bool
    roots: Tensor  # (channels,) index of each row's channel in the group


def score_l1(layer: Slices) -> Tensor | None:
    """Sum of |w| (Li et al. 2017, Pruning Filters for Efficient ConvNets)."""
    return layer.weight.abs().sum(1)


def score_l2(layer: Slices) -> Tensor | None:
    """Sum of w² (DepGraph, eq. 6)."""
    return layer.weight.square().sum(1)


def score_taylor(layer: Slices) -> Tensor | None:
    """Sum of |w · ∂L/∂w|, the first-order change of the loss (Molchanov et al. 2019, eq. 8)."""
    assert layer.grad is not None
    return (layer.weight * layer.grad).abs().sum(1)


def score_fpgm(layer: Slices) -> Tensor | None:
    """Sum of distances to all other filters, small if others can replace this one (He et al. 2019, FPGM, eq. 5)."""
    if not layer.is_output or isinstance(layer.module, nn.modules.batchnorm._BatchNorm):
        return None
    return torch.cdist(layer.weight, layer.weight).sum(1)


def score_random(layer: Slices) -> Tensor | None:
    """Uniform noise: the baseline that a criterion must beat."""
    return torch.rand(len(layer.weight)).to(layer.weight.device)


CRITERIA: dict[str, Callable[[Slices], Tensor | None]] = {
    "l1": score_l1,
    "l2": score_l2,
    "taylor": score_taylor,
    "fpgm": score_fpgm,
    "random": score_random,
    "obs": score_l2,  # where no layer with a known input covariance reads the channels; else compress/pruning/surgeon.py
}
NEEDS_GRADIENTS = frozenset({"taylor"})
NEEDS_COVARIANCES = frozenset({"obs"})


def score(group: Group, criterion: str) -> Tensor | None:
    """Return the importance of every channel of a full group, float32 (channels,), mean 1; None if no layer has a score."""
    return score_slices(_slices(group), len(group[0].idxs), criterion)


@torch.no_grad()
def score_slices(layers: Iterable[Slices], channels: int, criterion: str) -> Tensor | None:
    """Return the importance of channels from their slices in the coupled layers; see `score`."""
    total = torch.zeros(channels)
    voters = 0
    for layer in layers:
        values = CRITERIA[criterion](layer)
        if values is not None:
            total.scatter_add_(0, layer.roots, values.float().cpu())
            voters += 1
    if not voters:
        return None
    return total / total.mean().clamp(min=torch.finfo(torch.float32).tiny)


def _slices(group: Group) -> Iterator[Slices]:
    """Yield the slices of a group's layers with weights, rows in the order of the group's indices."""
    for item in group.items:
        module, output = item.dep.target.module, is_output_cut(item.dep.handler)
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Module) or not isinstance(weight, Tensor) or None in item.root_idxs:
            continue
        rows = torch.tensor(item.idxs, device=weight.device)
        roots = torch.tensor(item.root_idxs)
        grad = None if weight.grad is None else _rows(weight.grad, module, output)[rows]
        yield Slices(module, _rows(weight, module, output)[rows], grad, output, roots)


def _rows(weight: Tensor, layer: nn.Module, output: bool) -> Tensor:
    """Return the weights as (channels, rest) by output or input; in a grouped convolution, inputs of several groups share a row.

    A transposed convolution's weights are (in, out, k, k), unless it is depthwise.
    """
    weight = weight.detach()
    if weight.dim() == 1:
        return weight[:, None]
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
        output = not output
    repeats = 1 if output or not isinstance(layer, nn.Conv2d) else layer.groups
    return (weight if output else weight.transpose(0, 1)).flatten(1).repeat(repeats, 1)
