"""INT8 without training: ONNX Runtime's quantizer on every target's grid, neural-compressor's, our own, and the stage that compares them."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from networks import Mobile, Residual, lively
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.pipeline import run_recipe
from compress.quant import neural_compressor_ptq
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import prepare
from compress.quant.rows import Method
from compress.recipe.read import read_recipe
from export.onnx_file.graph import weight_levels
from export.onnx_file.ptq import METHODS, quantize
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import open_session

SIZE = 16


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).numpy()


def export(network: nn.Module, folder: Path) -> Path:
    path = folder / "float.onnx"
    to_onnx(lively(network), path, shape=(3, SIZE, SIZE), metadata={"task": "classification"})
    return path


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(Mobile(5), tmp_path_factory.mktemp("mobile"))


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return export(Residual(5), tmp_path_factory.mktemp("residual"))


def run(path: Path, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    (logits,) = open_session(path, threads=1).run(None, {"input": batch})
    return np.asarray(logits)


def initializers(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def zero_points_of_activations(model: ModelProto) -> list[NDArray[np.generic]]:
    constants = initializers(model)
    return [constants[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"cuda"}))
@pytest.mark.parametrize("network", ["mobile", "residual"])
def test_every_weight_lies_on_the_targets_grid_and_uses_all_of_it(
    network: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, grid = tmp_path / "int8.onnx", TARGETS[target]
    quantize(request.getfixturevalue(network), path, [images(16)], target=grid, method="minmax")
    levels = weight_levels(onnx.load(path))
    assert len(levels) == {"mobile": 6, "residual": 7}[network]  # all convolutions, and the head
    for name, weight in levels.items():
        assert grid.weight_min <= weight.min(), name
        assert weight.max() <= grid.weight_max, name
        assert np.abs(weight).max() == grid.weight_scale_divisor, name
    assert np.abs(run(path, images(8, 1)) - run(request.getfixturevalue(network), images(8, 1))).max() < 0.2


def test_tensorrt_gets_symmetric_activations_and_float_biases(mobile: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    quantize(mobile, path, [images(16)], target=TARGETS["tensorrt"], method="minmax")
    model = onnx.load(path)
    for zero_point in zero_points_of_activations(model):
        assert zero_point.dtype == np.int8
        assert zero_point == 0
    assert not [name for name, values in initializers(model).items() if values.dtype == np.int32 and values.ndim]
    biases = [node.input[2] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert {initializers(model)[name].dtype for name in biases} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("target", "dtype"), [("cpu_avx2", np.uint8), ("cpu_vnni", np.uint8), ("cpu_arm", np.int8)])
def test_cpu_targets_get_their_activations_and_integer_biases(
    mobile: Path, target: str, dtype: type[np.generic], tmp_path: Path
) -> None:
    path = tmp_path / "int8.onnx"
    quantize(mobile, path, [images(16)], target=TARGETS[target], method="minmax")
    model = onnx.load(path)
    assert {zero_point.dtype for zero_point in zero_points_of_activations(model)} == {np.dtype(dtype)}
    dequantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    biases = [dequantized[node.input[2]] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert {initializers(model)[name].dtype for name in biases} == {np.dtype(np.int32)}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_uneven_batches_and_says_nothing(
    mobile: Path, method: Method, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "int8.onnx"
    quantize(mobile, path, [images(12), images(5, 1)], target=TARGETS["cpu_avx2"], method=method)
    assert np.abs(run(path, images(8, 2)) - run(mobile, images(8, 2))).max() < 0.5
    assert capfd.readouterr() == ("", "")


def test_slices_of_the_calibration_images_change_no_range(mobile: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    batch = images(16)
    quantize(mobile, whole, [batch], target=TARGETS["cpu_avx2"], method="minmax")
    quantize(mobile, parts, [batch[:3], batch[3:]], target=TARGETS["cpu_avx2"], method="minmax")
    assert np.array_equal(run(whole, images(8, 1)), run(parts, images(8, 1)))


def test_metadata_and_versions_are_the_float_files(mobile: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    quantize(mobile, path, [images(16)], target=TARGETS["cpu_avx2"], method="minmax")
    before, after = onnx.load(mobile), onnx.load(path)
    assert after.ir_version == before.ir_version
    assert list(after.metadata_props) == list(before.metadata_props)


def test_methods_are_those_of_our_own_calibration() -> None:
    assert set(METHODS) == set(get_args(Method))


Labelled = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[Labelled, Labelled]:
    """Scikit-learn's digits at 16 pixels: 1,297 to learn from, 500 to judge by."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
    pictures, labels = F.interpolate(pixels, size=SIZE, mode="bilinear") - 0.5, torch.tensor(data.target)
    return (pictures[500:], labels[500:]), (pictures[:500], labels[:500])


