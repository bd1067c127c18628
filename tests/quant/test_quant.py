"""Fake-quantization against hand arithmetic, and against ONNX Runtime's integer kernels."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Mobile, Residual, lively
from torch import fx, nn

from compress.errors import ModelError
from compress.quant.calibrate import calibrate_
from compress.quant.deployed import Folded
from compress.quant.fake_quant import (
    ActivationQuantizer,
    fake_quantize_weight,
    quantize_weight,
    weight_scale,
)
from compress.quant.graph.rewrite import traced
from compress.quant.layers import QuantConv2d, QuantLayer, QuantLinear, QuantNorm, deployed_once, fold
from compress.quant.prepare import (
    deploy,
    float_on_purpose,
    freeze_batchnorm_,
    groups,
    prepare,
    quantize_only_,
    quantizers,
    reestimate_batchnorm_,
    set_phase_,
)
from export.onnx_file.graph import weight_levels
from export.onnx_file.targets import TARGETS, Target
from export.onnx_file.to_onnx import to_onnx
from export.proof.audit import audit

EXAMPLE = torch.zeros(1, 3, 16, 16)
IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NETWORKS = {"residual": Residual, "mobile": Mobile}


Written = Callable[[str, str], tuple[fx.GraphModule, Path]]  # from a network's and a target's name


def calibrated(model: nn.Module, target: Target, images: torch.Tensor) -> fx.GraphModule:
    return with_ranges_of(images, prepare(model, target, images))


def with_ranges_of(images: torch.Tensor, prepared: fx.GraphModule) -> fx.GraphModule:
    prepared.train()
    freeze_batchnorm_(prepared)
    set_phase_(prepared, "observe")
    with torch.no_grad():
        prepared(images)
    set_phase_(prepared, "round")
    prepared.eval()
    return prepared


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"cuda"}))
def test_weight_levels_stay_on_the_targets_grid_and_reach_its_end(name: str) -> None:
    target = TARGETS[name]
    weight = torch.randn(8, 4, 3, 3)
    scale = weight_scale(weight, target)
    levels = quantize_weight(weight, scale, target)
    assert int(levels.min()) >= target.weight_min
    assert int(levels.max()) <= target.weight_max
    assert torch.equal(levels.flatten(1).abs().amax(1), torch.full((8,), float(target.weight_scale_divisor)))
    assert scale.shape == (8,)


def test_fake_quantized_weights_are_levels_times_scale() -> None:
    weight = torch.randn(5, 3, 3, 3)
    scale = weight_scale(weight, TARGETS["cpu_avx2"])
    levels = quantize_weight(weight, scale, TARGETS["cpu_avx2"])
    assert torch.allclose(fake_quantize_weight(weight, TARGETS["cpu_avx2"]), levels * scale.view(-1, 1, 1, 1))


def test_rounding_commutes_with_the_batchnorm_fold() -> None:
    weight, factor = torch.randn(6, 4, 3, 3), torch.tensor([0.3, -2.0, 1.7, 1e-3, 5.0, -0.1]).view(-1, 1, 1, 1)
    target = TARGETS["cpu_vnni"]
    assert torch.allclose(
        fake_quantize_weight(weight * factor, target), fake_quantize_weight(weight, target) * factor, rtol=1e-5
    )


def test_gradients_pass_straight_through_the_rounding() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    fake_quantize_weight(weight, TARGETS["cpu_vnni"]).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_an_activation_range_always_holds_an_exact_zero() -> None:
    quantizer = ActivationQuantizer(TARGETS["cpu_vnni"]).train()
    quantizer.observe_(torch.tensor([2.0, 5.0]))
    scale, zero_point = quantizer.scale_and_zero_point()
    assert int(zero_point) == 0
    assert float(scale) == pytest.approx(5.0 / 255)
    assert float(quantizer(torch.zeros(1))) == 0.0


def test_activation_ranges_move_by_their_momentum() -> None:
    quantizer = ActivationQuantizer(TARGETS["cpu_vnni"], momentum=0.25).train()
    quantizer.observe_(torch.tensor([-1.0, 4.0]))
    quantizer.observe_(torch.tensor([-3.0, 8.0]))
    assert float(quantizer.low) == pytest.approx(-1.5)
    assert float(quantizer.high) == pytest.approx(5.0)


def test_frozen_ranges_do_not_move() -> None:
    model = calibrated(lively(Residual(5)), TARGETS["cpu_vnni"], torch.randn(8, 3, 16, 16)).train()
    before = [float(quantizer.high) for quantizer in quantizers(model)]
    model(10 * torch.randn(8, 3, 16, 16))
    assert [float(quantizer.high) for quantizer in quantizers(model)] == before


def test_prepare_leaves_its_argument_alone_and_keeps_module_paths() -> None:
    model = lively(Mobile(5))
    state = copy.deepcopy(model.state_dict())
    prepared = prepare(model, TARGETS["cpu_vnni"], EXAMPLE)
    assert type(model.get_submodule("stem.0")) is nn.Conv2d
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert set(state) <= set(prepared.state_dict())
    assert isinstance(prepared.get_submodule("stem.0"), QuantConv2d)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a function that gives the network with ranges of IMAGES, and its file."""

    @cache
    def of(network: str, target: str) -> tuple[fx.GraphModule, Path]:
        torch.manual_seed(0)
        model = calibrated(lively(NETWORKS[network](5)), TARGETS[target], IMAGES)
        path = tmp_path_factory.mktemp("written") / "model.onnx"
        to_onnx(deploy(model), path, shape=(3, 16, 16), metadata={})
        return model, path

    return of


