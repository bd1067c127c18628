"""Decide which operations run in integers, and place a quantizer wherever ONNX Runtime needs a Q/DQ pair for that.

A tensor can lie on a grid if an integer kernel writes it (a convolution, an addition of two such tensors) or it is the input, and it should
if an integer kernel reads it. An operation without weights runs in integers only if both hold; all else stays float, because a Q/DQ pair
that no kernel fuses costs time and accuracy. The network's output stays float.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from compress.quant.fake_quant import ActivationQuantizer, HardSigmoidQuantizer, JoinRange, Ranges, SameRange
from compress.quant.graph.trace import averages_pixels, called, is_end
from compress.quant.layers import QuantConv2d, QuantLinear, QuantNorm1d, QuantNorm2d
from export.onnx_file.targets import Target

CLIPS: dict[object, float] = {F.relu: math.inf, F.relu6: 6.0}
LAYERS = (QuantConv2d, QuantLinear)
NORMS = (QuantNorm2d, QuantNorm1d)
# Two tensors in: QLinearAdd, QLinearMul.
PAIRS = (operator.add, operator.mul)
JOINS = (torch.cat,)  # QLinearConcat
RANGES = (ActivationQuantizer, JoinRange)
# QLinearGlobalAveragePool and QLinearAveragePool.
ADAPTIVE_POOLS, POOLS, MEANS = (F.adaptive_avg_pool2d,), (F.avg_pool2d,), (torch.mean,)
# Measured in ONNX Runtime 1.32, one thread, AVX-512 VNNI: two 1x1 convolutions of 64 channels at 56 px with the function between them
# (least of 15 rounds; 0.24 ms without the function; SNR against float after the second convolution):
#   hard swish: float 0.65 ms, 32.7 dB; HardSigmoid then QLinearMul 0.53; QLinearLeakyRelu as a table of requantization, then QLinearMul
#   0.52, 32.6 dB; HardSigmoidQuantizer then QLinearMul 0.42, 32.6 dB
#   SiLU: float 0.52 ms, 32.6 dB; QLinearSigmoid then QLinearMul 0.43, 32.6 dB
# A batch-norm that follows no layer, then ReLU and a convolution of 256 channels at 28 px: as 1x1 depthwise QLinearConv 0.31 ms,
# 29.5 dB; float 0.53, 29.5 dB; QLinearMul and QLinearAdd 0.40, 28.5 dB.
# One tensor in: QLinearSigmoid and QLinearLeakyRelu are tables of 256 entries.
TABLES = (torch.sigmoid, F.leaky_relu)
HARD_SIGMOIDS = (F.hardsigmoid,)
KEEP_RANGE = (F.max_pool2d, F.channel_shuffle, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
              operator.getitem, torch.ops.aten.slice.Tensor, torch.ops.aten.select.int,
              torch.ops.aten.upsample_nearest2d.vec)  # fmt: skip
TUPLES = (torch.chunk, torch.split)
NO_OPS = TUPLES  # export to no operator that a Q/DQ pair could follow


@dataclass(frozen=True)
class Chain:
    """An operation with the batch-norm and the clip that its integer kernel fuses."""

    start: fx.Node
    end: fx.Node
    cap: float  # upper bound of a ReLU6, else infinite


def place_quantizers_(graph: fx.GraphModule, target: Target, ranges: Ranges) -> None:
    """Insert activation quantizers so that every operation that can run in integers on this target does."""
    _place_hard_sigmoids(graph, target)
    chains = {chain.end: chain for chain in _chains(graph)}
    on_grid = _on_grid(graph, chains)
    wanted = _wanted(graph, chains, on_grid)
    for node in list(graph.graph.nodes):
        if keeps_range(graph, node) and node in on_grid:
            if node in wanted and called(graph, node) not in NO_OPS:
                _insert_after(graph, node, SameRange(), f"same_range_{node.name}", list(node.users))
        elif node in wanted or (node in chains and _needs_grid_behind(graph, chains[node])):
            chain = chains.get(node, Chain(node, node, math.inf))
            # An integer kernel has only integers for its readers; a float operation's other readers keep the float.
            readers = list(node.users) if node in chains and node in on_grid else list(wanted[node])
            quantizer = ActivationQuantizer(target, cap=chain.cap, ranges=ranges)
            quantizer.group = _group(graph, chain.start)
            _insert_after(graph, node, quantizer, f"quantizer_{chain.start.name}", readers)
    for node in reversed(graph.graph.nodes):
        if called(graph, node) in JOINS:
            _join_ranges_(graph, node)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def _join_ranges_(graph: fx.GraphModule, join: fx.Node) -> None:
    """Write a concatenation's inputs on its output grid, where nothing else reads them.

    A kernel fuses a clip only if its grid ends at the bound, so all inputs must be clipped alike.
    """
    behind = graph.get_submodule(str(user.target)) if (user := only_user(graph, join, RANGES)) else None
    owner = behind.quantizer if isinstance(behind, JoinRange) else behind
    caps = _caps(graph, join)
    if not isinstance(owner, ActivationQuantizer) or len(caps) > 1:
        return
    owner.cap = min(owner.cap, *(math.inf if cap is None else cap for cap in caps))
    for source in join.all_input_nodes:
        node = source
        while len(node.users) == 1 and (called(graph, node) is SameRange or keeps_range(graph, node)):
            node = node.all_input_nodes[0]
        if len(node.users) == 1 and called(graph, node) is ActivationQuantizer:
            node.target = f"join_{node.target}"
            graph.add_submodule(node.target, JoinRange(owner))


def _caps(graph: fx.GraphModule, node: fx.Node) -> set[float | None]:
    """Return the clip bounds of a concatenation's inputs, None for an input without a clip."""
    found = set[float | None]()
    for source in node.all_input_nodes:
        while is_quantized(graph, source) or keeps_range(graph, source):
            source = source.all_input_nodes[0]
        found |= _caps(graph, source) if called(graph, source) in JOINS else {CLIPS.get(called(graph, source))}
    return found


