"""Who makes and who reads each tensor of an ONNX graph, and what of it is a layer, a Q/DQ node or a constant."""

from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from export.onnx_file.names import ADDED, unique

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What ONNX Runtime makes of them.
INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
FLOAT = (*LAYERS, "FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul")
Q, DQ = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Wiring:
    """The tables of one graph; every node has a name."""

    model: ModelProto
    nodes: dict[str, NodeProto]  # by name
    producer: dict[str, NodeProto]  # by tensor
    readers: dict[str, list[NodeProto]]  # by tensor
    constants: dict[str, TensorProto]  # initializers by name

    def above(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that make the inputs of `node`."""
        return [self.producer[name] for name in node.input if name in self.producer]

    def below(self, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that read the outputs of `node`."""
        return [reader for name in node.output for reader in self.readers.get(name, [])]

    def of_data(self, node: NodeProto) -> bool:
        """Tell whether a node carries activations: not a constant, nor weights behind a DequantizeLinear."""
        return bool(node.input) and node.input[0] not in self.constants

    def layers(self) -> list[NodeProto]:
        """Return the convolutions and matrix products in the file's order."""
        return [node for node in self.nodes.values() if node.op_type in LAYERS]

    def weights(self, layer: NodeProto) -> TensorProto | None:
        """Return a layer's weights as the file holds them, None where another tensor takes their place."""
        name = layer.input[1]
        made_by = self.producer.get(name)
        if made_by is not None and made_by.op_type == DQ:
            name = made_by.input[0]
        return self.constants.get(name)

    def is_quantized(self, layer: NodeProto) -> bool:
        """Tell whether both factors of a layer come out of a DequantizeLinear."""
        makers = [self.producer.get(name) for name in layer.input[:2]]
        return all(maker is not None and maker.op_type == DQ for maker in makers)


def wire(model: ModelProto) -> Wiring:
    """Return the tables of a copy of `model`, in which a node without a name of its own is named after its output."""
    model = ModelProto.FromString(model.SerializeToString())
    _constants_to_initializers_(model)
    names = unique(node.name or node.output[0] for node in model.graph.node)
    readers: dict[str, list[NodeProto]] = {}
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
        for tensor in dict.fromkeys(node.input):
            readers.setdefault(tensor, []).append(node)
    return Wiring(
        model=model,
        nodes={node.name: node for node in model.graph.node},
        producer={tensor: node for node in model.graph.node for tensor in node.output if tensor},
        readers=readers,
        constants={tensor.name: tensor for tensor in model.graph.initializer},
    )


def _constants_to_initializers_(model: ModelProto) -> None:
    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]:
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.node.remove(node)


def origin(node: NodeProto, file: Wiring) -> NodeProto | None:
    """Return the node of the file that a node of its optimized graph stands for, None for one that the optimizer added.

    The optimizer keeps a node's name and adds to it. A fused float layer is named after its last output, so from there
    the search goes up to the layer.
    """
    name = ADDED.sub("", node.name)
    found = file.nodes.get(name) or file.producer.get(name) or file.producer.get(ADDED.sub("", node.output[0]))
    if node.op_type in (*INTEGER, *FLOAT):
        while found is not None and found.op_type not in LAYERS:
            found = file.producer.get(found.input[0]) if found.input else None
    return found
