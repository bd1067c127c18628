"""Golden outputs: a wrong kernel's error is found, rounding that differs between correct machines is not."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import digit_contents
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx_files import save
from quantized_files import constant

from export.bundle.golden import WIDEST, outputs_of, spread
from export.bundle.read import read_bundle
from export.bundle.write import write_bundle
from export.check import promises
from export.check.findings import check_bundle
from export.runtime.providers import Runtime

NAME = "student_int8"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", digit_contents(tmp_path))
    return tmp_path / "bundle"


def wrong(path: Path, out: Path) -> Path:
    """Write a file whose second convolution is off by up to 200 levels in one of 20 values, as a wrong kernel would be."""
    model = onnx.load(path)
    place = next(
        index for index, node in enumerate(model.graph.node) if node.output[0] == "quantizer_conv2/QuantizeLinear"
    )
    random, shape = np.random.default_rng(0), (1, 16, 8, 8)
    off = (random.random(shape) < 0.05) * random.uniform(-200, 200, shape) * constant(model, "quantizer_conv2.scale")
    model.graph.initializer.append(numpy_helper.from_array(off.astype(np.float32), "off"))
    (values, *_) = model.graph.node[place].input
    model.graph.node[place].input[0] = "wrong"
    model.graph.node.insert(place, helper.make_node("Add", [values, "off"], ["wrong"]))
    return save(model, out)


def test_a_convolution_off_by_hundreds_of_levels_is_found(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = wrong(bundle / f"{NAME}.onnx", bundle.parent / "wrong.onnx")
    golden = read_bundle(bundle).golden
    apart = np.abs(outputs_of(planted, golden.inputs) - golden.outputs[NAME]).max()
    assert apart < WIDEST["int8"] * golden.outputs[NAME].std() / 2, "less than half of what no network may exceed"
    assert check_bundle(bundle)[1] == []

    def run(path: Path, inputs: NDArray[np.float32], _: Runtime) -> NDArray[np.float32]:
        return outputs_of(planted if path.stem == NAME else path, inputs)

    monkeypatch.setattr(promises, "outputs_of", run)
    _, (finding,) = check_bundle(bundle)
    assert finding.defect == "golden_differs"
    assert f"by up to {apart:.3g}" in finding.sentence
    assert "python -m export.verify" in finding.sentence


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("threads", [1, 2])
def test_another_correct_session_is_within_tolerance(bundle: Path, level: str, threads: int) -> None:
    found = read_bundle(bundle)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for name, path in found.files.items():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {"input": found.golden.inputs})
        assert found.golden.differing(name, outputs) == []


def test_noise_of_half_a_level_is_within_tolerance(bundle: Path) -> None:
    found = read_bundle(bundle)
    noise = np.random.default_rng(7).uniform(-0.5, 0.5, found.golden.inputs.shape) / (255 * 0.25)
    outputs = outputs_of(found.files[NAME], (found.golden.inputs + noise).astype(np.float32))
    assert found.golden.differing(NAME, outputs) == []
    assert np.abs(outputs - found.golden.outputs[NAME]).max() > found.golden.tolerance[NAME][""] / 10, "but not idle"


def test_constants_do_not_widen_the_spread() -> None:
    varying = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    places = np.full((4, 3), 500, np.float32)
    assert spread(np.concatenate([varying, places], axis=1)) == pytest.approx(varying.std())
    assert spread(np.repeat(varying[:1], 4, axis=0)) == pytest.approx(varying[:1].std()), "nothing varies"
