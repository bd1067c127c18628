"""Plan cuts to a fraction of a network's cost, as the prune stage does."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from compress.models.structure import width_cost
from compress.pruning.costs import full_widths, measure_layers
from compress.pruning.plan import Cut, Options, Scope, choose, find_groups, find_options, smallest_widths


def options_of(
    model: nn.Module, size: int, *, exclude: Sequence[str] = ("head",), scope: Scope = "global", round_to: int = 8
) -> Options:
    images = torch.zeros(1, 3, size, size)
    groups = find_groups(model, images, "l2", exclude=exclude)
    layers = measure_layers(model, images)
    return find_options(groups, layers, scope=scope, round_to=round_to, min_channels=smallest_widths(groups, 0.1))


def cuts_to(
    model: nn.Module,
    keep: float,
    size: int,
    *,
    exclude: Sequence[str] = ("head",),
    goal: Literal["macs", "params"] = "macs",
    scope: Scope = "global",
    round_to: int = 8,
) -> list[Cut]:
    options = options_of(model, size, exclude=exclude, scope=scope, round_to=round_to)
    cost = width_cost(model, options.layers, goal, (3, size, size))
    return choose(options, cost, keep * cost(*full_widths(options.layers)))
