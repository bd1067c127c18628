"""What a file takes node by node, and its layers cut out of it, to be timed alone at other widths.

A piece is a layer with its own Q/DQ nodes and the activation or addition after it, in ONNX's operators: every provider opens it, and fuses
it as it does in the whole file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan, prod
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compress.pruning.costs import Layer
from export.onnx_file.names import module_of
from export.onnx_file.operators import DQ, FLOAT, INTEGER, LAYERS, Q
from export.runtime.conditions import Conditions
from export.runtime.node_times import node_times

RUNS = 30  # profiled runs of the whole file
MATRICES = ("Gemm", "MatMul")
# What providers fuse into the layer before it.
FUSED = ("Add", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid")
FREE = ("Clip", "Relu")  # take no time of their own once they are fused
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
FROM_LAST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # permutations of a map whose channels are last


@dataclass(frozen=True)
class Piece:
    """A layer cut out of a file: its nodes in order, and the constants that they read."""

    nodes: tuple[NodeProto, ...]
    constants: Mapping[str, TensorProto]
    layer: NodeProto
    weights: TensorProto

    @property
    def widths(self) -> tuple[int, int]:
        """The inputs and outputs that it has in the file."""
        dims, groups = self.weights.dims, _attribute(self.layer, "group", 1)
        if self.layer.op_type in MATRICES:
            return (dims[1], dims[0]) if _attribute(self.layer, "transB", 0) else (dims[0], dims[1])
        return (dims[0], dims[1] * groups) if self.layer.op_type == "ConvTranspose" else (dims[1] * groups, dims[0])

    @property
    def types(self) -> tuple[int, int]:
        """The types of the tensors that it reads and writes."""
        number = self.weights.data_type if self.weights.data_type in FLOATS else TensorProto.FLOAT
        ends = [node for node in self.nodes if node.op_type == DQ and node.output[0] == self.layer.input[0]]
        read, written = (
            self.constants[node[0].input[2]].data_type if node else number
            for node in (ends, [node for node in self.nodes if node.op_type == Q])
        )
        return read, written


@dataclass(frozen=True)
class Node:
    """What runs as one node: its time in the whole file, and its layer or the layers whose outputs it reads."""

    name: str
    ms: float  # nan for a layer that the provider compiled into something larger
    layer: int | None  # index in the list of layers; None if the node is no layer
    follows: tuple[int, ...]  # indices of the layers that it reads; empty if the node is a layer
    piece: Piece | None = None  # None if the node is no layer, or cannot be cut out


def read_nodes(path: Path, layers: Sequence[Layer], conditions: Conditions) -> list[Node]:
    """Return the nodes of a file that take time, and its layers; BundleError if it cannot run."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = conditions.batch
    file = _File(model)
    position = {layer.name: index for index, layer in enumerate(layers)}
    made_by: dict[str, tuple[int, ...]] = {}  # the layers whose outputs a tensor holds
    found: dict[str, Node] = {}
    for node in model.graph.node:
        data = [name for name in node.input if name in made_by]
        sources = data if node.op_type == "Concat" else data[:1]  # its width is the sum over all inputs
        follows = tuple(dict.fromkeys(index for name in sources for index in made_by[name]))
        layer = position.get(module_of(node.name)) if node.op_type in LAYERS else None
        made_by |= dict.fromkeys(node.output, follows if layer is None else (layer,))
        piece = None if layer is None else file.piece(node)
        found[node.name] = Node(node.name, nan, layer, follows if layer is None else (), piece)
    profile = node_times(model.SerializeToString(), provider=conditions.provider, threads=conditions.threads, runs=RUNS)
    ran = [(file.ran_as(one.name, one.operator), one.milliseconds) for one in profile]
    compiled = any(node.layer is not None and node.name not in dict(ran) for node in found.values())
    ms: dict[str, float] = {}
    here = None
    for name, took in ran:
        here = name or (None if compiled else here)  # a node that the optimizer added counts to the one before it
        if here is not None:
            ms[here] = ms.get(here, 0.0) + took
    timed = (replace(node, ms=ms.get(name, nan)) for name, node in found.items())
    return [node for node in timed if node.layer is not None or node.name in ms]


