"""The graph that ONNX Runtime runs after its optimizer, and its operations that are still float."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from export.onnx_file.operators import DQ, FLOAT, INTEGER, Q
from export.onnx_file.wiring import Wiring, wire
from export.runtime.providers import runtime_named
from export.runtime.session import open_session

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# Operators that only move values; ONNX Runtime runs them on integers and floats alike.
MOVES = frozenset({
    "Cast", "Constant", "Flatten", "Gather", "Identity", "MemcpyFromHost", "MemcpyToHost", "ReorderInput", "ReorderOutput",
    "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
NO_FLOATS = (Q, "Shape", "Size", "ArgMax", "ConvInteger", "MatMulInteger")  # operators whose outputs are never float


def optimize(model: bytes, provider: str) -> Wiring:
    """Return the graph that `provider` runs for a model."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        open_session(model, runs_in=runtime_named(provider), optimized_file=optimized)
        return wire(onnx.load(optimized))


def leftover_qdq(runs: Wiring) -> list[ir.Node]:
    """Return the Q/DQ nodes of an optimized graph, except one Q for the input and one DQ for the output.

    Those two are exempt only if there is no layer and nothing on a grid between them and the graph's ends.
    """
    pairs = [node for node in runs.nodes.values() if node.op_type in (Q, DQ)]
    entry = next((node for node in pairs if node.op_type == Q and not _meets_grid(node, ir.Node.predecessors)), None)
    leave = next((node for node in pairs if node.op_type == DQ and not _meets_grid(node, ir.Node.successors)), None)
    return [node for node in pairs if node is not entry and node is not leave]


def float_operators(runs: Wiring) -> list[ir.Node]:
    """Return the nodes of an optimized graph that compute in float and are neither layers nor Q/DQ.

    Types are followed from the inputs on, because ONNX's type inference does not know ONNX Runtime's fused operators.
    """
    skip = {*MOVES, *INTEGER, *FLOAT, Q, DQ}
    floats = {value for value in runs.values.values() if value.producer() is None and value.dtype in FLOATS}
    for node in runs.nodes.values():
        if _gives_float(node, floats):
            floats.update(node.outputs)
    return [node for node in runs.nodes.values() if node.op_type not in skip and node.outputs[0] in floats]


def _gives_float(node: ir.Node, floats: set[ir.Value]) -> bool:
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) in FLOATS
    if node.op_type == "QGemm":
        return len(node.inputs) < 9  # without an output zero-point
    if node.op_type in NO_FLOATS or node.op_type.startswith("QLinear"):
        return False
    return node.op_type == DQ or not floats.isdisjoint(node.inputs)


def _meets_grid(node: ir.Node, neighbours: Callable[[ir.Node], Iterable[ir.Node]]) -> bool:
    """Tell whether a layer, a Q/DQ node or an integer operator is reachable from a node in one direction."""
    todo, seen = list(neighbours(node)), set[ir.Node]()
    while todo:
        other = todo.pop()
        if other.op_type in (Q, DQ, *INTEGER, *FLOAT) or other.op_type.startswith("QLinear"):
            return True
        if other not in seen:
            seen.add(other)
            todo.extend(neighbours(other))
    return False
