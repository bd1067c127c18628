"""Rewrite a traced network in operations that have integer kernels: same function, other nodes."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quant.graph.trace import trace

THREES: dict[object, float] = {operator.add: 3.0}
SIXTHS: dict[object, float] = {operator.truediv: 6.0, operator.mul: 1 / 6}


def traced(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the model as one graph whose activations are made of what integer kernels compute."""
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
    """Put x * function(x) in the place of the node, for x its input."""
    values = node.all_input_nodes[0]
    with graph.graph.inserting_before(node):
        gate = graph.graph.call_function(function, (values,))
        node.replace_all_uses_with(graph.graph.call_function(operator.mul, (values, gate)), propagate_meta=True)
    graph.graph.erase_node(node)


def _recognize_hard_sigmoids(graph: fx.GraphModule) -> None:
    """Write relu6(x + 3) / 6, as older networks spell it, as one hard sigmoid, and x * relu6(x + 3) / 6 as a product with it."""
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
    """Return x where a node is relu6(x + 3), and None elsewhere."""
    if node.target is not F.relu6:
        return None
    return _combined_with(node.all_input_nodes[0], THREES)


def _combined_with(node: fx.Node, constants: dict[object, float]) -> fx.Node | None:
    """Return the tensor that a node combines with the constant that stands by its operation, or None."""
    if len(node.args) != 2 or node.target not in constants or node.op == "call_module":
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, (int, float)) and abs(right - constants[node.target]) < 1e-6:
        return left
    return None
