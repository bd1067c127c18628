"""Cut a Q/DQ graph into pieces, one for each quantized tensor, that can be fed and checked alone."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.onnx_file.graph import OUTPUT
from export.onnx_file.names import module_of
from export.onnx_file.wiring import DQ, LAYERS, Q, Wiring


@dataclass(frozen=True)
class Piece:
    """What computes one tensor from the quantized tensors before it; all of its inputs and its output are float32."""

    name: str  # of the tensor: its quantizer's module path, `logits` for the graph's output
    layers: tuple[str, ...]  # node names of the convolutions and matrix products in it
    scale: float | None  # one level; None for the graph's output, which has no grid
    inputs: tuple[str, ...]  # names of the tensors it reads, `IMAGES` for the graph's own input
    model: ModelProto

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the module paths of its layers."""
        return tuple(module_of(layer) for layer in self.layers)


IMAGES = ""


def quantized_tensors(file: Wiring) -> dict[str, NodeProto]:
    """Return the QuantizeLinear nodes of activations by the name of their tensor, in the file's order.

    That is the quantizer's module path, in a file of ONNX Runtime's own quantizer the float tensor's name.
    """
    found: dict[str, NodeProto] = {}
    for node in file.nodes.values():
        if node.op_type == Q and file.of_data(node) and any(below.op_type == DQ for below in file.below(node)):
            name = node.name.removesuffix(f"/{Q}").removesuffix(f"_{Q}")
            found[name if name not in found else node.name] = node
    return found


def exposed(file: Wiring) -> tuple[ModelProto, dict[str, str]]:
    """Return the model with every quantized tensor's float value among its outputs, and the outputs' names by tensor."""
    model = ModelProto.FromString(file.model.SerializeToString())
    outputs = {name: _dequantized(node, file) for name, node in quantized_tensors(file).items()}
    mine = {value.name for value in model.graph.output}
    for tensor in dict.fromkeys(outputs.values()):
        if tensor not in mine:
            model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    return model, outputs


def pieces(file: Wiring, known: Collection[str]) -> list[Piece]:
    """Return the pieces between the quantized tensors that are `known` by name, in the file's order; the graph's output is last."""
    tensors = {name: node for name, node in quantized_tensors(file).items() if name in known}
    inferred = onnx.shape_inference.infer_shapes(file.model).graph
    shapes = {value.name: value for value in [*inferred.value_info, *inferred.input]}
    cut = [_piece(name, _dequantized(node, file), node, tensors, file, shapes) for name, node in tensors.items()]
    (output,) = file.model.graph.output
    if output.name not in {piece.model.graph.output[0].name for piece in cut}:
        cut.append(_piece(OUTPUT, output.name, None, tensors, file, shapes))
    return cut


def _piece(
    name: str,
    wanted: str,
    quantize: NodeProto | None,
    tensors: dict[str, NodeProto],
    file: Wiring,
    shapes: dict[str, onnx.ValueInfoProto],
) -> Piece:
    """Walk up from a tensor to the known QuantizeLinear nodes and copy what lies between; those are fed with floats."""
    starts = {node.name: tensor for tensor, node in tensors.items() if node is not quantize}
    todo, kept = [wanted], dict[str, NodeProto]()
    while todo:
        node = file.producer.get(todo.pop())
        if node is not None and node.name not in kept:
            kept[node.name] = node
            todo.extend(() if node.name in starts else node.input)
    graph = onnx.GraphProto(name=file.model.graph.name)
    inputs: list[str] = []
    for node in (node for node in file.nodes.values() if node.name in kept):
        copied = graph.node.add()
        copied.CopyFrom(node)
        if node.name in starts:
            tensor = starts[node.name]
            copied.input[0] = f"{tensor}:given"  # the float tensor above may feed another quantizer
            # What is given was read: a hard sigmoid is a pair that writes with one scale and reads with another.
            copied.input[1:] = _reader(node, file).input[1:]
            graph.input.append(_value(copied.input[0], shapes.get(node.input[0])))
            inputs.append(tensor)
    used = {tensor for node in graph.node for tensor in node.input}
    for value in file.model.graph.input:
        if value.name in used and value.name not in file.constants:
            graph.input.append(_value(value.name, value))
            inputs.append(IMAGES)
    graph.output.append(_value(wanted, shapes.get(wanted)))
    graph.initializer.extend(tensor for constant, tensor in file.constants.items() if constant in used)
    model = ModelProto(ir_version=file.model.ir_version, graph=graph)
    model.opset_import.extend(file.model.opset_import)
    return Piece(
        name=name,
        layers=tuple(node.name for node in graph.node if node.op_type in LAYERS),
        scale=None if quantize is None else float(_constant(_reader(quantize, file).input[1], file)),
        inputs=tuple(inputs),
        model=model,
    )


def _dequantized(quantize: NodeProto, file: Wiring) -> str:
    """Return the name of the float tensor that a QuantizeLinear node's levels stand for."""
    return str(_reader(quantize, file).output[0])


def _reader(quantize: NodeProto, file: Wiring) -> NodeProto:
    """Return the first DequantizeLinear that reads a QuantizeLinear node's levels."""
    return next(below for below in file.below(quantize) if below.op_type == DQ)


def _value(name: str, like: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    if like is not None:
        value.type.CopyFrom(like.type)
    return value


def _constant(name: str, file: Wiring) -> np.ndarray:
    return numpy_helper.to_array(file.constants[name])
