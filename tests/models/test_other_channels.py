"""Networks for images of other channels and of sizes that are no squares."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.recognize import recognize
from compress.models.saved import Architecture, load_float, read_architecture, save_network
from compress.models.structure import check_output, classifier, count
from compress.models.weights import load_weights_

FACTORY = """
from torch import nn
def {name}(num_classes{argument}):
    return nn.Sequential(nn.Conv2d({channels}, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("arch", "output"),
    [
        ("torchvision:mobilenet_v3_small", (5,)), ("torchvision:googlenet", (5,)), ("timm:resnet10t", (5,)), ("cifar:resnet8", (5,)),
        ("fpn:resnet18", (5, 64, 96)), ("smp:unet/resnet18", (5, 64, 96)), ("ssdlite:mobilenet_v3_small", (None, 15)),
        ("retinanet:resnet18", (None, 15)), ("timm:test_vit", (5,)),
    ],
)  # fmt: skip
def test_every_library_builds_for_the_channels_and_the_size(
    arch: str, output: tuple[int | None, ...], channels: int
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    shape = (channels, 64, 96)
    model = build(arch, num_classes=5, shape=shape)
    check_output(model, shape, output=output)
    assert count(model, shape).macs > 0
    assert classifier(model)


def test_a_person_s_factory_gets_to_know_the_channels_where_it_asks(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(FACTORY.format(name="asks", argument=", channels=3", channels="channels"))
    (tmp_path / "grey.py").write_text(FACTORY.format(name="grey", argument="", channels=1))
    for name in ("asks", "grey"):
        model = build(f"{tmp_path / name}.py:{name}", num_classes=3, shape=(1, 20, 30), trust_code=True)
        check_output(model, (1, 20, 30), output=(3,))
    with pytest.raises(ModelError, match="does not take images of 20 x 30 with 4 channels"):
        check_output(model, (4, 20, 30), output=(3,))


def test_a_network_that_takes_squares_alone_says_so() -> None:
    with pytest.raises(
        ModelError, match=r"vit_b_16: cannot be built for 64 x 96 pixels .it takes squares.; choose another"
    ):
        build("torchvision:vit_b_16", num_classes=3, shape=(3, 64, 96))


def test_weights_for_other_channels_are_refused(tmp_path: Path) -> None:
    save_file(build("cifar:resnet8", num_classes=5).state_dict(), tmp_path / "colours.safetensors")
    grey = build("cifar:resnet8", num_classes=5, shape=(1, 32, 32))
    with pytest.raises(
        ModelError,
        match=r"is for images of 3 channels, the data have 1: give weights of such images, or set data.channels: 3",
    ):
        load_weights_(grey, "cifar:resnet8", str(tmp_path / "colours.safetensors"), reset_head=False)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 24, 40), (4, 32, 32)])
def test_a_saved_network_is_built_for_the_same_images(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    model = build("cifar:resnet8", num_classes=5, shape=shape)
    save_network(model, Architecture("cifar:resnet8", 5, shape), tmp_path)
    assert read_architecture(tmp_path).shape == shape
    images = torch.randn(2, *shape)
    assert torch.equal(load_float(tmp_path, trust_code=False)(images), model(images))
    says = (tmp_path / "architecture.json").read_text()
    assert ("channels" in says) == (shape[0] != 3)  # as files of older versions, byte for byte
    assert list(json.loads(says))[:3] == ["arch", "num_classes", "image_size"]


def test_a_checkpoint_tells_its_channels() -> None:
    state = build("torchvision:mobilenet_v2", num_classes=7, shape=(4, 64, 64)).state_dict()
    found = recognize(dict(reversed(state.items())))  # its depthwise weights have one channel
    assert ("torchvision:mobilenet_v2", 7, 4) in [match[:3] for match in found]
