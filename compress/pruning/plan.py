"""Choose which channels to remove, and remove them.

Channels are removed in blocks, so that widths stay multiples of `round_to`. Every block has a rank, which depends on the scope. `choose` cuts
the blocks of lowest rank until the budget is met, then restores any that still fit; `compress.pruning.latency.search` weighs ranks against time.
"""

import copy
import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressError, matching
from compress.pruning.costs import Floats, Layer, WidthCost, full_widths, is_output_cut
from compress.pruning.criteria import score, score_slices
from compress.pruning.graph import GRAPH_ERRORS, channel_graph
from compress.pruning.heads import Attention, attention_at, cut_heads_, find_attentions
from compress.pruning.inside_heads import PARTS, HeadAttention, Side, cut_side_, side_of, side_root
from compress.pruning.surgeon import Surgeon, shares_in_order

Scope = Literal["global", "local", "isomorphic"]


@dataclass(frozen=True)
class Cut:
    """Output channels of one root layer to remove (and of all coupled layers), or heads of an attention, or dimensions inside its heads.

    None means a whole residual block.
    """

    root: str
    remove: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the cut as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Width:
    """One layer's channels before and after pruning."""

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
    unit: int  # channels removed at once: the number of groups of a grouped convolution, else 1
    pattern: str  # equal for groups of the same structure
    touches: tuple[tuple[str, bool, int], ...]  # (layer, is output, its channels per channel of the group)
    scores: Tensor  # (channels,)
    width: int = 1  # a head's size; 1 for channels


@dataclass(frozen=True)
class Block:
    """Channels of one group that are removed together, after the group's less important blocks."""

    group: int
    channels: tuple[int, ...]
    score: float
    place: float  # fraction of the group that is removed, including this block
    rank: float = 0.0  # order in which blocks of all groups are removed


@dataclass(frozen=True)
class Branch:
    """A residual block that can be removed whole, and the indices of the groups inside."""

    path: str
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """All that can be cut from a network: groups, layers, the groups' blocks by rank, and residual blocks."""

    groups: Sequence[ChannelGroup]
    layers: Sequence[Layer]
    blocks: Sequence[Block]
    round_to: int  # widths stay multiples of it
    branches: Sequence[Branch] = ()

    @cached_property
    def reach(self) -> tuple[Floats, Floats]:
        """Outputs and inputs that each layer loses with one channel of each group, both (groups, layers)."""
        position = {layer.name: index for index, layer in enumerate(self.layers)}
        outputs, inputs = np.zeros((2, len(self.groups), len(self.layers)))
        for row, group in enumerate(self.groups):
            for name, output, share in group.touches:
                if name in position:
                    (outputs if output else inputs)[row, position[name]] += share
        return outputs, inputs

    def widths(self, removed: Floats) -> tuple[Floats, Floats]:
        """Return the layers' outputs and inputs (layers,) after removing `removed` (groups,) channels of each group."""
        full_outputs, full_inputs = full_widths(self.layers)
        outputs, inputs = self.reach
        return full_outputs - removed @ outputs, full_inputs - removed @ inputs

    def removed(self, blocks: Iterable[Block]) -> Floats:
        """Return the number of channels that each group loses with some blocks, (groups,)."""
        counts = np.zeros(len(self.groups))
        for block in blocks:
            counts[block.group] += len(block.channels)
        return counts

    def removed_by(self, cuts: Iterable[Cut]) -> Floats:
        """Return the number of channels that each group loses with some cuts, (groups,)."""
        gone = {cut.root: len(cut.remove) for cut in cuts}
        removed = np.array([gone.get(group.root, 0) for group in self.groups], dtype=float)
        for index in (index for branch in self.branches if branch.path in gone for index in branch.groups):
            removed[index] = self.groups[index].channels
        return removed

    def full(self, cost: WidthCost) -> float:
        """Return the network's cost before any cut."""
        return cost(*self.widths(self.removed([])))

    def least(self, cost: WidthCost) -> float:
        """Return the cost without all blocks."""
        return cost(*self.widths(self.removed(self.blocks)))

    def cuts(self, blocks: Iterable[Block]) -> list[Cut]:
        """Return the cuts that remove some blocks."""
        channels: dict[int, list[int]] = {}
        for block in blocks:
            channels.setdefault(block.group, []).extend(block.channels)
        return [Cut(self.groups[index].root, tuple(sorted(members))) for index, members in sorted(channels.items())]

    def cut_of(self, root: str, count: float) -> list[Cut]:
        """Return the cut of a group's lowest-ranked blocks with about `count` channels, if that is any."""
        blocks = [block for block in self.blocks if self.groups[block.group].root == root]
        sizes = np.cumsum([0, *(len(block.channels) for block in blocks)])
        return self.cuts(blocks[: int(np.abs(sizes - count).argmin())])

    @property
    def narrowest(self) -> list[Cut]:
        """Return the cuts that remove everything that can be removed."""
        inside = {index for branch in self.branches for index in branch.groups}
        cuts = self.cuts(block for block in self.blocks if block.group not in inside)
        return cuts + [Cut(branch.path, ()) for branch in self.branches]


