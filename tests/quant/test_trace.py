"""Tracing against the module itself, merged branches and windowed attention against their libraries."""

import copy

import pytest
import torch
from networks import Mobile, Residual, lively
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.models.fastvit import MobileOneBlock as FastMobileOneBlock
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from compress.errors import ModelError
from compress.models.architectures import build
from compress.quant.calibrate import collect, set_ranges_
from compress.quant.graph.trace import called, trace
from compress.quant.prepare import deploy, prepare
from compress.training.device import place_
from export.onnx_file.targets import TARGETS

MultiBranch = RepVggBlock | MobileOneBlock | FastMobileOneBlock
NETWORKS = {
    "torchvision:shufflenet_v2_x0_5": 32,
    "torchvision:mobilenet_v3_small": 32,
    "timm:repvgg_a0": 32,
    "timm:efficientnet_lite0": 32,
    "timm:tf_mobilenetv3_small_minimal_100": 32,  # pads by itself, as TensorFlow does
    "torchvision:mnasnet0_5": 32,
}
LARGE = {
    "torchvision:convnext_tiny": 32,
    "timm:vit_tiny_patch16_224": 224,
    "timm:fastvit_t8": 128,
    "timm:resnetv2_50": 32,  # standardizes its weights in every forward
}
LARGEST = {
    "timm:edgenext_xx_small": 64,
    "timm:tiny_vit_5m_224": 224,
    "timm:efficientvit_b0": 64,
    "torchvision:regnet_y_400mf": 32,
    "torchvision:googlenet": 64,
    "torchvision:densenet121": 32,
    "torchvision:swin_t": 112,
    "torchvision:vit_b_16": 224,
    "timm:mobileone_s0": 64,
    "timm:mixnet_s": 32,
}


def agree(model: nn.Module, images: torch.Tensor) -> fx.GraphModule:
    graph = trace(model, images)
    with torch.no_grad():
        assert torch.allclose(graph(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    return graph


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        *NETWORKS.items(),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE.items()),
        *(pytest.param(*row, marks=pytest.mark.acceptance) for row in LARGEST.items()),
    ],
)
def test_a_traced_network_equals_its_module_and_keeps_its_layers_in_sight(arch: str, size: int) -> None:
    torch.manual_seed(0)
    model = lively(build(arch, num_classes=5))
    graph = agree(model, torch.rand(2, 3, size, size))
    assert [node.op for node in graph.graph.nodes].count("placeholder") == 1
    names = {name for name, module in graph.named_modules() if type(module) in (nn.Conv2d, nn.Linear)}
    calls = {str(node.target) for node in graph.graph.nodes if called(graph, node) in (nn.Conv2d, nn.Linear)}
    assert names == calls
    if arch in NETWORKS and not any(isinstance(module, MultiBranch) for module in model.modules()):
        assert set(graph.state_dict()) <= set(model.state_dict())


def test_tracing_leaves_its_argument_alone_mode_included() -> None:
    model = lively(Mobile(5)).train()
    state = copy.deepcopy(model.state_dict())
    trace(model, torch.zeros(1, 3, 16, 16))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_only_training_has_is_gone() -> None:
    model = build("torchvision:convnext_tiny", num_classes=5).train()
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    assert not {"stochastic_depth", "dropout"} & {getattr(node.target, "__name__", "") for node in graph.graph.nodes}
    assert not any(isinstance(module, nn.Dropout | nn.Identity) for module in graph.modules())


class Padding(nn.Conv2d):
    """A convolution that pads for itself, one row and column more below and to the right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """A convolution with weights of mean 0 and deviation 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class InPlace(nn.Module):
    """Reads a tensor after a ReLU has written over it, and a mask that it fills."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x.new_zeros(x.shape[-2:])
        mask[1:, :2] = 2.0
        y = x + 1
        F.relu_(y)
        return y * mask + F.hardtanh(y, 0.0, 6.0)


@pytest.mark.parametrize("kind", [Padding, Standardized])
def test_a_convolution_that_a_person_wrote_is_a_convolution_at_its_own_path(kind: type[nn.Conv2d]) -> None:
    model = nn.Sequential(nn.ReLU(), kind(8, 8, 2, stride=2) if kind is Padding else kind(8, 8, 3))
    graph = agree(model, torch.randn(2, 8, 9, 9))
    assert [str(node.target) for node in graph.graph.nodes if node.op == "call_module"] == ["1"]
    assert type(graph.get_submodule("1")) is nn.Conv2d
    assert len(graph.graph.nodes) == 4  # input, ReLU, convolution, output


def test_writing_in_place_is_followed() -> None:
    agree(InPlace(), torch.randn(2, 3, 4, 4))


def test_writing_into_all_of_a_tensor_by_its_slice_is_followed() -> None:
    """As MViTv2 adds its position biases."""

    class Whole(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            doubled = images * 2
            doubled[:, :, 0:] = doubled[:, :, 0:] + 1
            return doubled

    images = torch.randn(2, 3, 4, 4)
    agree(Whole(), images)
    trace(Whole(), images)(images.requires_grad_()).sum().backward()
    assert images.grad is not None


class Branches(nn.Module):
    """A sum of branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = sum(branch(x) for branch in self.branches)
        return out


