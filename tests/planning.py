"""Plan cuts to a fraction of a network's cost, as the prune stage does."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compress.models.structure import width_cost
from compress.pruning import planner
from compress.pruning.plan import Cut, Options, Scope, choose, find_groups, smallest_widths


def options_of(
    model: nn.Module,
    size: int,
    *,
    exclude: Sequence[str] = ("head",),
    scope: Scope = "global",
    round_to: int = 8,
    covariances: Mapping[nn.Module, Tensor] | None = None,
) -> Options:
    """Return what may be cut by `l2`, or by `obs` if `covariances` are given."""
    images = torch.zeros(1, 3, size, size)
    criterion = "l2" if covariances is None else "obs"
    groups = find_groups(model, images, criterion, exclude=exclude, covariances=covariances)
    smallest = smallest_widths(groups, 0.1)
    return planner.options_of(model, groups, images, scope=scope, round_to=round_to, min_channels=smallest)


def cuts_to(
    model: nn.Module,
    keep: float,
    size: int,
    *,
    exclude: Sequence[str] = ("head",),
    goal: Literal["macs", "params"] = "macs",
    scope: Scope = "global",
    round_to: int = 8,
    covariances: Mapping[nn.Module, Tensor] | None = None,
) -> list[Cut]:
    options = options_of(model, size, exclude=exclude, scope=scope, round_to=round_to, covariances=covariances)
    cost = width_cost(model, options.layers, goal, (3, size, size))
    return choose(options, cost, keep * options.full(cost))
