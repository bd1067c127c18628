"""Rewrite a traced network in operations that have integer kernels; it computes the same function."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quant.graph.trace import trace

THREES: dict[object, float] = {operator.add: 3.0}
SIXTHS: dict[object, float] = {operator.truediv: 6.0, operator.mul: 1 / 6}


def traced(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the model as one graph, with SiLU and hard swish split into operations that have integer kernels."""
    graph = trace(model, images)
    for node in list(graph.graph.nodes):
        if node.target is F.silu:
            _gate(graph, node, torch.sigmoid)
        elif node.target is F.hardswish:
            _gate(graph, node, F.hardsigmoid)
    _recognize_hard_sigmoids(graph)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _gate(graph: fx.GraphModule, node: fx.Node, function: Callable[[Tensor], Tensor]) -> None:
    """Replace the node by x * function(x), where x is its input."""
    values = node.all_input_nodes[0]
    with graph.graph.inserting_before(node):
        gate = graph.graph.call_function(function, (values,))
        node.replace_all_uses_with(graph.graph.call_function(operator.mul, (values, gate)), propagate_meta=True)
    graph.graph.erase_node(node)


def _recognize_hard_sigmoids(graph: fx.GraphModule) -> None:
    """Replace relu6(x + 3) / 6, as older networks spell it, by a hard sigmoid, also as a factor in x * relu6(x + 3) / 6."""
    for node in list(graph.graph.nodes):
        sixfold = _combined_with(node, SIXTHS)
        if sixfold is None:
            continue
        product = sixfold.target is operator.mul and len(sixfold.users) == 1
        factors = list(sixfold.all_input_nodes) if product else [sixfold]
        clip = next((factor for factor in factors if _clipped_shift(factor) is not None), None)
        if clip is None:
            continue
        values = _clipped_shift(clip)
        with graph.graph.inserting_before(node):
            gate = graph.graph.call_function(F.hardsigmoid, (values,))
            if product:
                (other,) = [factor for factor in factors if factor is not clip]
                gate = graph.graph.call_function(operator.mul, (other, gate))
            node.replace_all_uses_with(gate, propagate_meta=True)
    graph.graph.eliminate_dead_code()


def _clipped_shift(node: fx.Node) -> fx.Node | None:
    """Return x if the node is relu6(x + 3), else None."""
    if node.target is not F.relu6:
        return None
    return _combined_with(node.all_input_nodes[0], THREES)


def _combined_with(node: fx.Node, constants: dict[object, float]) -> fx.Node | None:
    """Return the tensor that a node combines with its operation's entry in `constants`, or None."""
    if len(node.args) != 2 or node.target not in constants or node.op == "call_module":
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, (int, float)) and abs(right - constants[node.target]) < 1e-6:
        return left
    return None
