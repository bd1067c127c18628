"""Count the multiply-accumulates of an ONNX file's convolutions and matrix products from its shapes, for one image."""

from math import prod

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

from export.onnx_file.wiring import Wiring


def macs(file: Wiring) -> dict[str, int] | None:
    """Return the multiply-accumulates of each layer by node name, None where shape inference cannot tell all shapes."""
    shapes = _shapes(file.model)
    counts = {layer.name: _macs(layer, shapes) for layer in file.layers()}
    return None if None in counts.values() else {name: count or 0 for name, count in counts.items()}


def _macs(layer: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Return every output's multiply-accumulates: one for each weight that it sees."""
    known = [shapes.get(name, ()) for name in (layer.input[0], layer.input[1], layer.output[0])]
    if not all(known):
        return None
    given, weights, wanted = known
    if layer.op_type == "Conv":
        return prod(wanted) * prod(weights[1:])
    if layer.op_type == "ConvTranspose":
        return prod(given) * prod(weights[1:])
    # Gemm may read its first factor (rows, inner) transposed; the product's rows tell which of the two is inner.
    transposed = any(attribute.name == "transA" and attribute.i for attribute in layer.attribute)
    return prod(wanted) * given[0 if transposed else -1]


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that is known where the batch is one image."""
    single = ModelProto.FromString(model.SerializeToString())
    for value in single.graph.input:
        batch = value.type.tensor_type.shape.dim[0]
        if not batch.HasField("dim_value"):
            batch.dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")  # says "batch" still
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return shapes | {value.name: _dims(value) for value in values if _dims(value)}


def _dims(value: ValueInfoProto) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value for dim in dims) if all(dim.HasField("dim_value") for dim in dims) else ()
