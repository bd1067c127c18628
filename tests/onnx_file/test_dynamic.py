"""Dynamic INT8: linear layers in integers with ranges taken at run time."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Residual
from torch import nn

from export.onnx_file.ptq import linear_fraction, quantize_dynamically
from export.onnx_file.to_onnx import to_onnx


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("linear") / "float.onnx"
    layers = (
        nn.Conv2d(3, 16, 4, 4),
        nn.Flatten(2),
        nn.Linear(16, 64),
        nn.GELU(),
        nn.Linear(64, 32),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    to_onnx(nn.Sequential(*layers).eval(), path, shape=(3, 16, 16), metadata={"made": "by a test"})
    return path


def test_linear_layers_run_in_integers_near_to_float_for_any_batch(
    linear: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "dynamic.onnx"
    with caplog.at_level(logging.WARNING):
        quantize_dynamically(linear, path)
    assert not caplog.records
    model = onnx.load(path)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MatMulInteger") == 3
    assert operators.count("Conv") == 1
    assert {entry.key: entry.value for entry in model.metadata_props} == {"made": "by a test"}
    images = np.random.default_rng(0).standard_normal((5, 3, 16, 16), np.float32)
    wanted, found = (onnxruntime.InferenceSession(file).run(None, {"input": images})[0] for file in (linear, path))
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.999
    assert np.abs(wanted - found).max() > 0


def test_the_fraction_of_linear_layers_counts_multiply_accumulates(linear: Path, tmp_path: Path) -> None:
    convolution, products = 16 * 3 * 16 * 16, 16 * 16 * 64 + 16 * 64 * 32 + 512 * 10
    # The product with 16 channels of 4 x 4 pixels: Flatten(2) leaves (16 channels, 16 pixels).
    assert linear_fraction(linear) == pytest.approx(products / (convolution + products))
    to_onnx(Residual(5).eval(), tmp_path / "convolutions.onnx", shape=(3, 16, 16), metadata={})
    assert linear_fraction(tmp_path / "convolutions.onnx") < 0.01
