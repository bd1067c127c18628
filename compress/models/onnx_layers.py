"""ONNX operators that onnx2torch lacks: as layers of torch.nn, or spelled out in operators that it has; `rebuilt` compares the outputs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, nn

WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
# ONNX's coordinates that torch knows, by the mode in ONNX: torch's mode and align_corners.
INTERPOLATIONS: dict[tuple[str, str], tuple[str, bool | None]] = {
    ("nearest", "asymmetric"): ("nearest", None),
    ("nearest", "half_pixel"): ("nearest-exact", None),
    ("nearest", "pytorch_half_pixel"): ("nearest-exact", None),
    ("linear", "half_pixel"): ("bilinear", False),
    ("linear", "pytorch_half_pixel"): ("bilinear", False),
    ("linear", "align_corners"): ("bilinear", True),
    ("cubic", "half_pixel"): ("bicubic", False),
    ("cubic", "pytorch_half_pixel"): ("bicubic", False),
    ("cubic", "align_corners"): ("bicubic", True),
}
Constants = Callable[[int], Tensor | None]  # a node's constant input by its position; None if it has no such input
Attributes = Mapping[str, Any]


def _resize(given: Attributes, constant: Constants) -> nn.Module:
    key = str(given.get("mode", "nearest")), str(given.get("coordinate_transformation_mode", "half_pixel"))
    scales, sizes = constant(2), constant(3)
    if key not in INTERPOLATIONS or given.get("exclude_outside") or given.get("antialias") or "axes" in given:
        raise NotImplementedError(f"Resize with mode {key[0]} and coordinates {key[1]} is not in torch")
    mode, align_corners = INTERPOLATIONS[key]
    if sizes is not None and len(sizes) == 4:
        return nn.Upsample(size=tuple(sizes[2:].tolist()), mode=mode, align_corners=align_corners)
    if scales is None or len(scales) != 4 or scales[:2].tolist() != [1, 1]:
        raise NotImplementedError("Resize of other dimensions than height and width is not in torch")
    return nn.Upsample(scale_factor=tuple(scales[2:].tolist()), mode=mode, align_corners=align_corners)


def _upsample(given: Attributes, constant: Constants) -> nn.Module:
    asymmetric = {"mode": given.get("mode", "nearest"), "coordinate_transformation_mode": "asymmetric"}
    return _resize(asymmetric, lambda place: constant(1) if place == 2 else None)


def _prelu(_: Attributes, constant: Constants) -> nn.Module:
    slope = constant(1)
    if slope is None or slope.dim() > 3 or slope.numel() != (slope.shape[0] if slope.dim() in (1, 3) else -1):
        raise NotImplementedError("PRelu with a slope that is not one for each channel is not in torch")
    if slope.dim() == 1 and len(slope) > 1:
        raise NotImplementedError("PRelu with a slope for each column is not in torch")
    layer = nn.PReLU(slope.numel())
    layer.weight.data = slope.flatten().clone()
    return layer


def _shrink(given: Attributes, _: Constants) -> nn.Module:
    bias, least = float(given.get("bias", 0.0)), float(given.get("lambd", 0.5))
    if bias not in (0.0, least):
        raise NotImplementedError(f"Shrink with lambd {least} and bias {bias} is not in torch")
    return nn.Softshrink(least) if bias else nn.Hardshrink(least)


def _depth_to_space(given: Attributes, _: Constants) -> nn.Module:
    block = int(given["blocksize"])
    shuffle = nn.PixelShuffle(block)
    return shuffle if given.get("mode", "DCR") == "CRD" else nn.Sequential(nn.ChannelShuffle(block**2), shuffle)


LAYERS: dict[str, tuple[tuple[int, ...], Callable[[Attributes, Constants], nn.Module]]] = {
    "Resize": ((11, 13), _resize),
    "Upsample": ((9,), _upsample),
    "PRelu": ((7, 9, 16), _prelu),
    "Shrink": ((9,), _shrink),
    "DepthToSpace": ((1, 11, 13), _depth_to_space),
    "Gelu": ((17,), lambda given, _: nn.GELU(given.get("approximate", "none"))),
    "ThresholdedRelu": ((10,), lambda given, _: nn.Threshold(float(given.get("alpha", 1.0)), 0.0)),
    "GlobalMaxPool": ((1,), lambda *_: nn.AdaptiveMaxPool2d(1)),
}  # by operator: the opsets that changed it, up to 17, and what makes the layer


def teach_converter() -> None:
    """Give onnx2torch the layers of this file, in the place of its own."""
    from onnx2torch.node_converters import registry
    from onnx2torch.onnx_graph import OnnxGraph
    from onnx2torch.onnx_node import OnnxNode
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    def converter(make: Callable[[Attributes, Constants], nn.Module]) -> Callable[..., Any]:
        def convert(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
            def constant(place: int) -> Tensor | None:
                name = node.input_values[place] if place < len(node.input_values) else ""
                found = graph.initializers[name].to_torch() if name in graph.initializers else None
                return None if found is None or not found.numel() else found

            layer = make(node.attributes, constant)
            return OperationConverterResult(layer, OnnxMapping(node.input_values[:1], node.output_values))

        return convert

    for name, (versions, make) in LAYERS.items():
        for version in versions:
            registry._CONVERTER_REGISTRY[registry.OperationDescription("", name, version)] = converter(make)


def spell_out_(proto: ModelProto) -> None:
    """Write automatic padding in numbers, and uneven padding, scaled activations and quotients in further operators, for the images' static size."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.value_info)
    } | {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    floats = {value.name for value in (*proto.graph.value_info, *proto.graph.output) if _is_float(value)}
    nodes = []
    for node in proto.graph.node:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type in WINDOWS and len(shapes.get(node.input[0], ())) == 4:
            nodes += _with_even_pads(proto, node, given, shapes)
        elif node.op_type == "Selu" and {"alpha", "gamma"} & given.keys():
            alpha, gamma = given.get("alpha", 1.6732632), given.get("gamma", 1.0507010)
            factor = _constant(proto, node, np.float32(gamma))
            inner = helper.make_node("Elu", node.input[:1], [f"{node.output[0]}_elu"], alpha=alpha)
            nodes += [inner, helper.make_node("Mul", [inner.output[0], factor], node.output)]
        elif (
            node.op_type == "Div" and node.output[0] in floats
        ):  # onnx2torch's asks for the type, which cannot be traced
            inverse = f"{node.output[0]}_reciprocal"  # the name, too: onnx2torch mixes up nodes without one
            nodes += [helper.make_node("Reciprocal", node.input[1:], [inverse], inverse)]
            nodes += [helper.make_node("Mul", [node.input[0], inverse], node.output, f"{node.output[0]}_product")]
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _is_float(value: ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT


def _with_even_pads(
    proto: ModelProto, node: NodeProto, given: dict[str, Any], shapes: Mapping[str, list[int]]
) -> list[NodeProto]:
    """Return a window's operator with pads in numbers, and what makes up for uneven ones."""
    sides, transposed = shapes[node.input[0]][2:], node.op_type == "ConvTranspose"
    kernel = given.get("kernel_shape") or shapes[node.input[1]][2:]
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    extent = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    auto = given.get("auto_pad", b"NOTSET").decode()
    pads = list(given.get("pads", [0] * 4)) if auto == "NOTSET" else [0] * 4
    if auto.startswith("SAME"):
        for axis, (side, stride, size) in enumerate(zip(sides, strides, extent, strict=True)):
            if transposed:
                total = stride * (side - 1) + size - side * stride
            else:
                total = (math.ceil(side / stride) - 1) * stride + size - side
            small = max(0, total) // 2
            pads[axis], pads[axis + 2] = (
                (small, max(0, total) - small) if auto == "SAME_UPPER" else (max(0, total) - small, small)
            )
    uneven = pads[:2] != pads[2:]
    if transposed and uneven:
        inner = _rewritten(node, {"auto_pad": None, "pads": [0] * 4}, outputs=[f"{node.output[0]}_whole"])
        cut = np.array([0, 0, *pads[:2], 0, 0, *pads[2:]])
        return [inner, helper.make_node("Pad", [inner.output[0], _constant(proto, node, -cut)], node.output)]
    if node.op_type == "AveragePool" and uneven and not given.get("ceil_mode"):
        pad = helper.make_node(
            "Pad", [node.input[0], _constant(proto, node, np.array([0, 0, *pads[:2], 0, 0, *pads[2:]]), "pads")],
            [f"{node.output[0]}_padded"],
        )  # fmt: skip
        whole = bool(given.get("count_include_pad"))
        inner = _rewritten(node, {"auto_pad": None, "pads": None, "count_include_pad": None}, inputs=pad.output)
        if whole:
            return [pad, inner]
        rows, columns = (
            _share(side, (pads[axis], pads[axis + 2]), strides[axis], kernel[axis], dilations[axis])
            for axis, side in enumerate(sides)
        )
        factor = _constant(proto, node, (1 / np.outer(rows, columns)).astype(np.float32)[None, None], "factor")
        inner.output[0] = f"{node.output[0]}_sums"
        return [pad, inner, helper.make_node("Mul", [inner.output[0], factor], node.output)]
    return [_rewritten(node, {"auto_pad": None, "pads": pads} if auto != "NOTSET" else {})]


def _share(side: int, pads: tuple[int, int], stride: int, size: int, dilation: int) -> NDArray[np.float64]:
    """Return the fraction of each window along one axis that lies inside of the image."""
    inside = np.pad(np.ones(side), pads)
    extent = dilation * (size - 1) + 1
    windows = np.lib.stride_tricks.sliding_window_view(inside, extent)[::stride, ::dilation]
    return np.asarray(windows.mean(1))


def _rewritten(node: NodeProto, changes: Attributes, *, inputs: Any = None, outputs: Any = None) -> NodeProto:
    """Return a copy of a node with some attributes changed, or removed where None; of its inputs the first ones."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute} | dict(changes)
    kept = {name: value for name, value in given.items() if value is not None}
    return helper.make_node(node.op_type, inputs or node.input, outputs or node.output, name=node.name, **kept)


def _constant(proto: ModelProto, node: NodeProto, value: Any, name: str = "constant") -> str:
    """Add a constant to the graph and return its name."""
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{node.output[0]}_{name}"))
    return f"{node.output[0]}_{name}"
