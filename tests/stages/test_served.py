"""The chain to the bundle where something goes wrong: the best file is served, and what falls short is said, not lost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from reports import shown
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.pipeline import run_recipe
from compress.quant.calibrate import Histogram
from compress.quant.calibrate import set_ranges_ as own_ranges_
from compress.quant.rows import Method
from compress.recipe.read import read_recipe
from export.onnx_file.model_file import precision

RECIPE = """
name: served
target: cpu_avx2
data: {dataset: digits, image_size: 16}
model: {arch: "NETWORKS:small", weights: WEIGHTS}
stages:
  - {stage: source}
  - {stage: ptq, calibration_images: 64, methods: [minmax], max_drop: 0.02}
  - {stage: export, verify_images: 32}
  - {stage: bench, batches: [1], threads: [1], providers: [cpu], seconds: 0.1, blocks: 6}
""".replace("NETWORKS", str(Path(__file__).parents[1] / "networks.py"))


class Outcome:
    """What a run of the recipe left: its exit code, report and bundle."""

    def __init__(self, weights: Mapping[str, Tensor], folder: Path, *changes: str) -> None:
        save_file(dict(weights), folder / "weights.safetensors")
        (folder / "served.yaml").write_text(RECIPE.replace("WEIGHTS", str(folder / "weights.safetensors")))
        recipe = read_recipe(folder / "served.yaml", [f"out={folder}", *changes])
        self.code = run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run")
        self.root = folder / "served"
        self.report: Any = json.loads((self.root / "report.json").read_text())
        self.page = (self.root / "report" / "index.html").read_text()


def with_a_fifth_that_does_not_quantize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a layer with 23 % of the multiply-accumulates a huge weight on an input that is always zero: all others round to nothing."""
    planted = {name: values.clone() for name, values in weights.items()}
    planted["stem.1.weight"][0] = planted["stem.1.bias"][0] = 0
    planted["block1.conv1.weight"][:, 0] = 1000
    return planted


def beyond_half_precision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let the values between two layers be 100,000 times as large; what comes out is the same."""
    planted = {name: values.clone() for name, values in weights.items()}
    for name in ("block2.bn1.weight", "block2.bn1.bias"):
        planted[name] *= 1e5
    planted["block2.conv2.weight"] /= 1e5
    return planted


@pytest.fixture(scope="module")
def fallen_short(learned: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    planted = beyond_half_precision(with_a_fifth_that_does_not_quantize(learned))
    return Outcome(planted, tmp_path_factory.mktemp("planted"))


def test_a_file_with_over_a_fifth_of_its_work_in_float_fails_and_is_not_called_int8(fallen_short: Outcome) -> None:
    (failure,) = fallen_short.report["failures"]
    assert fallen_short.code == 1
    assert failure.startswith(
        "student_ptq_int8: max_float_fraction: at most 20.00% of the multiply-accumulates may run"
    )
    assert "got 23." in failure
    assert "1 of 7 layers: block1.conv1 (" in failure
    text = shown(fallen_short.report)
    assert text.index("Not INT8") < text.index("Top-1")
    assert "1 of 7 layers in float" in text
    assert "1 of 7 layers in float" in fallen_short.page


def test_what_overflows_half_precision_stays_in_float32_and_all_else_is_measured(fallen_short: Outcome) -> None:
    (path,) = fallen_short.root.glob("02-export-*/student_fp16.onnx")
    (note,) = [warning for warning in fallen_short.report["warnings"] if "student_fp16" in warning]
    assert (
        note
        == "student_fp16: in float32, as their values exceed half precision: block2.conv1, block2.relu, block2.conv2"
    )
    assert precision(onnx.load(path)) == "fp16"
    agreement = {row["name"]: row["agreement"] for row in fallen_short.report["deployed"]}
    assert agreement["student_fp16"] > 0.99
    assert agreement["student_fp32"] == 1
    assert (fallen_short.root / "bundle" / "student_fp16.onnx").exists()


@pytest.fixture(scope="module")
def rivalled(learned: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Our own ranges are a tenth of what they should be, so ONNX Runtime's file wins; and FP16 gives no numbers."""

    def tight_(prepared: nn.Module, histograms: Mapping[str, Histogram], method: Method) -> None:
        for histogram in histograms.values():
            histogram.low, histogram.high = histogram.low / 10, histogram.high / 10
        own_ranges_(prepared, histograms, method)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("compress.stages.ptq.set_ranges_", tight_)
        patched.setattr("compress.stages.export.is_finite", lambda *_: False)
        return Outcome(learned, tmp_path_factory.mktemp("rivalled"))


def test_another_quantizer_s_file_is_chosen_and_goes_to_the_bundle(rivalled: Outcome) -> None:
    found = rivalled.report["ptq"]["targets"]["cpu_avx2"]
    assert [(trial["engine"], trial["met"]) for trial in found["trials"]] == [
        ("compress", False),
        ("onnxruntime", True),
    ]
    assert found["chosen"] == 1
    assert found["score"] == found["methods"][1]["score"] > found["methods"][0]["score"]
    assert (rivalled.code, rivalled.report["failures"]) == (0, [])
    layers = rivalled.report["audit"]["student_ptq_int8"]
    assert (len(layers["integer_layers"]), layers["float_layers"]) == (7, [])


def test_it_is_held_against_itself_for_it_has_no_fake_quantized_twin(rivalled: Outcome) -> None:
    verified = rivalled.report["verify"]["student_ptq_int8"]
    assert verified["images"] == 32
    assert verified["agreement"] > 0.95
    assert len(verified["tensors"]) > 7
    assert "the same file without the optimizer" in rivalled.page


def test_a_file_whose_answers_are_not_finite_is_left_out_with_the_reason(rivalled: Outcome) -> None:
    assert any(warning.startswith("student_fp16 is left out: ") for warning in rivalled.report["warnings"])
    assert {row["name"] for row in rivalled.report["deployed"]} == {"teacher_fp32", "student_fp32", "student_ptq_int8"}
    assert not list((rivalled.root / "bundle").rglob("student_fp16*"))
