"""Give a model a uint8 input: decoded pixels, normalized inside the graph."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.errors import BundleError
from export.images.preprocess import BGR, COLOURS
from export.images.size import Shape, size_of
from export.names import PREPROCESS_KEY

PIXELS = "pixels"


def with_uint8_input(model: ModelProto, preprocess: Mapping[str, Any]) -> ModelProto:
    """Return the model with the input `pixels`, 0..255, uint8 (batch, height, width, channels), and the same logits.

    `preprocess` is preprocess.json's content. Its normalization moves into the graph as the same float32 operations as in
    `export.images.preprocess.Preprocess.normalize`, so the bits are the same; the file's `preprocess` metadata are updated.
    Raises BundleError for a model whose input is not float32 (batch, channels, height, width) of the size that images are cropped to.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    channels, height, width = _shape(model, preprocess)
    given = model.graph.input[0]
    # Normalize rows as vectors of channels x width and transpose last: ONNX Runtime cancels this transpose against its own to channels-last
    # (ResNet-18 at 224, one thread: 0.08 ms of 10.6). If transposed first, its optimizer moves the transpose after the arithmetic,
    # which then runs on vectors of 3: 1.3 ms. A QuantizeLinear before the transpose gains nothing in ONNX Runtime, and makes OpenVINO
    # run the first convolution in float.
    order = -1 if preprocess.get("color") == BGR else 1  # pixels are decoded ones, red first
    constants = {
        "rows": np.array([0, height, channels * width]),
        "images": np.array([0, height, width, channels]),
        "255": np.float32(255),
        "mean": np.tile(np.array(preprocess["mean"], np.float32)[::order], width),
        "std": np.tile(np.array(preprocess["std"], np.float32)[::order], width),
    }
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Reshape", ["rows"], {}),  # (batch, height, width x channels)
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Div", ["255"], {}),
        ("Sub", ["mean"], {}),
        ("Div", ["std"], {}),
        ("Reshape", ["images"], {}),  # (batch, height, width, channels)
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
    ]
    if order < 0:
        steps.append(("Gather", ["reversed"], {"axis": 1}))
        constants["reversed"] = np.arange(channels)[::-1]
    nodes, last = [], PIXELS
    for number, (operator, operands, attributes) in enumerate(steps):
        name = f"{PIXELS}/{number}_{operator}"
        inputs = [last, *(f"{PIXELS}/{operand}" for operand in operands)]
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        last = name
    nodes[-1].output[0] = given.name
    nodes.extend(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{PIXELS}/{name}"))
    batch = given.type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value, height, width, channels]
    given.CopyFrom(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, metadata | {PREPROCESS_KEY: json.dumps(_without_normalization(preprocess))})
    onnx.checker.check_model(model, full_check=True)
    return model


def _shape(model: ModelProto, preprocess: Mapping[str, Any]) -> Shape:
    """Return the shape of the model's input, after checking that it is that of the cropped images."""
    shape = (len(preprocess["mean"]), *size_of(preprocess["image_size"]))
    values = [value.type.tensor_type for value in model.graph.input]
    kinds = [(value.elem_type, [dim.dim_value for dim in value.shape.dim[1:]]) for value in values]
    if kinds != [(TensorProto.FLOAT, [*shape])]:
        found = " and ".join(f"{TensorProto.DataType.Name(kind)} (batch, {str(dims)[1:-1]})" for kind, dims in kinds)
        wanted = ", ".join(map(str, shape))
        raise BundleError(f"input: must be FLOAT (batch, {wanted}), got {found}: export it at that size")
    return shape


def _without_normalization(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing left for a file that normalizes by itself: resize and crop."""
    inside = {"scale": 1 / 255, "mean": preprocess["mean"], "std": preprocess["std"]}
    nothing = {"scale": 1.0, "mean": [0.0] * len(inside["mean"]), "std": [1.0] * len(inside["mean"])}
    if preprocess.get("color") == BGR:
        inside, nothing = inside | {"color": BGR}, nothing | {"color": COLOURS[3]}
    return {**preprocess, **nothing, "input": PIXELS, "layout": "NHWC", "dtype": "uint8", "normalized_inside": inside}
