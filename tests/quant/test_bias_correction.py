"""Corrected biases against means measured by hand, on networks whose rounding shifts them."""

import copy

import pytest
import torch
from networks import Mobile, lively
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.quant.bias_correction import FEWEST, IMAGES, PIXELS, corrected, float_means, images_to_correct_with
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, prepare
from export.onnx_file.targets import TARGETS

IMAGES_SEEN = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def shifted() -> nn.Module:
    """Return a network with depthwise layers, one large weight in each channel of which leaves the others a coarse grid."""
    network = lively(Mobile(4))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            with torch.no_grad():
                layer.weight[:, 0, 0, 0] = 40 * layer.weight.abs().amax((1, 2, 3))
    return network


def calibrated(network: nn.Module, target: str = "cpu_vnni", keep_float: tuple[str, ...] = ()) -> fx.GraphModule:
    prepared = prepare(network, TARGETS[target], IMAGES_SEEN[:1], keep_float=keep_float)
    calibrate_(prepared, [IMAGES_SEEN], "minmax")
    return prepared


def divergence(logits: Tensor, wanted: Tensor) -> float:
    return float(F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("target", ["cpu_vnni", "cpu_avx2", "cpu_arm"])
@torch.no_grad()
def test_the_outputs_are_nearer_to_the_float_networks(target: str) -> None:
    network = shifted().eval()
    unseen = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prepared = calibrated(network, target)
    mended = corrected(prepared, IMAGES_SEEN)
    wanted = network(unseen)
    before, after = (divergence(file(unseen), wanted) for file in (deploy(prepared), deploy(mended)))
    assert after < 0.7 * before


@torch.no_grad()
def test_every_layer_is_corrected_and_a_second_time_there_is_nothing_left_to_correct() -> None:
    prepared = calibrated(shifted())
    wanted = float_means(prepared, IMAGES_SEEN)
    again = float_means(corrected(prepared, IMAGES_SEEN, wanted), IMAGES_SEEN)
    assert wanted.keys() == {
        name for name, layer in prepared.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    assert any(
        not torch.allclose(again[name], wanted[name], atol=1e-3) for name in wanted
    )  # there was something to correct
    twice = corrected(corrected(prepared, IMAGES_SEEN, wanted), IMAGES_SEEN, wanted)
    once = corrected(prepared, IMAGES_SEEN, wanted)
    for (name, one), two in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-4), name


@torch.no_grad()
def test_the_network_itself_stays_as_it_is() -> None:
    prepared = calibrated(shifted())
    before, modes = copy.deepcopy(prepared.state_dict()), [part.training for part in prepared.modules()]
    corrected(prepared, IMAGES_SEEN)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert [part.training for part in prepared.modules()] == modes


@pytest.mark.parametrize("last", [nn.Linear(8, 5), nn.Linear(8, 5, bias=False)])
@torch.no_grad()
def test_layers_without_bias_and_norms_without_weights_are_corrected(last: nn.Linear) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), last,
    ).eval()  # fmt: skip
    network.get_buffer("1.running_var").uniform_(0.2, 4)
    network.get_parameter("0.weight")[:, 0, 0, 0] = 50
    prepared = calibrated(network)
    wanted = float_means(prepared, IMAGES_SEEN)
    mended = corrected(prepared, IMAGES_SEEN, wanted)
    logits, float_logits = deploy(mended)(IMAGES_SEEN), network(IMAGES_SEEN)
    assert torch.allclose(logits.mean(0), float_logits.mean(0), atol=0.02 * float(float_logits.std()))
    off = deploy(prepared)(IMAGES_SEEN)
    assert (off.mean(0) - float_logits.mean(0)).norm() > 3 * (logits.mean(0) - float_logits.mean(0)).norm()


@torch.no_grad()
def test_a_layer_kept_in_float_makes_up_for_what_was_rounded_before_it() -> None:
    network = shifted().eval()
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    prepared = calibrated(network, keep_float=(names[-1],))
    mended = corrected(prepared, IMAGES_SEEN)
    bias = f"{names[-1]}.bias"
    assert not torch.equal(mended.state_dict()[bias], prepared.state_dict()[bias])


def test_large_images_are_fewer() -> None:
    assert len(images_to_correct_with([torch.zeros(40, 3, 8, 8)] * 3)) == IMAGES
    side = int((PIXELS / 16) ** 0.5)
    assert len(images_to_correct_with([torch.zeros(10, 1, side, side)] * 3)) == 16
    assert len(images_to_correct_with([torch.zeros(10, 1, 4 * side, 4 * side)])) == FEWEST
    assert len(images_to_correct_with([torch.zeros(3, 3, 8, 8)])) == 3
