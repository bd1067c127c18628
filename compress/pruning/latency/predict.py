"""Predict a network's time from its layers' widths, and choose the widths that lose the least importance within a time.

The prediction is a sum over the nodes that ONNX Runtime runs: a layer's time in the whole file, times the table's fraction for its two
widths; any other node's time scales with its width. The choice is a mixed-integer program over all groups of channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.pruning.costs import Floats, Layer, full_widths
from compress.pruning.latency.knapsack import most_value
from compress.pruning.latency.nodes import Node
from compress.pruning.latency.timings import BUILT_IN, Grid, Table, Wanted, Widths, fill, widths_to_time
from compress.pruning.plan import Block, Cut, Options


@dataclass(frozen=True)
class LatencyModel:
    """The time of a network as a function of its layers' widths."""

    layers: Sequence[Layer]
    nodes: Sequence[Node]
    fractions: Sequence[Mapping[Widths, float]]  # for each node; empty if the node is no layer
    scale: float = 1.0  # the whole file's time over the sum of its nodes' times
    timed: int = 0  # rows of the table that were measured for this model
    grid: Grid = BUILT_IN

    def cost(self, outputs: Floats, inputs: Floats) -> float:
        """Return the milliseconds at the layers' widths (layers,)."""
        return self.scale * sum(self.node_ms(index, outputs, inputs) for index in range(len(self.nodes)))

    def node_ms(self, index: int, outputs: Floats, inputs: Floats) -> float:
        """Return one node's unscaled milliseconds at the layers' widths (layers,)."""
        node, fractions = self.nodes[index], self.fractions[index]
        if node.layer is not None:
            if not outputs[node.layer]:
                return 0.0  # its residual block is removed
            return node.ms * interpolated(fractions, float(inputs[node.layer]), float(outputs[node.layer]))
        if not node.follows:
            return node.ms
        full, _ = full_widths(self.layers)
        return node.ms * float(outputs[list(node.follows)].sum() / full[list(node.follows)].sum())


def interpolated(fractions: Mapping[Widths, float], inputs: float, outputs: float) -> float:
    """Return the fraction of the full-width time, interpolated linearly between measured widths."""
    if (inputs, outputs) in fractions:
        return fractions[inputs, outputs]  # type: ignore[index]
    columns = sorted({o for _, o in fractions})
    rows = sorted({i for i, _ in fractions})
    if len(fractions) < len(rows) * len(columns):  # depthwise: inputs equal outputs
        return float(np.interp(outputs, columns, [fractions[o, o] for o in columns]))
    by_row = [float(np.interp(outputs, columns, [fractions[i, o] for o in columns])) for i in rows]
    return float(np.interp(inputs, rows, by_row))


def latency_model(
    nodes: Sequence[Node],
    options: Options,
    table: Table,
    *,
    whole_ms: float,
    tell: Callable[[str], None],
) -> LatencyModel:
    """Return the latency model of a network whose whole file takes `whole_ms`; missing rows of the table are timed."""
    outputs, inputs = (np.flatnonzero(side.sum(0)) for side in options.reach)
    wanted = {
        index: Wanted(
            node.piece,
            layer := options.layers[node.layer],
            widths_to_time(
                layer,
                table.grid,
                round_to=options.round_to,
                cut_inputs=node.layer in inputs,
                cut_outputs=node.layer in outputs,
            ),
        )
        for index, node in enumerate(nodes)
        if node.layer is not None
    }
    found, timed = fill(table, list(wanted.values()), tell=tell)
    fractions = dict(zip(wanted, found, strict=True))
    scale = whole_ms / sum(node.ms for node in nodes)
    each = [fractions.get(index, {}) for index in range(len(nodes))]
    return LatencyModel(options.layers, nodes, each, scale, timed, table.grid)


@dataclass(frozen=True)
class Ladder:
    """The widths that one group can take: channels removed, importance lost, blocks removed.

    Importance is divided by the group's channels, so half of a narrow group costs as much as half of a wide one, and each block's by the
    square of the fraction that is left, as the next channel of a group that lost many is worth more. Without the first, narrow and slow
    layers lost most of their channels, without the second slow layers all that they could (docs/results.md). A group inside a residual
    block has width zero as its last.
    """

    removed: tuple[int, ...]
    lost: tuple[float, ...]
    blocks: tuple[tuple[Block, ...], ...]


