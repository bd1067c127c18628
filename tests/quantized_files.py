"""A small Q/DQ network made by hand, as the exporter writes one: two convolutions, a residual, a pool, a linear layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx_files import model_of

SIZE = 8
WIDTH = 16


def quantized_network(highest: int = 127, *, plain: tuple[str, ...] = (), seed: int = 0) -> ModelProto:
    """Return the network with weights up to `highest`; layers in `plain` keep float weights, quantizers in it are left out."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    nodes: list[NodeProto] = []

    def add(operator: str, name: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(
            helper.make_node(operator, inputs, [f"{name}/{operator}"], name=f"{name}/{operator}", **attributes)
        )
        return f"{name}/{operator}"

    def on_grid(name: str, values: str, scale: float, zero_point: int) -> str:
        if name in plain:
            return values
        tensors[f"{name}.scale"], tensors[f"{name}.zero"] = np.array(scale, np.float32), np.array(zero_point, np.uint8)
        levels = add("QuantizeLinear", name, [values, f"{name}.scale", f"{name}.zero"])
        return add("DequantizeLinear", name, [levels, f"{name}.scale", f"{name}.zero"])

    def layer(operator: str, name: str, values: str, shape: tuple[int, ...], scale: float, **attributes: Any) -> str:
        # Most weights of a channel have one sign: then pairs add up, as a sum over a trained edge filter does.
        sign = np.where(np.arange(shape[0]) % 2, 1, -1).reshape(-1, *[1] * (len(shape) - 1))
        levels = (sign * rng.integers(-highest // 4, highest, shape, endpoint=True)).astype(np.int8)
        levels.reshape(shape[0], -1)[:, 0] = sign.ravel() * highest
        bias = rng.integers(-500, 500, shape[0]).astype(np.int32)
        step = np.full(shape[0], 0.2 / highest / np.sqrt(np.prod(shape[1:])), np.float32)
        if name in plain:
            tensors[f"{name}.weight"] = levels * step.reshape(sign.shape)
            tensors[f"{name}.bias"] = (bias * step * scale).astype(np.float32)
            return add(operator, name, [values, f"{name}.weight", f"{name}.bias"], **attributes)
        parts: dict[str, tuple[np.ndarray, np.ndarray]] = {
            "weight": (levels, step),
            "bias": (bias, step * np.float32(scale)),
        }
        for part, (numbers, unit) in parts.items():
            tensors[f"{name}.{part}"], tensors[f"{name}.{part}_scale"] = numbers, unit
            tensors[f"{name}.{part}_zero"] = np.zeros(shape[0], numbers.dtype)
            inputs = [f"{name}.{part}", f"{name}.{part}_scale", f"{name}.{part}_zero"]
            nodes.append(
                helper.make_node("DequantizeLinear", inputs, [f"{name}/{part}"], name=f"{name}/DQ_{part}", axis=0)
            )
        return add(operator, name, [values, f"{name}/weight", f"{name}/bias"], **attributes)

    x = on_grid("quantizer_x", "input", 1 / 64, 0)
    y = layer("Conv", "conv1", x, (WIDTH, 3, 3, 3), 1 / 64, pads=[1, 1, 1, 1])
    y = on_grid("quantizer_conv1", add("Relu", "relu", [y]), 1 / 80, 0)
    z = layer("Conv", "conv2", y, (WIDTH, WIDTH, 3, 3), 1 / 80, pads=[1, 1, 1, 1])
    z = on_grid("quantizer_conv2", z, 1 / 40, 128)
    y = on_grid("quantizer_add", add("Add", "add", [y, z]), 1 / 40, 100)
    y = on_grid("quantizer_pool", add("GlobalAveragePool", "pool", [y]), 1 / 60, 100)
    y = add("Flatten", "flatten", [y], axis=1)
    y = on_grid("quantizer_flatten", y, 1 / 60, 100)
    layer("Gemm", "head", y, (3, WIDTH), 1 / 60, transB=1)
    nodes[-1].output[0] = "logits"
    return model_of(nodes, tensors, shape=(3, SIZE, SIZE), classes=3)


def changed(model: ModelProto, tensors: Mapping[str, np.ndarray]) -> ModelProto:
    """Return the model with other values in some of its constants."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return copy


def constant(model: ModelProto, name: str) -> np.ndarray:
    """Return the values of one of the model's constants."""
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def images(count: int, seed: int = 0) -> np.ndarray:
    """Return images (count, 3, SIZE, SIZE) that fill the input's grid."""
    shape = (count, 3, SIZE, SIZE)
    return np.random.default_rng(seed).uniform(0, 4, shape).astype(np.float32)


def vpmaddubsw_product(levels: NDArray[np.uint8], weights: NDArray[np.int8]) -> NDArray[np.int32]:
    """Return levels (rows, inner) times weights (out, inner) as AVX2 without VNNI computes it: (rows, out).

    Intel's manual: SaturateToSignedWord(a0 * b0 + a1 * b1) for each pair of neighbours; the words are then added in 32 bits.
    """
    odd = [(0, 0), (0, levels.shape[1] % 2)]  # an odd end meets zero
    left, right = np.pad(levels.astype(np.int32), odd), np.pad(weights.astype(np.int32), odd)
    total = np.zeros((len(left), len(right)), np.int32)
    for first in range(0, left.shape[1], 2):  # one pair at a time: all at once would need rows x pairs x out words
        pair = slice(first, first + 2)
        total += np.clip(left[:, pair] @ right[:, pair].T, -32768, 32767)
    return total
