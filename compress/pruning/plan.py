"""Choose which channels go, cut them, and replay a cut from JSON.

Channels leave in blocks, so that widths stay multiples of `round_to`. Every block gets a rank; the shortest prefix of the ranking that meets
the goal is cut, less the blocks that the budget can spare. The scopes differ in the rank alone.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressError, matching
from compress.pruning.costs import CostModel, Layer, is_output_cut
from compress.pruning.criteria import score, score_slices
from compress.pruning.graph import GRAPH_ERRORS, channel_graph
from compress.pruning.heads import Attention, attention_at, cut_heads_, find_attentions

Goal = Literal["macs", "params"]
Scope = Literal["global", "local", "isomorphic"]


@dataclass(frozen=True)
class Cut:
    """Channels to remove at one root layer, with the coupled layers by the dependency graph; or heads of one attention."""

    root: str
    remove: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the cut as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Width:
    """One layer before and after."""

    name: str
    kind: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only leave together in all coupled layers."""

    root: str
    channels: int
    unit: int  # channels that leave at once: the number of groups of a grouped convolution, else 1
    pattern: str  # equal for groups of the same structure
    touches: tuple[tuple[str, bool, int], ...]  # (layer, is output, that layer's channels for one of the group's)
    scores: Tensor  # (channels,)
    width: int = 1  # what each of them is in the layers: a head's size


@dataclass(frozen=True)
class _Block:
    group: int
    channels: tuple[int, ...]
    score: float
    place: float  # the part of its group that is gone once this block is


def find_groups(model: nn.Module, images: Tensor, criterion: str, *, exclude: Sequence[str]) -> list[ChannelGroup]:
    """Return every group that may be cut, with its channels' scores.

    `images` is one input (1, 3, s, s). Left out: groups that reach an output of a module named by `exclude` (shell patterns), a wall of
    the graph (a split, a shuffle), or a layer that sees a part of their channels.
    Raises CompressError where the network's channels cannot be followed, and for a pattern that names no layer.
    """
    graph = channel_graph(model, images)
    names = {module: name for name, module in model.named_modules()}
    layers = [name for module, name in names.items() if any(True for _ in module.parameters(recurse=False))]
    kept = [model.get_submodule(name) for name in matching("prune.exclude", exclude, layers)]
    groups = []
    for group in graph.get_all_groups(ignored_layers=kept):
        if graph.reaches_wall(group) or any(len(item.idxs) % len(group[0].idxs) for item in group.items):
            continue
        scores = score(group, criterion)
        if scores is not None:
            groups.append(_describe(group, names, scores))
    for attention in find_attentions(model, images):
        scores = score_slices(attention.slices(), attention.heads, criterion)
        if scores is not None and not any(attention.module.get_submodule(name) in kept for name in attention.inputs):
            groups.append(_heads(attention, scores))
    return _runnable(groups, model, images)


def choose(
    groups: Sequence[ChannelGroup],
    layers: Sequence[Layer],
    *,
    goal: Goal,
    budget: float,
    scope: Scope,
    round_to: int,
    min_channels: Mapping[str, int],
    fixed: float = 0.0,
) -> list[Cut]:
    """Return the cuts after which the network costs at most `budget` (multiply-accumulates of one image, or parameters).

    `fixed` is what the network costs outside of `layers`; `min_channels` gives each root's smallest width. Raises CompressError where even
    the narrowest allowed network costs more.
    """
    blocks = _ranked(groups, scope, round_to, min_channels)
    costs = _Costs(groups, layers, goal, fixed)
    narrowest = costs.after(blocks)
    if narrowest > budget:
        full = costs.after([])
        raise CompressError(
            f"keep_{goal}: {budget / full:.3f} of the present {goal} cannot be reached; the narrowest plan keeps "
            f"{narrowest / full:.3f}: raise keep_{goal}, lower min_keep or round_to, or exclude less"
        )
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if costs.after(blocks[:middle]) <= budget else (middle + 1, high)
    removed: dict[int, list[int]] = {}
    for block in _spare(blocks[:low], costs, budget):
        removed.setdefault(block.group, []).extend(block.channels)
    return [Cut(groups[index].root, tuple(sorted(channels))) for index, channels in sorted(removed.items())]


def cut_(model: nn.Module, images: Tensor, cuts: Sequence[Cut]) -> None:
    """Remove the channels in place. The same cuts on the same weights give the same network, bit for bit."""
    attentions = [cut for cut in cuts if hasattr(model.get_submodule(cut.root), "num_heads")]
    for cut in attentions:
        cut_heads_(attention_at(model, cut.root), cut.remove)
    graph = channel_graph(model, images)
    for cut in cuts:
        if cut in attentions:
            continue
        root = model.get_submodule(cut.root)
        pruner = graph.get_pruner_of_module(root)
        graph.get_pruning_group(root, pruner.prune_out_channels, list(cut.remove)).prune(record_history=False)
    for parameter in model.parameters():
        parameter.grad = None


def widths(before: Sequence[Layer], model: nn.Module) -> list[Width]:
    """Return every convolution's and linear layer's channels before and after a cut."""
    table = []
    for layer in before:
        module = model.get_submodule(layer.name)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            inputs, outputs = module.in_channels, module.out_channels
        elif isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        else:
            continue
        table.append(Width(layer.name, layer.kind, layer.inputs, inputs, layer.outputs, outputs))
    return table


def smallest_widths(groups: Sequence[ChannelGroup], min_keep: float) -> dict[str, int]:
    """Return each root's smallest width: at least `min_keep` of its channels, at least one."""
    return {group.root: max(1, math.ceil(group.channels * min_keep)) for group in groups}


