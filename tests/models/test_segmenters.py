"""Segmentation networks: built by name, and through pruning, INT8 and ONNX Runtime."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lively
from planning import cuts_to

from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.structure import classifier, count
from compress.models.weights import load_weights_
from compress.pruning.plan import cut_
from compress.quant.calibrate import calibrate_
from compress.quant.prepare import deploy, float_on_purpose, prepare
from compress.recipe.schema import Model
from export.onnx_file.targets import TARGETS
from export.onnx_file.to_onnx import to_onnx
from export.proof.audit import audit
from export.runtime.session import open_session

SIZE = 32
IMAGES = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arch", "last"),
    [
        pytest.param("fpn:resnet18", [], marks=pytest.mark.acceptance),
        ("smp:unet/resnet18", ["segmentation_head.0"]),
        pytest.param("smp:fpn/tu-resnet10t", [], marks=pytest.mark.acceptance),
    ],
)
def test_a_network_is_pruned_and_convolves_in_integers_but_for_its_output(
    arch: str, last: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = lively(build(arch, num_classes=5))
    full = count(model, (3, SIZE, SIZE)).macs
    assert model(IMAGES).shape == (4, 5, SIZE, SIZE)
    cut_(model, IMAGES, cuts_to(model, 0.6, SIZE, exclude=(classifier(model),)))
    assert count(model, (3, SIZE, SIZE)).macs <= 0.6 * full
    prepared = prepare(model, TARGETS["cpu_avx2"], IMAGES)
    calibrate_(prepared, [IMAGES], "minmax")
    to_onnx(deploy(prepared), tmp_path / "int8.onnx", shape=(3, SIZE, SIZE), metadata={})
    found = audit(tmp_path / "int8.onnx")
    assert len(found["integer_layers"]) > 15
    assert found["float_layers"] == last
    assert [float_on_purpose(prepared)[name] for name in last] == ["its output leaves the network"] * len(last)
    with torch.no_grad():
        expected = prepared(IMAGES).argmax(1).numpy()
    (logits,) = open_session(tmp_path / "int8.onnx").run(None, {"input": IMAGES.numpy()})
    assert np.mean(logits.argmax(1) == expected) > 0.99


def test_names_are_known_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch in ("fpn:resnet50", "smp:unet/resnet18", "smp:fpn/tu-mobilenetv3_large_100"):
        assert Model(arch=arch).arch == arch
    with pytest.raises(ModelError, match=r"smp:unett: .*no decoder of this name; did you mean unet"):
        build("smp:unett/resnet18", num_classes=5)
    with pytest.raises(ModelError, match="smp:unet/resnet81: Wrong encoder name `resnet81`"):
        build("smp:unet/resnet81", num_classes=5)
    with pytest.raises(ModelError, match="fpn:resnet81: there is no backbone of this name; did you mean resnet18"):
        build("fpn:resnet81", num_classes=5)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ModelError, match=r"cannot be built .*pip install 'prune-distill-quantize\[smp\]'"):
        build("smp:unet/resnet18", num_classes=5)


def test_an_auxiliary_heads_weights_are_left_aside(tmp_path: Path) -> None:
    model = build("torchvision:lraspp_mobilenet_v3_large", num_classes=3)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(state | {"aux_classifier.0.weight": torch.zeros(3)}, tmp_path / "w.pth")
    load_weights_(model, "torchvision:lraspp_mobilenet_v3_large", str(tmp_path / "w.pth"), reset_head=False)
    assert torch.equal(model.state_dict()["classifier.cbr.0.weight"], state["classifier.cbr.0.weight"])