def ladders(options: Options, grid: Grid = BUILT_IN) -> list[Ladder]:
    """Return each group's ladder, with about as many widths as the grid has: a wide group loses several blocks per level."""
    found = []
    inside = {index for branch in options.branches for index in branch.groups}
    for group in range(len(options.groups)):
        blocks = [block for block in options.blocks if block.group == group]
        channels = options.groups[group].channels
        gone = np.cumsum([0, *(len(block.channels) for block in blocks)])
        whole_tiles = grid.tile if channels >= 2 * grid.tile else 1
        taken = [n for n in range(len(blocks)) if n == 0 or (channels - gone[n]) % whole_tiles == 0]
        taken = [*taken[:: -(-len(taken) // grid.outputs)], len(blocks)] if blocks else [0]
        lost = np.cumsum(
            [0.0, *(block.rank * len(block.channels) / channels / (1 - block.place) ** 2 for block in blocks)]
        )
        ladder = Ladder(
            tuple(int(gone[n]) for n in taken),
            tuple(float(lost[n]) for n in taken),
            tuple(tuple(blocks[:n]) for n in taken),
        )
        if group in inside:
            whole, cut = options.groups[group], {channel for block in blocks for channel in block.channels}
            rest = sum(float(score) for channel, score in enumerate(whole.scores) if channel not in cut) / channels
            ladder = Ladder(
                (*ladder.removed, whole.channels), (*ladder.lost, ladder.lost[-1] + rest), (*ladder.blocks, ())
            )
        found.append(ladder)
    return found


def choose_within(options: Options, model: LatencyModel, budget_ms: float) -> list[Cut] | None:
    """Return the cuts that lose the least importance with a predicted time of at most `budget_ms`, or None if there are none.

    A layer's time is as the model predicts where at most two groups decide its widths. Where more do (after a concatenation), it is taken
    as a sum of one term per group.
    """
    steps = ladders(options, model.grid)
    own: list[Floats] = [np.zeros(len(ladder.removed)) for ladder in steps]
    pairs: dict[tuple[int, int], Floats] = {}
    outputs_reach, inputs_reach = options.reach
    nothing = np.zeros(len(steps))
    fixed = 0.0
    for index, node in enumerate(model.nodes):
        reached = [node.layer] if node.layer is not None else list(node.follows)
        sides = outputs_reach[:, reached].any(1)
        if node.layer is not None and not options.layers[node.layer].depthwise:
            sides = sides | (inputs_reach[:, node.layer] > 0)
        groups = np.flatnonzero(sides).tolist()

        def took(*gone: tuple[int, int], index: int = index) -> float:
            removed = nothing.copy()
            for group, level in gone:
                removed[group] = steps[group].removed[level]
            return model.scale * model.node_ms(index, *options.widths(removed))

        whole = took()
        if len(groups) == 2 and node.layer is not None:
            first, second = groups
            table = np.array(
                [
                    [took((first, i), (second, j)) for j in range(len(steps[second].removed))]
                    for i in range(len(steps[first].removed))
                ]
            )
            pairs[first, second] = pairs.get((first, second), 0.0) + table
            continue
        fixed += whole
        for group in groups:
            own[group] += [took((group, level)) - whole for level in range(len(steps[group].removed))]
    values = [-np.array(ladder.lost) for ladder in steps]
    together = [branch.groups for branch in options.branches]
    chosen = most_value(values, own, pairs, budget_ms - fixed, together=together)
    if chosen is None:
        return None
    gone = [b for b in options.branches if chosen[b.groups[0]] == len(steps[b.groups[0]].removed) - 1]
    cuts = options.cuts(block for ladder, level in zip(steps, chosen, strict=True) for block in ladder.blocks[level])
    return cuts + [Cut(branch.path, ()) for branch in gone]