class _File:
    """A model's nodes and constants by name."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = {node.name: node for node in model.graph.node}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {value.name: [NodeProto()] for value in model.graph.output}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def ran_as(self, name: str, operator: str) -> str | None:
        """Return the name of the file's node that ran under a name, or None for one that the optimizer added.

        A fused float layer is named after its last output, so the search goes up from there to the layer.
        """
        node = self.nodes.get(name) or self.makers.get(name)
        while node is not None and operator in (*INTEGER, *FLOAT) and node.op_type not in LAYERS:
            node = self.makers.get(node.input[0]) if node.input else None
        return None if node is None else str(node.name)

    def piece(self, layer: NodeProto) -> Piece | None:
        """Cut a layer out with what is fused into it; None if its weights are computed."""
        above = {name: self.makers[name] for name in layer.input if name in self.makers}
        weights = above[layer.input[1]].input[0] if layer.input[1] in above else layer.input[1]
        computed = any(name in above and above[name].op_type != DQ for name in layer.input[1:])
        if computed or weights not in self.constants:
            return None
        nodes = [node for node in above.values() if node.op_type == DQ]
        nodes.append(layer)
        while nodes[-1].op_type != Q and len(readers := self.readers.get(nodes[-1].output[0], [])) == 1:
            dynamic = [name for name in readers[0].input if name in self.makers]
            if readers[0].op_type not in (*FUSED, Q) or len(dynamic) > 1:
                break
            nodes.append(readers[0])
        constants = {name: self.constants[name] for node in nodes for name in node.input if name in self.constants}
        return Piece(tuple(nodes), constants, layer, self.constants[weights])


def signature(piece: Piece, layer: Layer, batch: int) -> str:
    """Return a digest of all that decides a layer's time; equal for layers of the same shape, whatever their names."""
    facts = [
        [
            node.domain,
            node.op_type,
            sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute),
            [
                [piece.constants[name].data_type, list(piece.constants[name].dims)]
                if name in piece.constants
                else bool(name)
                for name in node.input
            ],
        ]
        for node in piece.nodes
        if node.op_type not in FREE
    ]
    return hashlib.sha256(json.dumps([facts, layer.maps, batch]).encode()).hexdigest()[:24]


def alone(piece: Piece, layer: Layer, *, inputs: int, outputs: int, batch: int) -> bytes:
    """Return a model with only a piece, at other widths.

    Weights are repeated or cut; time does not depend on their values. Integers come and go with their channels last, as all providers lay
    them out, so that no time goes into turning them.
    """
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in piece.nodes]
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.name == "group" and layer.depthwise:
            attribute.i = outputs
    constants = [_resized(tensor, piece, layer, inputs, outputs) for tensor in piece.constants.values()]
    before, after = layer.maps
    matrices = piece.layer.op_type in MATRICES
    read, written = piece.types
    turned = not {read, written} & {*FLOATS} and len(before) == len(after) == 2 and not matrices

    def shape(channels: int, sides: tuple[int, ...]) -> list[int]:
        if matrices:
            return [batch * prod(sides), channels] if piece.layer.op_type == "Gemm" else [batch, *sides, channels]
        return [batch, *sides, channels] if turned else [batch, channels, *sides]

    made = {name for node in nodes for name in node.output}
    first = next(
        name for node in nodes for name in node.input if name and name not in made and name not in piece.constants
    )
    end = nodes[-1].output[0]
    if turned:
        nodes.insert(0, helper.make_node("Transpose", ["turned"], [first], perm=FROM_LAST))
        nodes.append(helper.make_node("Transpose", [end], ["back"], perm=TO_LAST))
        first, end = "turned", "back"
    value = helper.make_tensor_value_info(first, read, shape(inputs, before))
    result = helper.make_tensor_value_info(end, written, shape(outputs, after))
    graph = helper.make_graph(nodes, "piece", [value], [result], constants)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model: ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return bytes(model.SerializeToString())


def _resized(tensor: TensorProto, piece: Piece, layer: Layer, inputs: int, outputs: int) -> TensorProto:
    """Return a constant of a piece at other widths: the weights, or one with an entry for each output."""
    shape, groups = list(tensor.dims), _attribute(piece.layer, "group", 1)
    if tensor is not piece.weights:
        shape = [outputs if size == piece.widths[1] and size > 1 else size for size in shape]
    elif piece.layer.op_type in MATRICES:
        shape = [outputs, inputs] if _attribute(piece.layer, "transB", 0) else [inputs, outputs]
    elif layer.depthwise:
        shape[0] = outputs
    elif piece.layer.op_type == "ConvTranspose":
        shape[:2] = inputs, outputs // groups
    else:
        shape[:2] = outputs, inputs // groups
    return numpy_helper.from_array(np.resize(numpy_helper.to_array(tensor), shape), tensor.name)


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