def find_groups(
    model: nn.Module,
    images: Tensor,
    criterion: str,
    *,
    exclude: Sequence[str],
    covariances: Mapping[nn.Module, Tensor] | None = None,
) -> list[ChannelGroup]:
    """Return every group that can be cut, with its channels' scores.

    `images` is one input (1, c, h, w). Left out are groups that reach an output of a module named by `exclude` (shell patterns), a wall of
    the graph (a split, a shuffle), or a layer that reads only some of their channels.
    Raises CompressError if channels cannot be followed, or a pattern names no layer.
    """
    graph = channel_graph(model, images)
    names = {module: name for name, module in model.named_modules()}
    layers = [name for module, name in names.items() if any(True for _ in module.parameters(recurse=False))]
    kept = [model.get_submodule(name) for name in matching("prune.exclude", exclude, layers)]
    groups = []
    surgeon = None if covariances is None else Surgeon(covariances)
    for group in graph.get_all_groups(ignored_layers=kept):
        if graph.reaches_wall(group) or any(len(item.idxs) % len(group[0].idxs) for item in group.items):
            continue
        scores = score(group, criterion)
        if surgeon is not None:
            scores = _remaining_error(surgeon.channel_scores(group, _unit(group)), scores)
        if scores is not None:
            groups.append(_describe(group, names, scores))
    for attention in find_attentions(model, images):
        scores = score_slices(attention.slices(), attention.heads, criterion)
        if surgeon is not None:
            scores = _remaining_error(surgeon.head_scores(attention), scores)
        if scores is not None and not any(attention.module.get_submodule(name) in kept for name in attention.inputs):
            groups.append(_heads(attention, scores))
    groups += [group for path, side in _inside(model, kept) if (group := _side(model, path, side, criterion, surgeon))]
    return _runnable(groups, model, images)


def find_options(
    groups: Sequence[ChannelGroup],
    layers: Sequence[Layer],
    *,
    scope: Scope,
    round_to: int,
    min_channels: Mapping[str, int],
    branches: tuple[Branch, ...] = (),
) -> Options:
    """Return the blocks that can be removed; `min_channels` is each root's smallest width, `branches` may go whole."""
    blocks = [block for index, group in enumerate(groups) for block in _blocks(index, group, round_to, min_channels)]
    return Options(groups, layers, _ranked(blocks, groups, scope), round_to, branches)


def choose(options: Options, cost: WidthCost, budget: float) -> list[Cut]:
    """Return the cuts after which the network costs at most `budget`; all blocks if the budget cannot be met."""

    def after(blocks: Sequence[Block]) -> float:
        return cost(*options.widths(options.removed(blocks)))

    fewest = bisect_left(range(len(options.blocks)), True, key=lambda n: after(options.blocks[:n]) <= budget)
    kept = list(options.blocks[:fewest])
    open_groups = {block.group for block in kept}
    # The last block can be far larger than the others, so restore the most important ones that still fit.
    for block in reversed(options.blocks[:fewest]):
        without = [other for other in kept if other is not block]
        if block.group not in open_groups:
            continue  # a group's less important blocks are restored only after its more important ones
        if after(without) <= budget:
            kept = without
        else:
            open_groups.discard(block.group)
    return options.cuts(kept)


def cut_(model: nn.Module, images: Tensor, cuts: Sequence[Cut]) -> None:
    """Remove the channels in place. The same cuts on the same weights give the same network, bit for bit."""
    whole = [cut for cut in cuts if not cut.remove]
    channels = []
    for cut in (cut for cut in cuts if cut.remove):
        if inside := side_of(cut.root):
            cut_side_(model, *inside, cut.remove)
        elif hasattr(model.get_submodule(cut.root), "num_heads"):
            cut_heads_(attention_at(model, cut.root), cut.remove)
        else:
            channels.append(cut)
    graph = channel_graph(model, images)
    for cut in channels:
        root = model.get_submodule(cut.root)
        pruner = graph.get_pruner_of_module(root)
        graph.get_pruning_group(root, pruner.prune_out_channels, list(cut.remove)).prune(record_history=False)
    for cut in whole:
        model.set_submodule(cut.root, nn.Identity())
    for parameter in model.parameters():
        parameter.grad = None


def widths(before: Sequence[Layer], model: nn.Module) -> list[Width]:
    """Return every convolution's and linear layer's channels before and after; zero for a removed layer."""
    table, left = [], dict(model.named_modules())
    for layer in before:
        module, inputs, outputs = left.get(layer.name), 0, 0
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            inputs, outputs = module.in_channels, module.out_channels
        elif isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        elif not layer.kind.startswith(("Conv", "Linear")):
            continue
        table.append(Width(layer.name, layer.kind, layer.inputs, inputs, layer.outputs, outputs))
    return table


