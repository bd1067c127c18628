"""Learned step sizes against the paper's equations, done by hand and in numbers."""

import math
from pathlib import Path

import onnxruntime
import pytest
import torch
from networks import Mobile, Residual, lively
from torch import Tensor, nn

from compress.quant.fake_quant import ActivationQuantizer, quantize_weight
from compress.quant.layers import QuantLayer
from compress.quant.lsq import round_learned, scale_gradient
from compress.quant.prepare import deploy, freeze_batchnorm_, prepare, quantizers, set_phase_
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx


def learning(low: float, high: float, target: str = "cpu_vnni") -> ActivationQuantizer:
    quantizer = ActivationQuantizer(TARGETS[target], ranges="lsq").train()
    quantizer.set_range_(low, high)
    return quantizer


def factor(values: int, steps: int) -> float:
    """Q²·g with g = 1/√(N·Q): what turns SGD on the range into the paper's SGD on the step."""
    return steps**2 / math.sqrt(values * steps)


def test_the_steps_gradient_is_the_papers_equation_3() -> None:
    step = torch.tensor(0.5, requires_grad=True)
    values = torch.tensor([0.3, -0.7, 1.2, 9.0, -9.0])  # v/s = 0.6, -1.4, 2.4; above 3; below -4
    round_learned(values, step, step * -4, step * 3, -4, 3).backward(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]))
    assert step.grad is not None
    assert float(step.grad) == pytest.approx((1 - 0.6) + (-1 + 1.4) + (2 - 2.4) + 3 - 4, abs=1e-5)


@pytest.mark.parametrize(("below", "above"), [(4, 3), (0, 7)])
def test_the_gradients_are_equations_3_and_5_on_both_sides_of_the_clip(below: int, above: int) -> None:
    """Value after value across the grid, within half a step of its ends on either side too."""
    for number in range(-60, 100):
        value = torch.tensor(number / 10 * 0.5, requires_grad=True)
        step = torch.tensor(0.5, requires_grad=True)
        round_learned(value, step, -below * step, above * step, -below, above).backward()
        scaled = float(value.detach() / 0.5)
        if scaled <= -below:
            expected, passes = float(-below), 0.0
        elif scaled >= above:
            expected, passes = float(above), 0.0
        else:
            expected, passes = round(scaled) - scaled, 1.0
        assert step.grad is not None
        assert value.grad is not None
        assert float(step.grad) == pytest.approx(expected, abs=1e-5), scaled
        assert float(value.grad) == passes, scaled


def test_the_values_gradient_passes_inside_the_grid_only() -> None:
    values = torch.tensor([0.3, -0.7, 9.0, -9.0], requires_grad=True)
    step = torch.tensor(0.5)
    round_learned(values, step, step * -4, step * 3, -4, 3).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0, 0.0, 0.0]


def test_a_gradient_is_scaled_by_q_squared_over_root_nq() -> None:
    learned = torch.tensor(2.0, requires_grad=True)
    (3 * scale_gradient(learned, 50, 255)).backward()
    assert learned.grad is not None
    assert float(learned.grad) == pytest.approx(3 * 255**2 / math.sqrt(50 * 255), rel=1e-6)


def test_sgd_on_the_range_moves_the_step_as_the_papers_sgd_does() -> None:
    quantizer, values = learning(0.0, 4.0), torch.tensor([[0.113, 1.7, 3.3, 5.0, 7.0]])
    upstream = torch.tensor([[0.3, -1.0, 0.2, 0.05, -0.02]])
    step = 4.0 / 255
    scaled = values / step
    by_equation_3 = torch.where(scaled > 255, 255.0, scaled.round() - scaled)
    expected = step - 0.01 / math.sqrt(5 * 255) * float((upstream * by_equation_3).sum())
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    quantizer(values).backward(upstream)
    optimizer.step()
    assert float(quantizer.scale_and_zero_point()[0]) == pytest.approx(expected, rel=1e-4)
    assert float(quantizer.low.detach()) == 0.0


def continuous(values: Tensor, low: Tensor, high: Tensor, rounded: Tensor) -> Tensor:
    """The quantizer with the rounding offsets frozen: differentiable, so that finite differences have something to measure."""
    step = (high - low) / 255
    return torch.where(values < low, low, torch.where(values > high, high, step * (values / step + rounded)))


@pytest.mark.parametrize("end", ["low", "high"])
def test_an_asymmetric_ranges_gradients_equal_finite_differences(end: str) -> None:
    torch.manual_seed(0)
    values, low, high = torch.randn(1, 400).double() * 2, torch.tensor(-1.5).double(), torch.tensor(3.0).double()
    upstream = torch.randn(values.shape).double()
    step = (high - low) / 255
    # ∂v̂/∂s = round(v/s) - v/s holds v̂'s level fixed: v̂ = s·k, so v enters only through k
    levels = (values / step).round()
    ends = {"low": low, "high": high}

    def loss(offset: float) -> float:
        moved = {**ends, end: ends[end] + offset}
        new = (moved["high"] - moved["low"]) / 255
        inside = values + new * (levels - values / step) - step * (levels - values / step)
        rounded = torch.where(values < low, moved["low"], torch.where(values > high, moved["high"], inside))
        return float((rounded * upstream).sum())

    numeric = (loss(1e-4) - loss(-1e-4)) / 2e-4
    quantizer = learning(-1.5, 3.0)
    quantizer(values.float()).backward(upstream.float())
    gradient = getattr(quantizer, end).grad / factor(values.numel(), 255)
    assert float(gradient) == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_a_symmetric_range_learns_from_both_ends() -> None:
    quantizer, values = learning(-2.0, 1.0, "tensorrt"), torch.tensor([[-3.0, 5.0, 0.01]])
    quantizer(values).backward(torch.tensor([[1.0, 10.0, 0.0]]))
    assert quantizer.low.grad is not None
    # the bound is -low = 2: below the grid -128 s, above it 127 s, with s = bound / 127
    assert float(quantizer.low.grad) == pytest.approx(-(-128 / 127 + 10) * factor(3, 127), rel=1e-5)


