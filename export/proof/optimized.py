"""The graph that ONNX Runtime runs after its optimizer, and what of it is still in float."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from export.onnx_file.wiring import DQ, FLOAT, INTEGER, Q, Wiring, wire
from export.runtime.session import open_session

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
# They move values and compute nothing; ONNX Runtime runs them on integers and floats alike.
MOVES = frozenset({
    "Cast", "Constant", "Flatten", "Gather", "Identity", "MemcpyFromHost", "MemcpyToHost", "ReorderInput", "ReorderOutput",
    "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
NO_FLOATS = (Q, "Shape", "Size", "ArgMax", "ConvInteger", "MatMulInteger")  # none come out of these, whatever goes in


def optimize(model: ModelProto, provider: str) -> Wiring:
    """Return the graph that `provider` runs."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        open_session(model.SerializeToString(), provider=provider, optimized_file=optimized)
        return wire(onnx.load(optimized))


def leftover_qdq(runs: Wiring) -> list[NodeProto]:
    """Return the Q/DQ nodes of an optimized graph, less one Q that the input and one DQ that the output needs.

    Between those and the graph's ends stands no layer and nothing on a grid.
    """
    pairs = [node for node in runs.nodes.values() if node.op_type in (Q, DQ)]
    entry = next((node for node in pairs if node.op_type == Q and not _meets_grid(node, runs.above)), None)
    leave = next((node for node in pairs if node.op_type == DQ and not _meets_grid(node, runs.below)), None)
    return [node for node in pairs if node is not entry and node is not leave]


def float_operators(runs: Wiring) -> list[NodeProto]:
    """Return the nodes of an optimized graph that compute in float and are neither layers nor Q/DQ."""
    floats = _float_tensors(runs)
    skip = {*MOVES, *INTEGER, *FLOAT, Q, DQ}
    return [node for node in runs.nodes.values() if node.op_type not in skip and node.output[0] in floats]


def _float_tensors(runs: Wiring) -> set[str]:
    """Return the names of the tensors of floats; ONNX's own inference does not know the operators that ONNX Runtime fuses."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in runs.model.graph.input}
    kinds |= {name: tensor.data_type for name, tensor in runs.constants.items()}
    floats = {name for name, kind in kinds.items() if kind in FLOATS}
    for node in runs.nodes.values():
        if node.op_type == "Cast":
            is_float = any(attribute.name == "to" and attribute.i in FLOATS for attribute in node.attribute)
        elif node.op_type == "QGemm":
            is_float = len(node.input) < 9  # without an output zero-point
        elif node.op_type in NO_FLOATS or node.op_type.startswith("QLinear"):
            is_float = False
        else:
            is_float = node.op_type == DQ or any(name in floats for name in node.input)
        floats.update(node.output if is_float else ())
    return floats


def _meets_grid(node: NodeProto, neighbours: Callable[[NodeProto], list[NodeProto]]) -> bool:
    """Tell whether a layer, a Q/DQ node or an integer operator lies anywhere in one direction from a node."""
    todo, seen = neighbours(node), set[str]()
    while todo:
        other = todo.pop()
        if other.op_type in (Q, DQ, *INTEGER, *FLOAT) or other.op_type.startswith("QLinear"):
            return True
        if other.name not in seen:
            seen.add(other.name)
            todo.extend(neighbours(other))
    return False