def answers_of(path: Path) -> np.ndarray:
    """Return ONNX Runtime's logits of IMAGES."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answers: np.ndarray = session.run(None, {"input": IMAGES.numpy()})[0]
    return answers


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"cuda"}))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_deployed_file_equals_the_trained_network_to_a_few_lsb(network: str, target: str, written: Written) -> None:
    model, path = written(network, target)
    deployed = answers_of(path)
    with torch.no_grad():
        trained = model(IMAGES).numpy()
    if (
        target == "cpu_arm"
    ):  # this machine's kernels for S8 activations differ in rounding; the file's grid is what counts
        assert np.mean(deployed.argmax(1) == trained.argmax(1)) > 0.9
    else:
        # one LSB of the last quantized tensor moves a logit by about 1 % of their spread
        assert np.abs(deployed - trained).max() < 0.1 * trained.std()
    levels = weight_levels(onnx.load(path))
    assert len(levels) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    assert all(
        level.min() >= TARGETS[target].weight_min and level.max() <= TARGETS[target].weight_max
        for level in levels.values()
    )


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_every_convolution_and_the_head_run_in_integers(network: str, written: Written) -> None:
    model, path = written(network, "cpu_vnni")
    found = audit(path)
    assert found["float_layers"] == []
    assert len(found["integer_layers"]) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    assert found["operators"].get("QLinearGlobalAveragePool") == 1
    assert "Clip" not in found["operators"]
    assert "Relu" not in found["operators"]


def test_the_audit_names_a_convolution_that_stays_float(tmp_path: Path) -> None:
    to_onnx(lively(Residual(5)), tmp_path / "model.onnx", shape=(3, 16, 16), metadata={})
    assert len(audit(tmp_path / "model.onnx")["float_layers"]) == 7


def test_a_layer_that_runs_twice_becomes_two_with_the_same_weights(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.first = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(self.conv(self.first(x)).relu()).relu().mean((2, 3))
            return out

    model = Twice()
    prepared = prepare(model, TARGETS["cpu_vnni"], EXAMPLE)
    calibrate_(prepared, [torch.rand(8, *EXAMPLE.shape[1:])], "minmax")
    assert groups(prepared) == ("first", "conv", "conv_run2")
    quantize_only_(prepared, ())
    with torch.no_grad():
        assert torch.allclose(prepared(EXAMPLE), model(EXAMPLE), atol=1e-5)
    quantize_only_(prepared, None)
    to_onnx(deploy(prepared), tmp_path / "model.onnx", shape=(3, EXAMPLE.shape[-1], EXAMPLE.shape[-1]), metadata={})
    found = audit(tmp_path / "model.onnx")
    assert (len(found["integer_layers"]), len(found["float_layers"])) == (3, 0)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_in_eval_mode_the_trained_network_gives_onnx_runtimes_very_bits(network: str, written: Written) -> None:
    prepared, path = written(network, "cpu_avx2")
    integer = answers_of(path)
    with torch.no_grad():
        difference = np.abs(prepared(IMAGES).numpy() - integer).max(1)
        assert torch.equal(deploy(prepared)(IMAGES), prepared(IMAGES))
    # ONNX Runtime adds two tensors with one rounding less: a sum within 1e-6 of a tie can fall to the other side
    assert np.mean(difference < 1e-5) > 0.9
    assert difference.max() < 0.05 * integer.std()


def test_an_evaluation_deploys_each_layer_once_and_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(8, 3, 16, 16)
    prepared = calibrated(lively(Residual(5)), TARGETS["cpu_avx2"], images)
    built: list[object] = []

    def counted(layer: QuantConv2d | QuantLinear, norm: QuantNorm | None) -> Folded:
        built.append(layer)
        return fold(layer, norm)

    monkeypatch.setattr("compress.quant.layers.fold", counted)
    with torch.no_grad():
        fresh = prepared(images)
        of_one_pass = len(built)
        with deployed_once(prepared):
            assert torch.equal(prepared(images), fresh)
            assert torch.equal(prepared(images), fresh)
        assert len(built) == 2 * of_one_pass > 0
        layer = prepared.get_submodule("stem.0")
        assert isinstance(layer, QuantLayer)
        layer.weight *= -1
        assert not torch.equal(prepared(images), fresh)


def test_training_and_deployment_differ_by_ties_alone() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    prepared = calibrated(lively(Residual(5)), TARGETS["cpu_avx2"], images)
    norm = prepared.get_submodule("stem.1")
    quantizer = next(part for name, part in prepared.named_modules() if name == "quantizer_stem_0")
    seen: list[torch.Tensor] = []
    handles = [part.register_forward_hook(lambda _, __, output: seen.append(output)) for part in (norm, quantizer)]
    with torch.no_grad():
        prepared(images)
        prepared.train()
        freeze_batchnorm_(prepared)
        prepared(images)
    for handle in handles:
        handle.remove()
    deployed_sums, deployed, sums, trained = seen
    step = float(deployed[deployed > 0].min())
    assert torch.equal((deployed_sums / step).round() * step, deployed_sums)  # rounded once, where the kernel does
    assert not torch.equal((sums / step).round() * step, sums)
    levels = ((deployed - trained) / step).round().abs()
    assert float(levels.max()) <= 1
    assert float(levels.mean()) < 0.01  # a bias is a whole number of the accumulator's units


def test_a_copy_answers_with_its_own_weights() -> None:
    images = torch.randn(4, 3, 16, 16)
    prepared = calibrated(lively(Residual(5)), TARGETS["cpu_avx2"], images)
    with torch.no_grad():
        before = prepared(images)
        changed = copy.deepcopy(prepared)
        changed.get_parameter("stem.1.weight").mul_(0.5)
        changed.get_buffer("quantizer_stem_0.high").mul_(0.9)
        assert torch.equal(prepared(images), before)
        assert torch.equal(changed(images), deploy(changed)(images))
        assert not torch.equal(changed(images), before)


def test_a_channel_with_a_negative_batchnorm_scale_keeps_its_trained_levels_with_the_sign_turned() -> None:
    model = lively(Residual(5))
    norm = model.get_submodule("stem.1")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[3] *= -1
    prepared = calibrated(model, TARGETS["cpu_avx2"], torch.randn(8, 3, 16, 16))
    layer = prepared.get_submodule("stem.0")
    assert isinstance(layer, QuantConv2d)
    trained = quantize_weight(layer.weight, layer.weight_scale(), TARGETS["cpu_avx2"])
    levels = deploy(prepared).get_buffer("stem.0.weight_levels")
    sign = torch.ones(16)
    sign[3] = -1
    assert torch.equal(levels.float(), trained * sign.view(-1, 1, 1, 1))


def test_a_dead_channel_with_a_bias_keeps_its_bias() -> None:
    model = lively(Residual(5))
    conv, norm = model.get_submodule("stem.0"), model.get_submodule("stem.1")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        conv.weight[2] *= 1e-12
        norm.bias[2] = 50.0
    prepared = calibrated(model, TARGETS["cpu_vnni"], torch.randn(8, 3, 16, 16))
    deployed = deploy(prepared)
    bias = deployed.get_buffer("stem.0.bias_levels")[2] * deployed.get_buffer("stem.0.bias_scale")[2]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    shift = 50.0 - norm.running_mean[2] / (norm.running_var[2] + norm.eps).sqrt() * norm.weight[2].detach()
    assert float(bias) == pytest.approx(float(shift), rel=1e-6)


def test_the_tensorrt_file_has_zero_points_of_zero_and_no_int32(written: Written) -> None:
    graph = onnx.load(written("mobile", "tensorrt")[1]).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 10
    assert all(not tensors[node.input[2]].any() for node in pairs)
    assert all(tensors[node.input[2]].dtype == np.int8 for node in pairs)
    assert not any(tensor.dtype == np.int32 for tensor in tensors.values())


def test_groups_are_the_layers_in_the_order_they_run() -> None:
    model = Mobile(5)
    expected = ("stem.0", "expand.0", "depth.0", "project.0", "grouped.0", "head")
    assert groups(traced(model, EXAMPLE)) == expected
    assert groups(prepare(model, TARGETS["cpu_vnni"], EXAMPLE)) == expected


def test_quantizing_one_group_alone_changes_what_that_layer_rounds_and_nothing_else() -> None:
    images = torch.randn(8, 3, 16, 16)
    float_model = lively(Mobile(5))
    prepared = calibrated(float_model, TARGETS["cpu_avx2"], images)
    with torch.no_grad():
        quantize_only_(prepared, ())
        assert torch.allclose(prepared(images), float_model(images), atol=1e-5)
        quantize_only_(prepared, ("depth.0",))
        by_hand = copy.deepcopy(float_model)
        layer = by_hand.get_submodule("depth.0")
        assert isinstance(layer, nn.Conv2d)
        layer.weight.copy_(fake_quantize_weight(layer.weight, TARGETS["cpu_avx2"]))
        after = prepared.get_submodule("quantizer_depth_0")
        by_hand.get_submodule("depth").register_forward_hook(lambda _, __, values: after(values))
        assert torch.allclose(prepared(images), by_hand(images), atol=1e-5)
        quantize_only_(prepared, None)
    assert all(module.quantizing for module in prepared.modules() if isinstance(module, QuantLayer))
    assert all(quantizer.quantizing for quantizer in quantizers(prepared))


def test_layers_kept_float_run_in_float_and_say_so(tmp_path: Path) -> None:
    prepared = prepare(lively(Mobile(5)), TARGETS["cpu_vnni"], EXAMPLE, keep_float=("depth.*", "head"))
    why = float_on_purpose(prepared)
    assert why.pop("depth.0") == why.pop("head") == "keep_float names it"
    assert why == {
        "depth.1": "an input is float",
        "depth.2": "an input is float",
        "cat": "nothing behind it reads integers",
        "adaptive_avg_pool2d": "an input is float",
    }
    to_onnx(
        deploy(with_ranges_of(torch.randn(8, 3, 16, 16), prepared)),
        tmp_path / "model.onnx",
        shape=(3, 16, 16),
        metadata={},
    )
    found = audit(tmp_path / "model.onnx")
    assert len(found["float_layers"]) == 2
    assert len(found["integer_layers"]) == 4


def test_a_network_that_runs_in_integers_throughout_has_nothing_to_excuse() -> None:
    assert float_on_purpose(prepare(lively(Mobile(5)), TARGETS["cpu_vnni"], EXAMPLE)) == {}


def test_a_pattern_that_names_no_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"keep_float: features\.\* matches no layer; .*\(known: stem\.0,"):
        prepare(Mobile(5), TARGETS["cpu_vnni"], EXAMPLE, keep_float=("features.*",))


def test_reestimated_batchnorm_statistics_are_the_mean_over_the_batches() -> None:
    batches = [torch.randn(8, 3, 16, 16) * scale for scale in (1.0, 2.0)]
    prepared = calibrated(lively(Residual(5)), TARGETS["cpu_vnni"], torch.cat(batches))
    seen: list[torch.Tensor] = []
    norm = prepared.get_submodule("block1.bn1")
    with norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        reestimate_batchnorm_(prepared, batches)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), rtol=1e-5)
    assert norm.momentum == 0.1
    assert not any(module.training for module in prepared.modules())
