"""Cut a Q/DQ graph into pieces, one for each quantized tensor, that can be run and checked alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.onnx_file.graph import OUTPUT
from export.onnx_file.names import module_of
from export.onnx_file.operators import DQ, LAYERS, Q
from export.onnx_file.wiring import Wiring, constant


@dataclass(frozen=True)
class Piece:
    """A model that computes one tensor from the quantized tensors before it; inputs and output are float32."""

    name: str  # the tensor's: its quantizer's module path, or the name of a graph's output
    layers: tuple[str, ...]  # node names of its convolutions and matrix products
    scale: float | None  # size of a level; None for a graph's output, which has no grid
    inputs: tuple[str, ...]  # names of the tensors it reads, GRAPH_INPUT for the graph's input
    model: bytes

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the module paths of its layers."""
        return tuple(module_of(layer) for layer in self.layers)


GRAPH_INPUT = ""
FLOAT = ir.TensorType(ir.DataType.FLOAT)


def quantized_tensors(file: Wiring) -> dict[str, ir.Node]:
    """Return the QuantizeLinear nodes of activations by tensor name, in the file's order.

    The name is the quantizer's module path, or the float tensor's name in a file by ONNX Runtime's quantizer.
    """
    found: dict[str, ir.Node] = {}
    for node in file.nodes.values():
        of_data = node.op_type == Q and node.inputs[0] is not None and not node.inputs[0].is_initializer()
        if of_data and any(below.op_type == DQ for below in node.successors()):
            name = str(node.name).removesuffix(f"/{Q}").removesuffix(f"_{Q}")
            found[name if name not in found else str(node.name)] = node
    return found


def exposed(file: Wiring) -> tuple[bytes, dict[str, str]]:
    """Return the model with the float value of every quantized tensor as an output, and the outputs' names by tensor."""
    model = file.model.clone()
    outputs = {name: str(_reader(node).outputs[0].name) for name, node in quantized_tensors(file).items()}
    values = ir.convenience.create_value_mapping(model.graph)
    for name in dict.fromkeys(outputs.values()):
        if not values[name].is_graph_output():
            values[name].type = FLOAT
            model.graph.outputs.append(values[name])
    return ir.to_proto(model).SerializeToString(), outputs


def pieces(file: Wiring, known: Collection[str]) -> list[Piece]:
    """Return the pieces between the quantized tensors named in `known`, in the file's order, the graph's outputs last."""
    model = file.model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    nodes = {node.name: node for node in model.graph}
    tensors = {name: nodes[node.name] for name, node in quantized_tensors(file).items() if name in known}
    outputs = list(model.graph.outputs)
    own = {name: node.inputs for name, node in tensors.items()}
    given: dict[str, list[ir.Value | None]] = {}
    for name, node in tensors.items():
        above = node.inputs[0]  # may feed another quantizer too
        start = ir.Value(name=f"{name}:given", type=FLOAT, shape=above.shape if above else None)
        model.graph.inputs.append(start)
        # Given values are as read by the DQ; a hard sigmoid's pair writes with one scale and reads with another.
        given[name] = [start, *_reader(node).inputs[1:]]
        _read(node, given[name])
    starts = {str(inputs[0].name): name for name, inputs in given.items() if inputs[0]}

    def piece(name: str, wanted: ir.Value, scale: float | None) -> Piece:
        wanted.type = FLOAT
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        graph = ir.convenience.extract(model.graph, inputs, [wanted])
        used = [value for value in graph.inputs if value.uses()]
        graph.inputs[:] = sorted(used, key=lambda value: value.name not in starts)
        return Piece(
            name=name,
            layers=tuple(str(node.name) for node in graph if node.op_type in LAYERS),
            scale=scale,
            inputs=tuple(starts.get(str(value.name), GRAPH_INPUT) for value in graph.inputs),
            model=ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString(),
        )

    cut: list[Piece] = []
    for name, node in tensors.items():
        _read(node, own[name])
        cut.append(piece(name, _reader(node).outputs[0], float(constant(_reader(node).inputs[1]))))
        _read(node, given[name])
    quantized = {_reader(node).outputs[0] for node in tensors.values()}
    names = [str(one.name) for one in outputs] if len(outputs) > 1 else [OUTPUT]
    cut += [piece(name, one, None) for name, one in zip(names, outputs, strict=True) if one not in quantized]
    return cut


def _read(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _reader(quantize: ir.Node) -> ir.Node:
    """Return the first DequantizeLinear after a QuantizeLinear node."""
    return next(below for below in quantize.successors() if below.op_type == DQ)
