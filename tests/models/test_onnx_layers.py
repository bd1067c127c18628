"""ONNX operators that onnx2torch lacks or mistakes, each in a small file: rebuilt as torch networks, equal to ONNX Runtime."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.errors import ModelError
from compress.models.foreign import OnnxFile, rebuilt

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((8, 3, 3, 3)).astype(np.float32)
POOL = {"kernel_shape": [3, 3]}
DOUBLE = np.array([1, 1, 2, 2], np.float32)
SIZES = np.array([1, 8, 32, 32])
Row = tuple[str, Sequence[Any], dict[str, Any], int]  # operator, constant inputs (None has none), attributes, opset


def resize(mode: str, where: str, *, sizes: bool = False, **more: object) -> Row:
    constants = (None, None, SIZES) if sizes else (None, DOUBLE)
    return ("Resize", constants, {"mode": mode, "coordinate_transformation_mode": where, **more}, 18)


ROWS: dict[str, Row] = {
    **{
        f"{name} {auto} by {stride}": (name, (), {**POOL, "auto_pad": auto, "strides": [stride] * 2}, 18)
        for name in ("MaxPool", "AveragePool")
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for stride in (1, 2)
    },
    "average, uneven": ("AveragePool", (), {**POOL, "pads": [0, 0, 1, 1], "strides": [2, 2]}, 18),
    "average, uneven, with pads": ("AveragePool", (), {**POOL, "pads": [0, 1, 1, 0], "count_include_pad": 1}, 18),
    "average, rounded up": ("AveragePool", (), {**POOL, "strides": [2, 2], "ceil_mode": 1}, 18),
    "maximum, uneven": ("MaxPool", (), {**POOL, "pads": [0, 0, 1, 1], "strides": [2, 2]}, 18),
    "maximum, rounded up": ("MaxPool", (), {**POOL, "strides": [2, 2], "ceil_mode": 1}, 18),
    "hard sigmoid": ("HardSigmoid", (), {"alpha": 0.3, "beta": 0.4}, 18),
    "elu": ("Elu", (), {"alpha": 0.7}, 18),
    "selu": ("Selu", (), {"alpha": 1.5, "gamma": 1.2}, 18),
    "celu": ("Celu", (), {"alpha": 0.8}, 18),
    "thresholded relu": ("ThresholdedRelu", (), {"alpha": 0.3}, 18),
    "soft shrink": ("Shrink", (), {"lambd": 0.25, "bias": 0.25}, 18),
    "hard shrink": ("Shrink", (), {"lambd": 0.25}, 18),
    "mish": ("Mish", (), {}, 18),
    "softsign": ("Softsign", (), {}, 18),
    "gelu": ("Gelu", (), {}, 20),
    "gelu by tanh": ("Gelu", (), {"approximate": "tanh"}, 20),
    "prelu": ("PRelu", (RNG.uniform(0.1, 0.5, (8, 1, 1)).astype(np.float32),), {}, 18),
    "prelu of one": ("PRelu", (np.array([0.25], np.float32),), {}, 18),
    "depth to space": ("DepthToSpace", (), {"blocksize": 2}, 18),
    "global maximum": ("GlobalMaxPool", (), {}, 18),
    "upsample": ("Upsample", (DOUBLE,), {"mode": "nearest"}, 9),
    "nearest": resize("nearest", "asymmetric", nearest_mode="floor"),
    "nearest to a size": resize("nearest", "asymmetric", sizes=True, nearest_mode="floor"),
    "nearest, half": resize("nearest", "half_pixel", nearest_mode="round_prefer_floor"),
    "linear": resize("linear", "half_pixel"),
    "linear to a size": resize("linear", "half_pixel", sizes=True),
    "linear, torch's": resize("linear", "pytorch_half_pixel"),
    "linear, corners": resize("linear", "align_corners"),
    "cubic": resize("cubic", "half_pixel"),
    "cubic, corners": resize("cubic", "align_corners"),
}
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name} {auto} by {stride}": (name, {"auto_pad": auto, "strides": [stride] * 2})
        for name in ("Conv", "ConvTranspose")
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for stride in (1, 2)
    },
    "uneven": ("Conv", {"pads": [1, 2, 0, 1]}),
    "uneven, transposed": ("ConvTranspose", {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
}


def write(path: Path, first: tuple[str, dict[str, Any]], row: Row | None) -> Path:
    """Write a network of a convolution, an operator, and a global average."""
    operator, attributes = first
    kernel = KERNEL.swapaxes(0, 1) if operator == "ConvTranspose" else KERNEL
    nodes, constants, last = [helper.make_node(operator, ["x", "w"], ["first"], **attributes)], {"w": kernel}, "first"
    if row is not None:
        names = ["" if value is None else f"c{place}" for place, value in enumerate(row[1])]
        constants |= {name: value for name, value in zip(names, row[1], strict=True) if name}
        nodes.append(helper.make_node(row[0], ["first", *names], ["second"], **row[2]))
        last = "second"
    nodes += [helper.make_node("GlobalAveragePool", [last], ["mean"]), helper.make_node("Flatten", ["mean"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = 18 if row is None else row[3]
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def assert_equal(file: Path) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(rebuilt(str(file))(images), OnnxFile(file)(images), atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_an_operator_becomes_a_layer_that_computes_the_same(name: str, tmp_path: Path) -> None:
    assert_equal(write(tmp_path / "a.onnx", ("Conv", {"pads": [1, 1, 1, 1]}), ROWS[name]))


@pytest.mark.parametrize("name", WINDOWS)
def test_a_convolution_with_any_padding_is_rebuilt(name: str, tmp_path: Path) -> None:
    assert_equal(write(tmp_path / "a.onnx", WINDOWS[name], None))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (("GridSample", (RNG.uniform(-1, 1, (1, 4, 4, 2)).astype(np.float32),), {}, 18), "GridSample"),
        (("Hardmax", (), {"axis": 1}, 18), "Hardmax"),
        (("Shrink", (), {"lambd": 0.5, "bias": 0.25}, 18), "Shrink with lambd 0.5 and bias 0.25 is not in torch"),
        (resize("linear", "asymmetric"), "Resize with mode linear and coordinates asymmetric is not in torch"),
    ],
)
def test_what_torch_cannot_express_is_refused_by_name(row: Row, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot rebuild it .*{re.escape(why)}.*so it cannot be cut or trained"):
        rebuilt(str(write(tmp_path / "a.onnx", ("Conv", {"pads": [1, 1, 1, 1]}), row)))