def is_quantized(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a tensor lies on a quantizer's grid, also after pools and reshapes that keep the grid."""
    while called(graph, node) in NO_OPS:
        node = node.all_input_nodes[0]
    return called(graph, node) in (SameRange, JoinRange) or is_quantizer(graph, node)


def layer_above(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the nearest quantized layer at or before a node, following first inputs."""
    while called(graph, node) not in LAYERS:
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node


def keeps_range(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node only moves, repeats or drops values.

    An adaptive pool counts (VGG's 7 x 7): at its usual input size it copies, and otherwise its averages stay inside the input's range.
    """
    what = called(graph, node)
    return what in KEEP_RANGE or what in TUPLES or (what in ADAPTIVE_POOLS and not _pools_to_one(node))


def is_kernel(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node that is no layer has an integer kernel, given grids on its inputs and output."""
    what = called(graph, node)
    if what in PAIRS:
        return sum(isinstance(argument, fx.Node) for argument in node.args) == 2
    if what in MEANS:
        return averages_pixels(node)
    if what in ADAPTIVE_POOLS:
        return _pools_to_one(node)
    return what in POOLS or what in JOINS or what in TABLES or what in CLIPS or what is QuantNorm2d


def runs_in_integers(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node that is no layer runs in integers in a prepared network: all grids are there."""
    if not is_kernel(graph, node) or not all(is_quantized(graph, source) for source in node.all_input_nodes):
        return False
    end = only_user(graph, node, CLIPS) or node
    return any(is_quantizer(graph, user) for user in end.users)


def is_quantizer(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node rounds activations."""
    what = called(graph, node)
    return isinstance(what, type) and issubclass(what, ActivationQuantizer)


def _pools_to_one(node: fx.Node) -> bool:
    return node.args[1] in (1, (1, 1), [1, 1])


def _place_hard_sigmoids(graph: fx.GraphModule, target: Target) -> None:
    """Replace each hard sigmoid by its quantizer, if the target has zero-points."""
    for node in list(graph.graph.nodes):
        if called(graph, node) in HARD_SIGMOIDS and not target.symmetric_activations:
            name, quantizer = f"quantizer_{node.name}", HardSigmoidQuantizer(target)
            quantizer.group = _group(graph, node)
            graph.add_submodule(name, quantizer)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(
                    graph.graph.call_module(name, (node.all_input_nodes[0],)), propagate_meta=True
                )
            graph.graph.erase_node(node)


def _chains(graph: fx.GraphModule) -> Iterator[Chain]:
    """Yield every operation with an output range of its own, and what its kernel fuses: batch-norm (layers only), one clip."""
    inside: set[fx.Node] = set()
    for node in graph.graph.nodes:
        layer = called(graph, node) in LAYERS
        if node in inside or not (layer or is_kernel(graph, node)):
            continue
        end, cap = node, CLIPS.get(called(graph, node), math.inf)
        if layer and (norm := only_user(graph, end, NORMS)):
            end = norm
        if called(graph, node) not in CLIPS and (clip := only_user(graph, end, CLIPS)):
            end, cap = clip, CLIPS[called(graph, clip)]
        inside.update(_between(node, end))
        yield Chain(node, end, cap)


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes of a chain after its start."""
    while end is not start:
        yield end
        end = end.all_input_nodes[0]


def only_user(graph: fx.GraphModule, node: fx.Node, kinds: object) -> fx.Node | None:
    """Return the only reader of a node's output, if it calls one of `kinds`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and called(graph, users[0]) in kinds else None  # type: ignore[operator]


def _on_grid(graph: fx.GraphModule, chains: dict[fx.Node, Chain]) -> set[fx.Node]:
    """Return the tensors that can lie on a grid because all inputs of their operation can."""
    on_grid: set[fx.Node] = set()
    for node in graph.graph.nodes:
        what, chain = called(graph, node), chains.get(node)
        if node.op == "placeholder" or what is HardSigmoidQuantizer:
            on_grid.add(node)
        elif chain is not None:
            tensors = [source for source in chain.start.all_input_nodes if source.op != "get_attr"]
            if called(graph, chain.start) in LAYERS or (tensors and on_grid.issuperset(tensors)):
                on_grid.add(node)
        elif keeps_range(graph, node) and node.all_input_nodes[0] in on_grid:
            on_grid.add(node)
    return on_grid


def _wanted(
    graph: fx.GraphModule, chains: dict[fx.Node, Chain], on_grid: set[fx.Node]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return the tensors that integer operations read, each with these readers."""
    starts = {chain.start: chain for chain in chains.values()}
    wanted: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in reversed(graph.graph.nodes):
        readers = []
        for user in node.users:
            chain = starts.get(user)
            end = chain.end if chain else user if keeps_range(graph, user) and user.all_input_nodes[0] is node else None
            if called(graph, user) in LAYERS or (end in on_grid and end in wanted):
                readers.append(user)
        if readers and called(graph, node) is not HardSigmoidQuantizer:
            wanted[node] = tuple(readers)
    return wanted


def _needs_grid_behind(graph: fx.GraphModule, chain: Chain) -> bool:
    """Tell whether a convolution needs an output grid that no reader asks for; not at the output, nor before a hard sigmoid."""
    users = [called(graph, user) for user in chain.end.users]
    at_the_end = any(is_end(graph, user) for user in chain.end.users)
    return called(graph, chain.start) is QuantConv2d and not at_the_end and users != [HardSigmoidQuantizer]


def _group(graph: fx.GraphModule, node: fx.Node) -> str | None:
    layer = layer_above(graph, node)
    return str(layer.target) if layer is not None else None


def _insert_after(graph: fx.GraphModule, node: fx.Node, module: nn.Module, name: str, readers: list[fx.Node]) -> None:
    graph.add_submodule(name, module)
    with graph.graph.inserting_after(node):
        inserted = graph.graph.call_module(name, (node,))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user in readers)
