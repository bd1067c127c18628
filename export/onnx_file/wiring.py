"""An ONNX graph whose nodes all have names, and helpers to find its layers, Q/DQ nodes and constants."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from export.onnx_file.names import ADDED, unique
from export.onnx_file.operators import DQ, FLOAT, INTEGER, LAYERS

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")


@dataclass(frozen=True)
class Wiring:
    """A model with its nodes and values by name; its constants are initializers."""

    model: ir.Model
    nodes: dict[str, ir.Node]
    values: dict[str, ir.Value]

    def layers(self) -> list[ir.Node]:
        """Return the convolutions and matrix products in the file's order."""
        return [node for node in self.nodes.values() if node.op_type in LAYERS]

    def to_bytes(self) -> bytes:
        """Return the model's serialized bytes."""
        return bytes(ir.to_proto(self.model).SerializeToString())


def wire(model: ModelProto) -> Wiring:
    """Return a copy of `model` in which a node without a name is named after its output."""
    copy = ir.from_proto(ModelProto.FromString(model.SerializeToString()))
    LiftConstantsToInitializersPass(size_limit=0)(copy)
    for node, name in zip(
        copy.graph, unique(node.name or str(node.outputs[0].name) for node in copy.graph), strict=True
    ):
        node.name = name
    nodes = {str(node.name): node for node in copy.graph}
    return Wiring(copy, nodes, ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False))


def maker(value: ir.Value | None) -> str:
    """Return the operator that computes a value, or an empty string."""
    node = value.producer() if value else None
    return node.op_type if node else ""


def constant(value: ir.Value | None) -> NDArray[Any]:
    """Return the content of a constant value."""
    tensor = value.const_value if value else None
    assert tensor is not None, "the value is not a constant"
    return tensor.numpy()


def weights(layer: ir.Node) -> ir.TensorProtocol | None:
    """Return a layer's weights as stored in the file, or None if they are computed."""
    value = layer.inputs[1]
    if value and (node := value.producer()) and node.op_type == DQ:
        value = node.inputs[0]
    return value.const_value if value else None


def is_quantized(layer: ir.Node) -> bool:
    """Tell whether both factors of a layer come from a DequantizeLinear, perhaps reshaped, as tokens are for a Gemm."""
    return all(maker(_unshaped(value)) == DQ for value in layer.inputs[:2])


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    while value is not None and maker(value) in RESHAPES:
        made = value.producer()
        value = made.inputs[0] if made else None
    return value


def origin(node: ir.Node, file: Wiring) -> ir.Node | None:
    """Return the file's node for a node of its optimized graph, or None for a node that the optimizer added.

    The optimizer extends a node's name. A fused float layer is named after its last output, so the search goes up from
    there to the layer.
    """
    name, output = ADDED.sub("", str(node.name)), ADDED.sub("", str(node.outputs[0].name))
    made = (value.producer() for value in (file.values.get(name), file.values.get(output)) if value)
    found = file.nodes.get(name) or next(filter(None, made), None)
    if node.op_type in (*INTEGER, *FLOAT):
        while found is not None and found.op_type not in LAYERS:
            found = found.inputs[0].producer() if found.inputs and found.inputs[0] else None
    return found