def test_a_relus_range_never_grows_below_zero() -> None:
    quantizer = learning(0.0, 1.0)
    for _ in range(5):
        quantizer(torch.rand(1, 100) * 1.3).sum().backward()
    assert quantizer.low.grad is not None
    assert float(quantizer.low.grad) == 0.0


def test_weight_steps_learn_by_equation_3_for_each_channel() -> None:
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[0.9, -0.31], [0.05, -0.2]]).view(2, 2, 1, 1)
    layer = prepare(
        nn.Sequential(conv, nn.ReLU()), TARGETS["cpu_avx2"], torch.zeros(1, 2, 1, 1), ranges="lsq"
    ).get_submodule("0")
    assert isinstance(layer, QuantLayer)
    assert layer.weight_range is not None
    layer.weight_range.data = torch.tensor([0.7, 0.25])  # the first weight is clipped
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 2, 1, 1)
    layer.rounded_weight().backward(upstream)
    step = torch.tensor([0.7, 0.25]) / 63
    scaled = conv.weight.detach().view(2, 2) / step.view(2, 1)
    by_hand = torch.where(scaled > 63, 63.0, scaled.round() - scaled)
    expected = (upstream.view(2, 2) * by_hand).sum(1) / 63 * factor(2, 63)
    assert layer.weight_range.grad is not None
    assert torch.allclose(layer.weight_range.grad, expected, rtol=1e-4)


def test_weight_ranges_start_where_the_largest_weight_is_clipped() -> None:
    """At max|w|, eq. 3 gives Q for each channel's largest weight: the dominant term, which rounding must not lose."""
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 64, 3, bias=False)
    layer = prepare(
        nn.Sequential(conv, nn.ReLU()), TARGETS["cpu_vnni"], torch.zeros(1, 4, 3, 3), ranges="lsq"
    ).get_submodule("0")
    assert isinstance(layer, QuantLayer)
    assert layer.weight_range is not None
    weight = conv.weight.detach().double().flatten(1)  # (64, 36)
    upstream = torch.randn(weight.shape)
    layer.rounded_weight().backward(upstream.view_as(conv.weight))
    largest = weight.abs().amax(1, keepdim=True)
    scaled = weight / largest * 127
    by_hand = torch.where(weight.abs() == largest, 127 * weight.sign(), scaled.round() - scaled)
    expected = (upstream * by_hand).sum(1) / 127 * factor(36, 127)
    assert layer.weight_range.grad is not None
    assert torch.allclose(layer.weight_range.grad.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_step_of_training_reaches_every_parameter_without_nan() -> None:
    torch.manual_seed(0)
    model = prepare(lively(Mobile(5)), TARGETS["cpu_avx2"], torch.zeros(1, 3, 16, 16), ranges="lsq").train()
    images = torch.randn(8, 3, 16, 16)
    set_phase_(model, "observe")
    model(images)
    set_phase_(model, "adapt")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    nn.functional.cross_entropy(model(images), torch.arange(8) % 5).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert {name for name in before if name.endswith("weight_range")} <= moved
    assert sum(name.endswith(".high") for name in moved) >= 8


def test_learned_ranges_are_vectors_at_most_so_that_they_get_no_weight_decay() -> None:
    model = prepare(Residual(5), TARGETS["cpu_vnni"], torch.zeros(1, 3, 16, 16), ranges="lsq")
    learned = [p for name, p in model.named_parameters() if name.endswith(("weight_range", ".low", ".high"))]
    assert len(learned) > 14
    assert all(parameter.dim() <= 1 for parameter in learned)


def test_learned_ranges_survive_saving_and_are_deployed_as_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16)
    model = prepare(lively(Residual(5)), TARGETS["cpu_avx2"], torch.zeros(1, 3, 16, 16), ranges="lsq").train()
    freeze_batchnorm_(model)
    set_phase_(model, "observe")
    model(images)
    set_phase_(model, "round")
    with torch.no_grad():
        for quantizer in quantizers(model):
            quantizer.high.mul_(0.8)
        for module in model.modules():
            if isinstance(module, QuantLayer) and module.weight_range is not None:
                module.weight_range.mul_(0.7)
    again = prepare(Residual(5), TARGETS["cpu_avx2"], torch.zeros(1, 3, 16, 16), ranges="lsq")
    again.load_state_dict(model.state_dict())
    model.eval(), again.eval()
    with torch.no_grad():
        trained = model(images)
        assert torch.equal(again(images), trained)
    deployed = deploy(again)
    layer = again.get_submodule("block1.conv1")
    assert isinstance(layer, QuantLayer)
    levels = quantize_weight(layer.weight, layer.weight_scale(), layer.target)
    assert float(levels.abs().max()) == 63
    assert torch.equal(deployed.get_buffer("block1.conv1.weight_levels").float(), levels)
    to_onnx(deployed, tmp_path / "model.onnx", shape=(3, 16, 16), metadata={})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (integer,) = session.run(None, {"input": images.numpy()})
    assert float((torch.from_numpy(integer) - trained).abs().max()) < 0.1 * float(trained.std())
