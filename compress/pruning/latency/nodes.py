"""The nodes of a file after ONNX Runtime's optimizer, with the layers whose widths decide each node's time; and single nodes at other widths.

Such a node is what really runs: a layer fused with its quantizers, its activation and, in float, the addition after it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compress.pruning.costs import Layer
from export.onnx_file.names import ADDED, module_of
from export.onnx_file.operators import FLOAT, INTEGER
from export.onnx_file.wiring import origin, wire
from export.proof.optimized import optimize
from export.runtime.conditions import Conditions
from export.runtime.node_times import node_times

WEIGHTS = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3}  # input index of the weights; else 1
MATRICES = ("Gemm", "FusedGemm", "QGemm", "MatMul", "QLinearMatMul")
NCHWC = 16  # most channels in a block of the blocked layout
RUNS = 30  # profiled runs of the whole file
VARIED = {"Concat", "QLinearConcat"}  # output width is the sum over all inputs


@dataclass(frozen=True)
class Node:
    """One node of an optimized graph: its time in the whole file, and its layer or the layers whose outputs it reads."""

    name: str
    ms: float
    layer: int | None  # index in the list of layers; None if the node is no layer
    follows: tuple[int, ...]  # indices of the layers that it reads; empty if the node is a layer
    proto: NodeProto
    constants: dict[str, TensorProto]


def read_nodes(path: Path, layers: Sequence[Layer], conditions: Conditions) -> list[Node]:
    """Return the nodes of a file as ONNX Runtime runs them; BundleError if it cannot run."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = conditions.batch
    content = model.SerializeToString()
    file, runs = wire(model), optimize(content, conditions.provider)
    graph = onnx.load_model_from_string(runs.to_bytes()).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    times = node_times(content, provider=conditions.provider, threads=conditions.threads, runs=RUNS)
    ms = {found.name: found.milliseconds for found in times}
    position = {layer.name: index for index, layer in enumerate(layers)}
    made_by: dict[str, tuple[int, ...]] = {}  # the layers whose outputs a tensor holds
    nodes = []
    for node in graph.node:
        found = runs.nodes[node.name]
        written = origin(found, file) if found.op_type in (*INTEGER, *FLOAT) else None
        layer = None if written is None else position.get(module_of(str(written.name)))
        data = [name for name in node.input if name in made_by]
        sources = data if node.op_type in VARIED else data[:1]
        follows = tuple(dict.fromkeys(index for name in sources for index in made_by[name]))
        made_by |= dict.fromkeys(node.output, follows if layer is None else (layer,))
        constants = {name: initializers[name] for name in node.input if name in initializers}
        took = ms.get(ADDED.sub("", node.name), 0.0)
        nodes.append(Node(node.name, took, layer, () if layer is not None else follows, node, constants))
    return nodes


def signature(node: Node, layer: Layer, batch: int) -> str:
    """Return a digest of all that decides a layer's time; equal for layers of the same shape, whatever their names."""
    attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.proto.attribute)
    inputs = [
        [node.constants[name].data_type, list(node.constants[name].dims)] if name in node.constants else bool(name)
        for name in node.proto.input
    ]
    facts = [node.proto.domain, node.proto.op_type, attributes, inputs, layer.inputs, layer.outputs, layer.maps, batch]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def alone(node: Node, layer: Layer, *, inputs: int, outputs: int, batch: int) -> bytes | None:
    """Return a model with only a layer's node at other widths, or None if the node cannot be resized.

    Weights are repeated or cut; time does not depend on their values.
    """
    proto = NodeProto.FromString(node.proto.SerializeToString())
    place = WEIGHTS.get(proto.op_type, 1)
    weights = node.constants.get(proto.input[place]) if len(proto.input) > place else None
    if weights is None:
        return None
    blocked = proto.domain.endswith("nchwc")
    padded_in, padded_out = (_up(inputs), _up(outputs)) if blocked else (inputs, outputs)
    if blocked and layer.inputs % NCHWC:  # the first layer reads unpadded images
        padded_in = inputs
    full_out = weights.dims[0]
    constants = []
    for name, tensor in node.constants.items():
        array = numpy_helper.to_array(tensor)
        if tensor is weights:
            shape = _weight_shape(node, layer, array.shape, padded_in, padded_out)
            if shape is None:
                return None
            array = np.resize(array, shape)
        elif array.ndim == 1 and array.size in (layer.outputs, full_out) and array.size > 1:
            array = np.resize(array, padded_out if array.size == full_out else outputs)
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    for attribute in proto.attribute:
        if attribute.name == "group" and layer.depthwise:
            attribute.i = padded_out
    return _model(proto, constants, _element(node, place), layer, padded_in, padded_out, batch)


def _weight_shape(node: Node, layer: Layer, full: tuple[int, ...], inputs: int, outputs: int) -> tuple[int, ...] | None:
    if node.proto.op_type in MATRICES:
        if len(full) != 2 or set(full) != {layer.inputs, layer.outputs}:
            return None
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.proto.attribute)
        return (outputs, inputs) if transposed else (inputs, outputs)
    if len(full) != 4:
        return None
    if layer.depthwise:
        return (outputs, *full[1:])
    groups = next((attribute.i for attribute in node.proto.attribute if attribute.name == "group"), 1)
    return outputs, inputs // groups, *full[2:]


def _element(node: Node, place: int) -> int:
    """Return the type of a node's activations: the input zero-point's, else the weights'."""
    zero_point = node.constants.get(node.proto.input[2]) if place == 3 else None
    return int((zero_point or node.constants[node.proto.input[place]]).data_type)


def _model(
    node: NodeProto, constants: list[TensorProto], element: int, layer: Layer, inputs: int, outputs: int, batch: int
) -> bytes:
    channels_last = any(attribute.name == "channels_last" and attribute.i for attribute in node.attribute)
    before, after = layer.maps

    def shape(channels: int, sides: tuple[int, ...]) -> list[int]:
        if node.op_type in MATRICES:
            return [batch * int(np.prod(sides, dtype=int)), channels] if len(before) == 0 else [batch, *sides, channels]
        return [batch, *sides, channels] if channels_last else [batch, channels, *sides]

    given = {tensor.name for tensor in constants}
    dynamic = [name for name in dict.fromkeys(node.input) if name and name not in given]
    values = [helper.make_tensor_value_info(dynamic[0], element, shape(inputs, before))]
    values += [helper.make_tensor_value_info(name, element, shape(outputs, after)) for name in dynamic[1:]]
    out = element if node.op_type != "QGemm" or len(node.input) > 8 else TensorProto.FLOAT
    result = helper.make_tensor_value_info(node.output[0], out, shape(outputs, after))
    graph = helper.make_graph([node], "block", values, [result], constants)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    imports += [helper.make_opsetid(node.domain, 1)] if node.domain.endswith("nchwc") else []
    model: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return bytes(model.SerializeToString())


def inputs_of(model: bytes) -> dict[str, NDArray[np.generic]]:
    """Return random values of the declared types and shapes for a model's inputs."""
    rng = np.random.default_rng(0)
    values = {}
    for value in onnx.load_model_from_string(model).graph.input:
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        values[value.name] = rng.integers(0, 100, shape).astype(kind)
    return values


def _up(channels: int) -> int:
    return -(-channels // NCHWC) * NCHWC