def normed(layer: nn.Module, channels: int = 8) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(channels))


def convolutions(graph: fx.GraphModule) -> list[nn.Conv2d]:
    return [module for module in graph.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_parallel_branches_become_the_one_convolution_they_add_up_to(groups: int) -> None:
    kernels = [nn.Conv2d(8, 8, size, padding=size // 2, groups=groups, bias=size == 1) for size in (1, 3, 5)]
    model = lively(Branches(nn.BatchNorm2d(8), *map(normed, kernels), kernels_of((3, 1), groups)))
    graph = agree(model, torch.randn(2, 8, 9, 9))
    (merged,) = convolutions(graph)
    assert merged.kernel_size == (5, 5)
    assert merged.groups == groups


def kernels_of(size: tuple[int, int], groups: int) -> nn.Module:
    return normed(nn.Conv2d(8, 8, size, padding=(size[0] // 2, size[1] // 2), groups=groups))


APART = {
    "strides": (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)),
    "off centre": (nn.Conv2d(8, 8, 1, padding=1), nn.Conv2d(8, 8, 3, padding=2)),
    "dilated": (nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, padding=1)),
    "reflecting": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 1)),
    "activated": (nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.parametrize("name", sorted(APART))
def test_branches_that_are_no_single_convolution_stay_apart(name: str) -> None:
    assert len(convolutions(agree(Branches(*APART[name]), torch.randn(2, 8, 9, 9)))) == 2


def test_a_residual_addition_is_no_parallel_branch() -> None:
    assert len(convolutions(agree(lively(Residual(5)), torch.randn(2, 3, 16, 16)))) == 6


def test_a_tensor_that_someone_else_reads_is_not_merged_away() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = self.small(x)
            out: torch.Tensor = (small + self.large(x)) * small
            return out

    assert len(convolutions(agree(Shared(), torch.randn(2, 8, 9, 9)))) == 2


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (9, 12), (4, 20)])
@pytest.mark.parametrize("shift", [0, 3])
def test_windowed_attention_equals_torchvisions_with_its_layers_called(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    attention = ShiftedWindowAttention(24, [7, 7], [shift, shift], 3).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)  # sharp attention: a mask off by one would show
    values = torch.randn(2, *size, 24)
    graph = trace(nn.Sequential(attention), values)
    with torch.no_grad():
        assert torch.allclose(graph(values), attention(values), atol=1e-4)
    assert {str(node.target) for node in graph.graph.nodes if node.op == "call_module"} == {"0.qkv", "0.proj"}


def test_outputs_that_are_not_finite_are_compared_as_they_are() -> None:
    class Root(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)).sqrt()

    images = torch.rand(2, 3, 8, 8)
    assert trace(Root(), images)(images).equal(Root()(images))


def test_a_forward_that_branches_on_values_is_refused_in_a_sentence() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        ModelError,
        match=r"Branching: its forward cannot be one graph \(.*test_trace.py, line \d+: return x if x.sum\(\) > 0 else -x\): .* write it without branches",
    ):
        trace(Branching(), torch.zeros(1, 3, 4, 4))


class Scaled(nn.Module):
    """A layer scale that its forward shapes, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.first(images)
        features = features + self.second(features) * self.gamma.reshape(1, -1, 1, 1)
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def test_a_scale_that_the_forward_shapes_is_trained_and_can_be_moved_and_deployed() -> None:
    images = torch.randn(4, 3, 16, 16)
    prepared = place_(prepare(Scaled(), TARGETS["cpu_vnni"], images[:1]), torch.device("cpu"))
    scale = next(part for part in prepared.parameters() if part.shape == (1, 8, 1, 1))
    set_ranges_(prepared, collect(prepared, [images]), "minmax")
    prepared(images).sum().backward()
    assert scale.grad is not None
    assert torch.isfinite(deploy(prepared)(images)).all()


class _Lying(nn.Module):
    """Gives another second output where it is recorded."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = images.mean((2, 3))
        return first, 2 * first if torch.compiler.is_exporting() else first


def test_every_output_of_a_graph_is_compared() -> None:
    with pytest.raises(ModelError, match="its graph gives other outputs than its forward"):
        trace(_Lying(), torch.randn(1, 3, 8, 8))
