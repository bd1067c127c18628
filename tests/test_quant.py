"""Fake-quantization against hand arithmetic, and against ONNX Runtime's integer kernels."""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Mobile, Residual, lively
from torch import fx, nn

from compress.errors import ModelError
from compress.quant.fake_quant import ActivationQuantizer, QuantConv2d, fake_quantize_weight, quantize_weight
from compress.quant.prepare import deploy, freeze_batchnorm_, prepare, quantizers, set_phase_
from export.audit import audit
from export.graph import weight_levels
from export.targets import TARGETS, Target
from export.to_onnx import to_onnx

NETWORKS = {"residual": Residual, "mobile": Mobile}


def calibrated(model: nn.Module, target: Target, images: torch.Tensor) -> fx.GraphModule:
    prepared = prepare(model, target).train()
    freeze_batchnorm_(prepared)
    set_phase_(prepared, observing=True, quantizing=False)
    with torch.no_grad():
        prepared(images)
    set_phase_(prepared, observing=False, quantizing=True)
    prepared.eval()
    return prepared


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_weight_levels_stay_on_the_targets_grid_and_reach_its_end(name: str) -> None:
    target = TARGETS[name]
    levels, scale = quantize_weight(torch.randn(8, 4, 3, 3), target)
    assert levels.dtype == torch.int8
    assert int(levels.min()) >= target.weight_min
    assert int(levels.max()) <= target.weight_max
    assert torch.equal(levels.flatten(1).abs().amax(1), torch.full((8,), target.weight_scale_divisor))
    assert scale.shape == (8,)


def test_fake_quantized_weights_are_levels_times_scale() -> None:
    weight = torch.randn(5, 3, 3, 3)
    levels, scale = quantize_weight(weight, TARGETS["cpu_avx2"])
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
    prepared = prepare(model, TARGETS["cpu_vnni"])
    assert type(model.get_submodule("stem.0")) is nn.Conv2d
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert set(state) <= set(prepared.state_dict())
    assert isinstance(prepared.get_submodule("stem.0"), QuantConv2d)


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_deployed_file_equals_the_trained_network_to_a_few_lsb(network: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    model = calibrated(lively(NETWORKS[network](5)), TARGETS[target], images)
    path = tmp_path / "model.onnx"
    to_onnx(deploy(model), path, image_size=16, metadata={})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (deployed,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        trained = model(images).numpy()
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
def test_every_convolution_and_the_head_run_in_integers(network: str, tmp_path: Path) -> None:
    model = calibrated(lively(NETWORKS[network](5)), TARGETS["cpu_vnni"], torch.randn(8, 3, 16, 16))
    to_onnx(deploy(model), tmp_path / "model.onnx", image_size=16, metadata={})
    found = audit(tmp_path / "model.onnx")
    assert found.float_layers == ()
    assert len(found.integer_layers) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    assert found.operators.get("QLinearGlobalAveragePool") == 1
    assert "Clip" not in found.operators
    assert "Relu" not in found.operators


def test_the_audit_names_a_convolution_that_stays_float(tmp_path: Path) -> None:
    to_onnx(lively(Residual(5)), tmp_path / "model.onnx", image_size=16, metadata={})
    assert len(audit(tmp_path / "model.onnx").float_layers) == 7


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(self.conv(x))
            return out

    with pytest.raises(ModelError, match="conv: runs 2 times in one forward"):
        prepare(Twice(), TARGETS["cpu_vnni"])
