"""Each building block of common networks alone: which kernels ONNX Runtime runs it with, and whether the numbers are the trained ones."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from networks import Block, lively
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import SqueezeExcitation, StochasticDepth

from compress.quant.fake_quant import HardSigmoidQuantizer
from compress.quant.prepare import deploy, float_on_purpose, freeze_batchnorm_, prepare, quantizers, set_phase_
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.proof.audit import audit

WIDTH, SIZE = 16, 14


class Of(nn.Module):
    """A block made of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Halves(nn.Module):
    """A concatenation of a tensor with what one convolution makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(WIDTH, WIDTH // 2, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x[:, : WIDTH // 2]], 1)


class PreActivation(nn.Module):
    """DenseNet's layer: batch-norm before the convolution, its output joined to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 8, 3, padding=1, bias=False)
        self.last = conv(WIDTH + 8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.cat([x, self.conv(F.relu(self.norm(x)))], 1))
        return out


class Shuffle(nn.Module):
    """ShuffleNet's unit: half passes, half is convolved, the channels mix."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = conv(WIDTH // 2, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Next(nn.Module):
    """ConvNeXt's block: depthwise, LayerNorm, two linear layers with GELU between."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH), LayerNorm2d(WIDTH)
        self.wide, self.act, self.narrow = nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.narrow(self.act(self.wide(self.norm(self.depth(x)).permute(0, 2, 3, 1))))
        return x + y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """A transformer's attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(tokens)).unsqueeze(1).chunk(3, dim=-1)
        tokens = tokens + self.out(F.scaled_dot_product_attention(query, key, value).squeeze(1))
        out: Tensor = tokens.transpose(1, 2).reshape(-1, WIDTH, SIZE, SIZE)
        return out


def conv(inputs: int, outputs: int, act: nn.Module | None = None, groups: int = 1) -> nn.Sequential:
    parts = [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs), act]
    return nn.Sequential(*[part for part in parts if part is not None])


def around(block: nn.Module) -> nn.Module:
    """Put a block between a stem and a head whose logits are the mean of each channel: one LSB of the pool is one step of a logit."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WIDTH)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(conv(3, WIDTH), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


# The block, and the operators of its optimized graph beyond those around it and beyond those that only move or convert numbers.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "residual": (lambda: Block(WIDTH, WIDTH, 1), {"QLinearConv": 2, "QLinearAdd": 1}),
    "depthwise relu6": (lambda: conv(WIDTH, WIDTH, nn.ReLU6(), groups=WIDTH), {"QLinearConv": 1}),
    "hard swish": (lambda: conv(WIDTH, WIDTH, nn.Hardswish()), {"QLinearConv": 1, "QLinearMul": 1}),
    "SiLU": (lambda: conv(WIDTH, WIDTH, nn.SiLU()), {"QLinearConv": 1, "QLinearSigmoid": 1, "QLinearMul": 1}),
    "sigmoid": (lambda: conv(WIDTH, WIDTH, nn.Sigmoid()), {"QLinearConv": 1, "QLinearSigmoid": 1}),
    "leaky ReLU": (lambda: conv(WIDTH, WIDTH, nn.LeakyReLU(0.1)), {"QLinearConv": 1, "QLinearLeakyRelu": 1}),
    "squeeze-excite": (
        lambda: SqueezeExcitation(WIDTH, 8),
        {"QLinearConv": 2, "QLinearMul": 1, "QLinearSigmoid": 1, "QLinearGlobalAveragePool": 1},
    ),
    "hard squeeze-excite": (
        lambda: SqueezeExcitation(WIDTH, 8, scale_activation=nn.Hardsigmoid),
        {"QLinearConv": 2, "QLinearMul": 1, "QLinearGlobalAveragePool": 1},
    ),
    "an old spelling of hard swish": (
        lambda: nn.Sequential(conv(WIDTH, WIDTH), Of(lambda x: x * F.relu6(x + 3) / 6)),
        {"QLinearConv": 1, "QLinearMul": 1},
    ),
    "an old spelling of hard sigmoid": (
        lambda: nn.Sequential(conv(WIDTH, WIDTH), Of(lambda x: x * (F.relu6(x + 3.0) * (1 / 6)))),
        {"QLinearConv": 1, "QLinearMul": 1},
    ),
    "concatenation": (Halves, {"QLinearConv": 1, "QLinearConcat": 1, "Slice": 1}),
    "max-pool": (lambda: nn.MaxPool2d(3, 1, 1), {"NhwcMaxPool": 1}),
    "average pool": (lambda: nn.AvgPool2d(3, 1, 1), {"QLinearAveragePool": 1}),
    "adaptive pool in its own size": (lambda: nn.AdaptiveAvgPool2d(SIZE), {"QLinearAveragePool": 1}),
    "batch-norm before the convolution": (PreActivation, {"QLinearConv": 3, "QLinearConcat": 1}),
    "channel shuffle": (Shuffle, {"QLinearConv": 1, "QLinearConcat": 1, "Split": 1}),
    "timm's batch-norm with activation": (
        lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), BatchNormAct2d(WIDTH)),
        {"QLinearConv": 1},
    ),
    "stochastic depth": (lambda: nn.Sequential(conv(WIDTH, WIDTH), StochasticDepth(0.5, "row")), {"QLinearConv": 1}),
}
# Those with float operations in between, by choice.
PARTLY_FLOAT: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "ConvNeXt's block": (
        lambda: nn.Sequential(Next(), conv(WIDTH, WIDTH)),
        {"QLinearConv": 2, "QGemm": 2, "LayerNormalization": 1, "Erf": 1},
    ),
    "attention": (
        lambda: nn.Sequential(Attention(), conv(WIDTH, WIDTH)),
        {"QLinearConv": 1, "QGemm": 2, "LayerNormalization": 1, "Softmax": 1},
    ),
}
AROUND = {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}
MOVING = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}


