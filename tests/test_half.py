"""Half precision where values leave its range: which nodes those are, and the file that keeps them in float32."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import Residual, lively

from export.onnx_file.graph import save_model, to_float16
from export.onnx_file.model_file import precision
from export.onnx_file.to_onnx import to_onnx
from export.proof.half import is_finite, overflowing
from export.runtime.session import open_session

IMAGES = np.random.default_rng(0).standard_normal((20, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("plain"), inside=1, head=1)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("scaled"), inside=3e5, head=1e6)


def exported(folder: Path, *, inside: float, head: float) -> Path:
    """Write a network whose values between two layers, and whose answers, are so many times as large."""
    torch.manual_seed(0)
    model = Residual(5, width=8)
    lively(model)
    with torch.no_grad():
        for part, factor in (
            (model.block1.bn1.weight, inside),
            (model.block1.bn1.bias, inside),
            (model.block1.conv2.weight, 1 / inside),
            (model.head.weight, head),
        ):
            part.mul_(factor)
    to_onnx(model, folder / "float.onnx", shape=(3, 16, 16), metadata={"task": "classification"})
    return folder / "float.onnx"


def answers(path: Path) -> np.ndarray:
    (logits,) = open_session(path, threads=1).run(None, {"input": IMAGES})
    return np.asarray(logits)


def test_what_reads_or_makes_large_values_overflows(plain: Path, scaled: Path) -> None:
    assert overflowing(onnx.load(plain), [IMAGES]) == []
    found = overflowing(onnx.load(scaled), [IMAGES[:3], IMAGES[3:]])
    assert found == ["block1.conv1/Conv", "block1.relu/Relu", "block1.conv2/Conv", "head/Gemm"]


def test_a_constant_beyond_half_precision_overflows_though_its_input_is_zero(plain: Path) -> None:
    model = onnx.load(plain)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] = 1e5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    assert overflowing(model, [0 * IMAGES]) == ["head/Gemm"]


def test_the_mixed_file_answers_as_the_float_file(scaled: Path, tmp_path: Path) -> None:
    """Also at its end, where the converter would take the answers through float16."""
    model, expected = onnx.load(scaled), answers(scaled)
    assert np.abs(expected).max() > 65504
    for name, keep in (("half", []), ("mixed", overflowing(model, [IMAGES]))):
        save_model(to_float16(model, keep), tmp_path / f"{name}.onnx")
    error = {name: np.abs(answers(tmp_path / f"{name}.onnx") - expected).max() for name in ("half", "mixed")}
    assert error["half"] > expected.std()
    assert error["mixed"] < 0.01 * expected.std()
    mixed = onnx.load(tmp_path / "mixed.onnx")
    assert precision(mixed) == "fp16"
    assert [entry.value for entry in mixed.metadata_props] == ["classification"]


def test_no_node_goes_through_half_precision_between_two_in_float32(scaled: Path) -> None:
    mixed = to_float16(onnx.load(scaled), overflowing(onnx.load(scaled), [IMAGES]))
    halves = {node.output[0] for node in mixed.graph.node if node.op_type == "Cast" and node.attribute[0].i == 10}
    wide = [node for node in mixed.graph.node if node.op_type == "Cast" and node.attribute[0].i == 1]
    assert wide
    assert halves.isdisjoint(name for node in wide for name in node.input)


def test_answers_that_are_no_numbers_are_noticed(plain: Path, tmp_path: Path) -> None:
    model = onnx.load(plain)
    assert is_finite(plain, [IMAGES])
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(5, np.inf, np.float32), bias.name))
    save_model(model, tmp_path / "broken.onnx")
    assert not is_finite(tmp_path / "broken.onnx", [IMAGES])