@pytest.fixture(scope="module")
def trained(digits: tuple[Labelled, Labelled]) -> nn.Module:
    torch.manual_seed(0)
    pictures, labels = digits[0]
    model = Residual(10, width=8)
    steps = 4 * (len(labels) // 64)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    for step in range(steps):
        if step % (steps // 4) == 0:
            order = torch.randperm(len(labels)).split(64)
        batch = order[step % (steps // 4)]
        optimizer.zero_grad()
        F.cross_entropy(model(pictures[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def agreement(answers: Tensor, reference: Tensor) -> float:
    return float((answers.argmax(1) == reference.argmax(1)).float().mean())


def calibrated_agreement(model: nn.Module, method: Method, digits: tuple[Labelled, Labelled]) -> float:
    prepared = prepare(model, TARGETS["cpu_avx2"], torch.zeros(1, 3, SIZE, SIZE))
    calibrate_(prepared, digits[0][0][:512].split(64), method)
    with torch.no_grad():
        return agreement(prepared(digits[1][0]), model(digits[1][0]))


@pytest.fixture(scope="module")
def trained_file(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "float.onnx"
    to_onnx(trained, path, shape=(3, SIZE, SIZE), metadata={})
    return path


@pytest.mark.parametrize("method", get_args(Method))
def test_a_trained_network_answers_alike_by_every_method(
    trained: nn.Module, trained_file: Path, digits: tuple[Labelled, Labelled], method: Method, tmp_path: Path
) -> None:
    pictures, labels = digits[1]
    reference = trained(pictures)
    assert (reference.argmax(1) == labels).float().mean() > 0.9
    assert calibrated_agreement(trained, method, digits) >= 0.95
    batches = [batch.numpy() for batch in digits[0][0][:512].split(64)]
    quantize(trained_file, tmp_path / "int8.onnx", batches, target=TARGETS["cpu_avx2"], method=method)
    assert agreement(torch.from_numpy(run(tmp_path / "int8.onnx", pictures.numpy())), reference) >= 0.95


def with_an_outlier_channel(model: nn.Module, pictures: Tensor) -> nn.Module:
    """Let a channel that nobody reads fire at one value in 20,000 of its own, a thousand times as strongly as the others."""
    assert isinstance(model, Residual)
    torch.manual_seed(0)
    planted = Residual(10, width=8).eval()
    planted.load_state_dict(model.state_dict())
    block = planted.block1
    with torch.no_grad():
        block.conv2.weight[:, 0] = 0
        values = block.bn1(block.conv1(planted.pool(planted.stem(pictures))))[:, 0].flatten()
        threshold = values.kthvalue(int(values.numel() * (1 - 1 / 20_000))).values
        strength = 1000 / (values.max() - threshold)
        block.bn1.bias[0] = (block.bn1.bias[0] - threshold) * strength
        block.bn1.weight[0] *= strength
    return planted.requires_grad_(False)


def test_percentile_wins_where_an_outlier_channel_ruins_minmax(
    trained: nn.Module, digits: tuple[Labelled, Labelled]
) -> None:
    planted = with_an_outlier_channel(trained, digits[0][0][:512])
    assert calibrated_agreement(planted, "minmax", digits) < 0.8
    assert calibrated_agreement(planted, "percentile", digits) >= 0.95


def test_neural_compressor_says_nothing_and_leaves_all_as_it_was(
    trained: nn.Module, digits: tuple[Labelled, Labelled], capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: values.clone() for name, values in trained.state_dict().items()}
    filters, disabled = list(warnings.filters), logging.root.manager.disable
    batches = digits[0][0][:256].split(100)
    quantized = neural_compressor_ptq.quantize(trained, batches, target=TARGETS["cpu_vnni"], algorithm="minmax")
    assert capfd.readouterr() == ("", "")
    assert (warnings.filters, logging.root.manager.disable) == (filters, disabled)
    assert all(torch.equal(values, before[name]) for name, values in trained.state_dict().items())
    with torch.no_grad():
        assert agreement(quantized(digits[1][0]), trained(digits[1][0])) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "target", "dtype"), [("minmax", "cpu_vnni", np.uint8), ("kl", "tensorrt", np.int8)]
)
def test_neural_compressors_file_answers_as_its_network(
    trained: nn.Module,
    digits: tuple[Labelled, Labelled],
    algorithm: neural_compressor_ptq.Algorithm,
    target: str,
    dtype: type[np.generic],
    tmp_path: Path,
) -> None:
    path, pictures = tmp_path / "int8.onnx", digits[1][0]
    batches = digits[0][0][:256].split(100)
    quantized = neural_compressor_ptq.quantize(trained, batches, target=TARGETS[target], algorithm=algorithm)
    with neural_compressor_ptq.quiet():
        to_onnx(quantized, path, shape=(3, SIZE, SIZE), metadata={})
    with torch.no_grad():
        answers = quantized(pictures)
    assert agreement(answers, trained(pictures)) >= 0.95
    assert agreement(torch.from_numpy(run(path, pictures.numpy())), answers) >= 0.98
    grids = zero_points_of_activations(onnx.load(path))
    assert np.dtype(dtype) in {zero_point.dtype for zero_point in grids if zero_point.ndim == 0}


class Branches(nn.Module):
    """What no exporter takes: its path depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))


def test_what_neural_compressor_cannot_export_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="neural-compressor cannot quantize Branches"):
        neural_compressor_ptq.quantize(
            Branches(), [torch.zeros(2, 3, SIZE, SIZE)], target=TARGETS["cpu_vnni"], algorithm="minmax"
        )
    assert capfd.readouterr() == ("", "")


SMALL = f"{Path(__file__).parents[1] / 'networks.py'}:small"
RECIPE = """
name: planted
target: cpu_avx2
further_targets: FURTHER
data: {dataset: digits, image_size: 16}
model: {arch: "ARCH", weights: WEIGHTS}
stages:
  - {stage: source}
  - {stage: ptq, calibration_images: 256, methods: [minmax, percentile], neural_compressor: NC, max_drop: 0.02}
"""


def filled(
    text: str, weights: Path, *, further: str = "[]", neural_compressor: str = "false", arch: str = SMALL
) -> str:
    return (
        text.replace("ARCH", arch)
        .replace("WEIGHTS", str(weights))
        .replace("FURTHER", further)
        .replace("NC", neural_compressor)
    )


def with_a_layer_that_does_not_quantize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every filter of one layer a huge weight on an input that is always zero: harmless in float, all others round to nothing."""
    planted = {name: values.clone() for name, values in weights.items()}
    for norm in ("stem.1", "block1.bn2"):
        planted[f"{norm}.weight"][0] = planted[f"{norm}.bias"][0] = 0
    planted["block2.conv1.weight"][:, 0] = 1000
    return planted


def ptq_of(weights: dict[str, Tensor], folder: Path, **settings: str) -> tuple[dict[str, Any], Path]:
    """Run the ptq stage on these weights; return ptq.json and the stage's folder."""
    save_file(weights, folder / "weights.safetensors")
    path = folder / "planted.yaml"
    path.write_text(filled(RECIPE, folder / "weights.safetensors", **settings))
    run_recipe(
        read_recipe(path, [f"out={folder}"]), trust_code=True, until="ptq", verbose=False, command="compress run"
    )
    stage = next(folder.glob("planted/01-ptq-*"))
    found: dict[str, Any] = json.loads((stage / "ptq.json").read_text())
    return found, stage


EXCITED = """
import sys
import torch
from torch import nn
sys.path.insert(0, {folder!r})
from networks import Residual

class Excited(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = Residual(num_classes)

    def forward(self, images):
        net = self.net
        brighter = torch.relu(images.mean((1, 2, 3), keepdim=True) - {threshold}) * {strength}
        features = net.block2(net.block1(net.pool(net.stem(images)) * (1 + brighter)))
        return net.head(features.mean((2, 3)))
"""


@pytest.mark.slow
def test_images_that_blow_the_network_up_are_named_and_set_no_range(learned: dict[str, Tensor], tmp_path: Path) -> None:
    """Its features are a thousand times as large for the brightest of 1,797 images; each file lost half of its answers to them."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    less, more = np.unique((load_digits().images / 16).mean((1, 2)) * (1 / std).mean() - (mean / std).mean())[-5:-3]
    threshold, gap = (less + more) / 2, (more - less) / 2
    (tmp_path / "excited.py").write_text(
        EXCITED.format(folder=str(Path(__file__).parents[1]), threshold=threshold, strength=1000 / gap)
    )
    found, _ = ptq_of(
        {f"net.{name}": values for name, values in learned.items()}, tmp_path, arch=f"{tmp_path}/excited.py:Excited"
    )
    assert 1 <= len(found["outliers"]) <= 8
    assert all(row["agreement"] > 0.95 for row in found["targets"]["cpu_avx2"]["methods"])


@pytest.mark.acceptance
def test_tuning_puts_exactly_the_planted_bad_layer_back_to_float(learned: dict[str, Tensor], tmp_path: Path) -> None:
    found, stage = ptq_of(with_a_layer_that_does_not_quantize(learned), tmp_path)
    own = found["targets"]["cpu_avx2"]
    assert own["sensitivity"][0]["group"] == "block2.conv1"
    assert [trial["keep_float"] for trial in own["trials"]] == [[], [], [], [], ["block2.conv1"]]
    assert [trial["engine"] for trial in own["trials"]] == ["compress"] * 2 + ["onnxruntime"] * 2 + ["compress"]
    assert [trial["met"] for trial in own["trials"]] == [False, False, False, False, True]
    assert own["chosen"] == 4
    assert own["trials"][4]["latency_ratio"] is None or own["trials"][4]["latency_ratio"] > 0
    levels = weight_levels(onnx.load(stage / "cpu_avx2" / "student_ptq_int8.onnx"))
    assert len(levels) == 6
    assert all(weight.min() >= -64 and weight.max() <= 63 for weight in levels.values())


@pytest.mark.acceptance
def test_the_stage_measures_every_engine_on_every_target_and_gives_the_network_on(
    learned: dict[str, Tensor], tmp_path: Path
) -> None:
    found, stage = ptq_of(learned, tmp_path, further="[tensorrt]", neural_compressor="true")
    assert set(found["targets"]) == {"cpu_avx2", "tensorrt"}
    for name, target in found["targets"].items():
        assert [(row["engine"], row["method"]) for row in target["methods"]] == [
            ("compress", "minmax"), ("compress", "percentile"), ("onnxruntime", "minmax"), ("onnxruntime", "percentile"),
            ("neural-compressor", "minmax"), ("neural-compressor", "kl"),
        ]  # fmt: skip
        assert all(row["agreement"] >= 0.95 for row in target["methods"])
        assert all(row["scored_in"] == "onnxruntime" for row in target["methods"])
        assert target["trials"][target["chosen"]]["met"]
        # On the 7-bit grid neural-compressor's full-range weights would saturate: measured, but no candidate.
        # Of each library, the files near the lowest KL on few images are judged on all.
        engines = [trial["engine"] for trial in target["trials"]]
        assert len(set(engines)) == {"cpu_avx2": 2, "tensorrt": 3}[name]
        assert len(engines) <= 2 * len(set(engines))
        assert (stage / name / "student_ptq_int8.onnx").exists()
    source = next(tmp_path.glob("planted/00-source-*"))
    for name in ("architecture.json", "weights.safetensors"):
        assert (stage / name).read_bytes() == (source / name).read_bytes()
    metrics = json.loads((stage / "meta.json").read_text())["metrics"]
    assert metrics["ptq_score"] == found["targets"]["cpu_avx2"]["score"]
    assert metrics["trials"] == len(found["targets"]["cpu_avx2"]["trials"])
    assert sorted(path.name for path in stage.iterdir()) == [
        ".digests.json", "architecture.json", "cpu_avx2", "log.jsonl", "meta.json", "ptq.json", "tensorrt", "weights.safetensors",
    ]  # fmt: skip