def run(network: nn.Module, target: str, folder: Path) -> tuple[dict[str, int], float, fx.GraphModule]:
    """Return the optimized graph's operators, and how far ONNX Runtime's logits are from the trained ones in steps of the pool's grid."""
    torch.manual_seed(1)
    images = torch.randn(8, 3, SIZE, SIZE)
    prepared = prepare(network, TARGETS[target], images).train()
    freeze_batchnorm_(prepared)
    set_phase_(prepared, "observe")
    prepared(images)
    set_phase_(prepared, "round")
    prepared.eval()
    to_onnx(deploy(prepared), folder / "model.onnx", shape=(3, SIZE, SIZE), metadata={})
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (integer,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        trained = prepared(images).numpy()
    pool = list(quantizers(prepared))[-1]
    step = float(pool.scale_and_zero_point()[0])
    operators = audit(folder / "model.onnx")["operators"]
    return dict(operators), float(np.abs(integer - trained).max()) / step, prepared


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param("cpu_vnni", marks=pytest.mark.acceptance), "cpu_avx2"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_in_integers_and_gives_the_trained_numbers(name: str, target: str, tmp_path: Path) -> None:
    block, kernels = BLOCKS[name]
    operators, steps, _ = run(around(block()), target, tmp_path)
    assert {kind: count for kind, count in operators.items() if kind not in MOVING} == Counter(AROUND) + Counter(
        kernels
    )
    assert steps < 3


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTLY_FLOAT)
def test_a_block_of_a_transformer_keeps_its_layers_in_integers(name: str, tmp_path: Path) -> None:
    block, kernels = PARTLY_FLOAT[name]
    operators, steps, prepared = run(around(block()), "cpu_vnni", tmp_path)
    expected = Counter(AROUND) + Counter(kernels)
    assert {kind: operators[kind] for kind in expected} == expected
    assert not {"Conv", "Gemm", "FusedConv", "FusedGemm"} & set(operators)
    assert steps < 3
    reasons = list(float_on_purpose(prepared).values())
    assert len(reasons) == 2
    assert all(reason.startswith("ONNX Runtime has no integer kernel for") for reason in reasons)


def test_a_softmax_between_convolutions_stays_the_float_one_that_was_trained(tmp_path: Path) -> None:
    talking_heads = nn.Sequential(conv(WIDTH, WIDTH), Of(lambda x: x.softmax(-1)), conv(WIDTH, WIDTH))
    operators, steps, _ = run(around(talking_heads), "cpu_vnni", tmp_path)
    assert (operators.get("Softmax"), operators.get("QLinearSoftmax")) == (1, None)
    assert operators["QLinearConv"] == 3
    assert steps < 3


def test_all_blocks_in_a_row_run_in_integers(tmp_path: Path) -> None:
    operators, _, prepared = run(
        around(nn.Sequential(*(block() for block, _ in BLOCKS.values()))), "cpu_vnni", tmp_path
    )
    expected = sum((Counter(kernels) for _, kernels in BLOCKS.values()), Counter(AROUND))
    assert {kind: count for kind, count in operators.items() if kind not in MOVING} == expected
    # what is left between the integers is the hard sigmoids of the three hard swishes
    assert [name.rstrip("_0123456789") for name in float_on_purpose(prepared)] == ["quantizer_hardsigmoid"] * 3


def test_a_hard_sigmoid_is_nothing_but_rounding() -> None:
    values = torch.linspace(-5, 5, 1001)
    quantizer = HardSigmoidQuantizer(TARGETS["cpu_vnni"]).eval()
    assert float((quantizer(values) - F.hardsigmoid(values)).abs().max()) <= 0.5 / 254 + 1 / 254 + 1e-6
    scale, zero_point = quantizer.scale_and_zero_point()
    read_scale, read_zero = quantizer.read_scale_and_zero_point()
    levels = ((values / scale).round() + zero_point).clamp(0, 255)
    assert torch.allclose((levels - read_zero) * read_scale, quantizer(values), atol=1e-6)


def test_symmetric_targets_keep_the_hard_sigmoid_as_an_operator() -> None:
    prepared = prepare(
        lively(around(conv(WIDTH, WIDTH, nn.Hardswish()))), TARGETS["tensorrt"], torch.zeros(1, 3, SIZE, SIZE)
    )
    assert not any(isinstance(module, HardSigmoidQuantizer) for module in prepared.modules())
    assert "ONNX Runtime has no integer kernel for hardsigmoid" in float_on_purpose(prepared).values()
