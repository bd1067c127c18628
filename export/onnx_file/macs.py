"""Count the MACs of an ONNX file's convolutions and matrix products for one image, from its shapes."""

from math import prod

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.onnx_file.operators import LAYERS
from export.onnx_file.wiring import Wiring


def macs(file: Wiring) -> dict[str, int] | None:
    """Return the MACs of each layer by node name, or None if shape inference cannot find all shapes."""
    single = file.model.clone()
    for given in single.graph.inputs:
        if given.shape and not isinstance(given.shape[0], int):
            given.shape = ir.Shape([1, *given.shape[1:]])
    for wanted in single.graph.outputs:
        wanted.shape = None  # still has a dynamic batch
    ShapeInferencePass(check_type=False, strict_mode=False)(single)
    counts = {str(node.name): _macs(node) for node in single.graph if node.op_type in LAYERS}
    return None if None in counts.values() else {name: count or 0 for name, count in counts.items()}


def _macs(layer: ir.Node) -> int | None:
    """Return a layer's MACs: one for each output and weight that it is multiplied with."""
    given, weights, wanted = (_shape(value) for value in (layer.inputs[0], layer.inputs[1], layer.outputs[0]))
    if not given or not weights or not wanted:
        return None
    if layer.op_type == "Conv":
        return prod(wanted) * prod(weights[1:])
    if layer.op_type == "ConvTranspose":
        return prod(given) * prod(weights[1:])
    # Gemm's first factor is (rows, inner), or (inner, rows) with transA.
    return prod(wanted) * given[0 if layer.attributes.get_int("transA", 0) else -1]


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    """Return a tensor's shape, empty if a size is unknown."""
    return value.shape.numpy() if value and value.shape and value.shape.is_static() else ()