def smallest_widths(groups: Sequence[ChannelGroup], min_keep: float) -> dict[str, int]:
    """Return each root's smallest width: the fraction `min_keep` of its channels, at least one."""
    return {group.root: max(1, math.ceil(group.channels * min_keep)) for group in groups}


def _remaining_error(known: Tensor | None, importance: Tensor | None) -> Tensor | None:
    """Return a group's scores under `obs`: the error if it is known, else what stands for it."""
    return known if known is not None or importance is None else shares_in_order(importance)


def _describe(group: Any, names: Mapping[nn.Module, str], scores: Tensor) -> ChannelGroup:
    channels = len(group[0].idxs)
    touches, pattern = [], []
    for item in group.items:
        module, output = item.dep.target.module, is_output_cut(item.dep.handler)
        pattern.append(f"{type(module).__name__}:{'out' if output else 'in'}")
        if module in names and isinstance(getattr(module, "weight", None), Tensor):
            touches.append((names[module], output, max(1, len(item.idxs) // channels)))
    root = names[group[0].dep.target.module]
    return ChannelGroup(root, channels, _unit(group), "|".join(pattern), tuple(touches), scores)


def _unit(group: Any) -> int:
    """Return the number of channels that leave at once, one of each group of a convolution or a normalization."""
    modules = [item.dep.target.module for item in group.items]
    grouped = [one.groups for one in modules if isinstance(one, nn.Conv2d) and 1 < one.groups != one.in_channels]
    return math.lcm(*grouped, *(one.num_groups for one in modules if isinstance(one, nn.GroupNorm)))


def _runnable(groups: list[ChannelGroup], model: nn.Module, images: Tensor) -> list[ChannelGroup]:
    """Return the groups that the network can lose a unit of and still run; a forward may depend on some other width."""
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


def _inside(model: nn.Module, kept: Sequence[nn.Module]) -> Iterator[tuple[str, Side]]:
    """Yield the path and side of all dimensions inside heads that can be cut."""
    for path, module in model.named_modules():
        if isinstance(module, HeadAttention) and not any(module.get_submodule(name) in kept for name in module.sides):
            yield from ((path, side) for side in dict.fromkeys(PARTS))


def _side(model: nn.Module, path: str, side: Side, criterion: str, surgeon: Surgeon | None) -> ChannelGroup | None:
    """Return the group of one side's dimensions; None if they have no scores."""
    module = model.get_submodule(path)
    assert isinstance(module, HeadAttention)
    channels = module.heads * module.widths[side]
    scores = score_slices(module.slices(side), channels, criterion)
    if surgeon is not None:
        scores = _remaining_error(surgeon.side_scores(module, side), scores)
    if scores is None:
        return None
    counts = Counter(name for own, name, _ in module.places() if own == side)
    touches = [(f"{path}.{name}", True, count) for name, count in counts.items()]
    touches += [(f"{path}.{module.output}", False, 1)] if side == "value" else []
    pattern = f"{side}:{module.widths[side]}"
    return ChannelGroup(side_root(path, side), channels, module.heads, pattern, tuple(touches), scores)


def _ranked(blocks: Sequence[Block], groups: Sequence[ChannelGroup], scope: Scope) -> list[Block]:
    """Return the blocks by rank: the score, the place in the group, or the place among all groups of the same structure."""
    if scope == "global":
        ranked = [replace(block, rank=block.score) for block in blocks]
    elif scope == "local":
        ranked = [replace(block, rank=block.place) for block in blocks]
    else:
        ranked = []
        for pattern in dict.fromkeys(group.pattern for group in groups):
            same = sorted(
                (block for block in blocks if groups[block.group].pattern == pattern), key=lambda block: block.score
            )
            channels = sum(group.channels for group in groups if group.pattern == pattern)
            gone = np.cumsum([len(block.channels) for block in same]) / channels
            ranked += [replace(block, rank=float(place)) for place, block in zip(gone, same, strict=True)]
    return sorted(ranked, key=lambda block: (block.rank, block.score))


def _blocks(index: int, group: ChannelGroup, round_to: int, min_channels: Mapping[str, int]) -> list[Block]:
    """Return a group's removable blocks, least important first; the remaining width is a multiple of `round_to`."""
    units = group.channels // group.unit
    scores = group.scores.view(group.unit, units).mean(0)  # (units,)
    order = torch.argsort(scores, stable=True).tolist()
    # Kernels work on one head at a time, so dimensions inside heads stay a multiple for each of them.
    step = round_to // (1 if side_of(group.root) else math.gcd(round_to, group.unit * group.width))
    smallest = max(step, math.ceil(min_channels[group.root] / group.unit))
    first = units % step or step  # the first block takes the odd channels too
    edges = [0, *range(first, units - smallest + 1, step)]
    blocks = []
    for start, end in itertools.pairwise(edges):
        members = order[start:end]
        channels = [unit + part * units for part in range(group.unit) for unit in members]
        value = float(scores[members].mean())
        blocks.append(Block(index, tuple(channels), value, end / units))
    return blocks