def _describe(group: Any, names: Mapping[nn.Module, str], scores: Tensor) -> ChannelGroup:
    channels = len(group[0].idxs)
    touches, pattern, unit = [], [], 1
    for item in group.items:
        module, output = item.dep.target.module, is_output_cut(item.dep.handler)
        pattern.append(f"{type(module).__name__}:{'out' if output else 'in'}")
        if module in names and isinstance(getattr(module, "weight", None), Tensor):
            touches.append((names[module], output, max(1, len(item.idxs) // channels)))
        if isinstance(module, nn.Conv2d) and 1 < module.groups != module.in_channels:
            unit = math.lcm(unit, module.groups)
        if isinstance(module, nn.GroupNorm):
            unit = math.lcm(unit, module.num_groups)
    return ChannelGroup(names[group[0].dep.target.module], channels, unit, "|".join(pattern), tuple(touches), scores)


def _runnable(groups: list[ChannelGroup], model: nn.Module, images: Tensor) -> list[ChannelGroup]:
    """Return the groups without one unit of which the network still runs: a forward may take a head's size from another width."""
    if not groups or _runs_without(groups, model, images):
        return groups
    middle = len(groups) // 2
    return [*_runnable(groups[:middle], model, images), *_runnable(groups[middle:], model, images)] if middle else []


def _runs_without(groups: Sequence[ChannelGroup], model: nn.Module, images: Tensor) -> bool:
    trial = copy.deepcopy(model)
    units = [range(0, group.channels, group.channels // group.unit) for group in groups]
    try:
        cut_(trial, images, [Cut(group.root, tuple(unit)) for group, unit in zip(groups, units, strict=True)])
        with torch.no_grad():
            trial.eval()(images)
    except (*GRAPH_ERRORS, CompressError):
        return False
    return True


def _heads(attention: Attention, scores: Tensor) -> ChannelGroup:
    path, widths = attention.path, {name: len(attention.rows(name, [0])) for name in attention.inputs}
    touches = [(f"{path}.{name}", True, width) for name, width in widths.items()]
    touches.append((f"{path}.{attention.output}", False, attention.size))
    pattern = f"heads:{attention.size}"
    return ChannelGroup(path, attention.heads, 1, pattern, tuple(touches), scores, attention.size)


def _ranked(
    groups: Sequence[ChannelGroup], scope: Scope, round_to: int, min_channels: Mapping[str, int]
) -> list[_Block]:
    blocks = [block for index, group in enumerate(groups) for block in _blocks(index, group, round_to, min_channels)]
    by_score: Callable[[_Block], float] = lambda block: block.score  # noqa: E731
    if scope == "global":
        return sorted(blocks, key=by_score)
    if scope == "local":
        return sorted(blocks, key=lambda block: (block.place, block.score))
    ranked = []
    for pattern in dict.fromkeys(group.pattern for group in groups):
        same = sorted((block for block in blocks if groups[block.group].pattern == pattern), key=by_score)
        channels = sum(group.channels for group in groups if group.pattern == pattern)
        gone = np.cumsum([len(block.channels) for block in same]) / channels
        ranked += list(zip(gone, same, strict=True))
    return [block for _, block in sorted(ranked, key=lambda pair: (pair[0], pair[1].score))]


def _blocks(index: int, group: ChannelGroup, round_to: int, min_channels: Mapping[str, int]) -> list[_Block]:
    """Return a group's removable blocks, least important first; what stays is a multiple of `round_to`."""
    units = group.channels // group.unit
    scores = group.scores.view(group.unit, units).mean(0)  # (units,)
    order = torch.argsort(scores, stable=True).tolist()
    step = round_to // math.gcd(round_to, group.unit * group.width)
    smallest = max(step, math.ceil(min_channels[group.root] / group.unit))
    first = units % step or step  # the first block takes the odd channels too
    edges = [0, *range(first, units - smallest + 1, step)]
    blocks = []
    for start, end in itertools.pairwise(edges):
        members = order[start:end]
        channels = [unit + part * units for part in range(group.unit) for unit in members]
        value = float(scores[members].mean())
        blocks.append(_Block(index, tuple(channels), value, end / units))
    return blocks


def _spare(removed: list[_Block], costs: "_Costs", budget: float) -> list[_Block]:
    """Give blocks back, the most important first, as long as the budget holds: the last block of a prefix can be far larger than the rest."""
    kept, open_groups = list(removed), {block.group for block in removed}
    for block in reversed(removed):
        if block.group not in open_groups:
            continue
        without = [other for other in kept if other is not block]
        if costs.after(without) <= budget:
            kept = without
        else:
            open_groups.discard(
                block.group
            )  # a group's less important blocks only come back after its more important ones
    return kept


class _Costs:
    """The network's cost after a set of blocks has left."""

    def __init__(self, groups: Sequence[ChannelGroup], layers: Sequence[Layer], goal: Goal, fixed: float) -> None:
        self.model, self.fixed = CostModel(list(layers), goal), fixed
        position = {layer.name: index for index, layer in enumerate(layers)}
        shape = (len(groups), len(layers))
        self.outputs, self.inputs = np.zeros(shape), np.zeros(shape)
        for row, group in enumerate(groups):
            for name, output, share in group.touches:
                if name in position:
                    (self.outputs if output else self.inputs)[row, position[name]] += share

    def after(self, blocks: Sequence[_Block]) -> float:
        removed = np.zeros(len(self.outputs))
        for block in blocks:
            removed[block.group] += len(block.channels)
        outputs, inputs = self.model.outputs - removed @ self.outputs, self.model.inputs - removed @ self.inputs
        return self.fixed + self.model.cost(outputs, inputs)
