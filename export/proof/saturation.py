"""Find layers whose 16-bit sums can saturate on a CPU without VNNI: vpmaddubsw adds two U8 x S8 products in 16 bits.

ONNX Runtime's integer kernels multiply pairs of neighbours along the inner dimension: in a convolution, input channels of one kernel
position, then positions row by row (it runs channels last); in a matrix product, rows of the weights. Depthwise convolutions widen to
16 bits first and are exact.
"""

from functools import cache

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.onnx_file.names import module_of
from export.onnx_file.operators import INTEGER
from export.onnx_file.targets import CPU
from export.onnx_file.wiring import Wiring, origin
from export.proof.optimized import optimize
from export.runtime.session import open_session

INT16 = np.iinfo(np.int16)
HIGHEST = 255  # largest activation level; int8 activations are shifted to uint8 before the product


def saturation_possible(file: Wiring) -> dict[str, int]:
    """Return the `weight_sum` of every layer, by node name, whose pair sums can exceed 16 bits.

    Uses the weights of the optimized graph, because ONNX Runtime quantizes some float weights itself, on the full range.
    """
    runs = optimize(file.to_bytes(), CPU)
    found: dict[str, int] = {}
    for node in runs.nodes.values():
        layer = origin(node, file) if node.op_type in INTEGER else None
        order = inner_order(node) if layer is not None else None
        if layer is not None and order is not None and can_saturate(order):
            found[str(layer.name)] = weight_sum(order)
    return found


@cache
def saturates_here() -> bool:
    """Tell whether this machine's kernels saturate, by a product whose pairs' sums exceed 16 bits."""
    levels, weights = np.full((8, 64), HIGHEST, np.uint8), np.full((64, 16), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["levels", "weights"], ["sums"])],
        "product",
        [helper.make_tensor_value_info("levels", TensorProto.UINT8, levels.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, (8, 16))],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (sums,) = open_session(model.SerializeToString(), threads=1).run(None, {"levels": levels})
    return bool((sums != HIGHEST * 127 * 64).any())


def inner_order(node: ir.Node) -> NDArray[np.int8] | None:
    """Return an integer layer's weights as (out, inner), in the kernel's order; None if they are not int8 or not paired."""
    value = node.inputs[3 if node.op_type in ("QLinearConv", "QGemm", "QLinearMatMul") else 1]
    if value is None or value.const_value is None or value.dtype != ir.DataType.INT8:
        return None
    weights = value.const_value.numpy()
    if "Conv" in node.op_type:
        if node.attributes.get_int("group", 1) == len(weights) and weights.shape[1] == 1:
            return None  # depthwise
        return np.moveaxis(weights, 1, -1).reshape(len(weights), -1)
    transposed = node.attributes.get_int("transB", 0)
    return weights if transposed else np.moveaxis(weights, -2, -1).reshape(-1, weights.shape[-2])


def weight_sum(weights: NDArray[np.int8]) -> int:
    """Return the largest |w_i| + |w_j| over pairs of neighbours (last dimension) that have the same sign."""
    pairs = _pairs(weights)
    positive, negative = np.maximum(pairs, 0).sum(axis=-1), np.minimum(pairs, 0).sum(axis=-1)
    return int(max(positive.max(), -negative.min()))


def can_saturate(weights: NDArray[np.int8]) -> bool:
    """Tell whether the highest activations can push any pair's sum out of 16 bits."""
    pairs = _pairs(weights)
    highest, lowest = np.maximum(pairs, 0).sum(axis=-1).max(), np.minimum(pairs, 0).sum(axis=-1).min()
    return bool(HIGHEST * highest > INT16.max or HIGHEST * lowest < INT16.min)


def modules(layers: dict[str, int]) -> tuple[str, ...]:
    """Return the layers' module paths."""
    return tuple(module_of(name) for name in layers)


def _pairs(values: NDArray[np.generic]) -> NDArray[np.int32]:
    """Return (…, inner) as (…, pairs, 2), padded with a zero if inner is odd."""
    padded = np.pad(values.astype(np.int32), [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    return padded.reshape(*padded.shape[:-1], -1, 2)
