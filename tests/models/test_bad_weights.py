import argparse
import os
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from networks import boxes
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.weights import load_weights_

State = dict[str, Tensor]


class Net(nn.Module):
    """A convolution, a batch-norm and a head."""

    def __init__(self, *, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.bn(self.conv(images)).mean((2, 3)))
        return logits


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def state(*, classes: int = 10, width: int = 8) -> State:
    return {key: value + 1 for key, value in Net(classes=classes, width=width).state_dict().items()}


def lraspp(classes: int) -> nn.Module:
    return build("torchvision:lraspp_mobilenet_v3_large", num_classes=classes)


def saved(file: Path, content: object) -> str:
    torch.save(content, file)
    return str(file)


def load(weights: str, *, reset_head: bool = False, model: nn.Module | None = None) -> nn.Module:
    model = Net() if model is None else model
    load_weights_(model, "net.py:Net", weights, reset_head=reset_head)
    return model


def same(model: nn.Module, expected: State) -> bool:
    own = model.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)


# What is understood

WRAPPINGS: dict[str, Callable[[State], object]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"param_groups": []}},
    "ema": lambda s: {"model_ema": {"n_averaged": torch.tensor(7)} | {f"module.{key}": s[key] for key in s}},
    "parallel": lambda s: {f"module.{key}": s[key] for key in s},
    "compiled and parallel": lambda s: {"state_dict": {f"module._orig_mod.{key}": s[key] for key in s}},
    "lightning": lambda s: {
        "state_dict": {f"model.{key}": s[key] for key in s} | {"criterion.weight": torch.ones(10)},
        "pytorch-lightning_version": "2",
        "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(lr=0.1, out=Path("out"))},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "scores": np.ones(3)}},
    },
    "lightning, wrapped twice": lambda s: {
        "state_dict": {f"model.backbone.{key}": s[key] for key in s} | {"teacher.conv.weight": torch.ones(1)},
        "hparams": argparse.Namespace(lr=0.1),
    },
    "a loss with weights": lambda s: {
        "state_dict": s | {"criterion.weight": torch.ones(10), "loss_fn.pos": torch.ones(1)}
    },
    "network and its average": lambda s: {
        f"{prefix}.{key}": s[key] + (prefix == "ema") for prefix in ("net", "ema") for key in s
    },
    "settings and scores": lambda s: {
        "model": s,
        "args": argparse.Namespace(lr=0.1, data=Path("/data"), counts=defaultdict(float, a=1.0)),
        "best": np.float64(0.93),
    },
    "without counters": lambda s: {key: s[key] for key in s if "num_batches" not in key},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_a_checkpoint_is_understood(tmp_path: Path, wrap: Callable[[State], object], zipped: bool) -> None:
    expected = state() | {"bn.num_batches_tracked": torch.tensor(0)}
    torch.save(wrap(expected), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    assert same(load(str(tmp_path / "net.pth")), expected)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "pth.tar"])
def test_torch_files_are_known_by_their_usual_names(tmp_path: Path, suffix: str) -> None:
    expected = state()
    assert same(load(saved(tmp_path / f"net.{suffix}", expected)), expected)


def test_lightnings_own_mapping_of_settings_is_read_without_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ModuleType("pytorch_lightning.utilities.parsing")
    exec("class AttributeDict(dict):\n    def __setstate__(self, state): raise SystemExit", vars(library))
    with monkeypatch.context() as there:
        for name in ("pytorch_lightning", "pytorch_lightning.utilities"):
            there.setitem(sys.modules, name, ModuleType(name))
        there.setitem(sys.modules, library.__name__, library)
        file = saved(tmp_path / "net.ckpt", {"state_dict": state(), "hparams": library.AttributeDict(lr=0.1)})
    assert load(file).state_dict()["fc.bias"].shape == (10,)


def test_a_prefix_that_hides_a_part_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    wrapped = {f"backbone.{key}": value for key, value in state().items() if not key.startswith("fc.")}
    with pytest.raises(ModelError, match=r"2 missing \(fc\.weight, fc\.bias\)"):
        load(saved(tmp_path / "net.ckpt", {"state_dict": wrapped | {"head.weight": torch.ones(1)}}))


def test_safetensors_are_understood(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "net.safetensors")
    assert load(str(tmp_path / "net.safetensors")).state_dict()["conv.weight"].isfinite().all()


def test_half_precision_weights_become_the_networks_own(tmp_path: Path) -> None:
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state().items()}
    loaded = load(saved(tmp_path / "net.pt", halves)).state_dict()
    assert torch.equal(loaded["conv.weight"], halves["conv.weight"].float())


def test_auxiliary_heads_of_published_weights_are_left_out(tmp_path: Path) -> None:
    model = build("torchvision:googlenet", num_classes=10)
    own = {key: value + 1 for key, value in model.state_dict().items()}
    published = own | {"aux1.conv.conv.weight": torch.ones(1), "aux2.fc1.bias": torch.ones(1)}
    load_weights_(model, "torchvision:googlenet", saved(tmp_path / "googlenet.pth", published), reset_head=False)
    assert same(model, own)


def test_the_old_names_in_published_densenet_weights_are_understood(tmp_path: Path) -> None:
    model = build("torchvision:densenet121", num_classes=10)
    own = {key: value + 1 for key, value in model.state_dict().items()}
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value for key, value in own.items()}
    assert old.keys() != own.keys()
    load_weights_(model, "torchvision:densenet121", saved(tmp_path / "densenet.pth", old), reset_head=False)
    assert same(model, own)


# The classifier


def test_another_number_of_classes_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"net\.pth: has 1,000 classes, the data need 10; .*reset_head: true"):
        load(saved(tmp_path / "net.pth", state(classes=1000)))


@pytest.mark.parametrize("classes", [10, 1000])
def test_reset_head_keeps_the_heads_random_start_and_loads_all_else(tmp_path: Path, classes: int) -> None:
    given, model = state(classes=classes), Net()
    head = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("fc.")}
    load(saved(tmp_path / "net.pth", given), reset_head=True, model=model)
    assert same(model, given | head)


@pytest.mark.parametrize(
    ("network", "layer"),
    [(boxes, "head.classification_head.module_list.0"), (lraspp, "classifier.low_classifier")],
)
def test_every_head_of_other_classes_is_named_and_reset(
    network: Callable[[int], nn.Module], layer: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    given, model = network(20).state_dict(), network(3)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    weights = saved(tmp_path / "net.pth", given)
    with pytest.raises(ModelError, match=rf"has \d+ outputs in {layer}, the data need \d+; .*reset_head: true"):
        load(weights, model=model)
    load(weights, reset_head=True, model=model)
    kept = {key for key, value in given.items() if value.shape != own[key].shape}
    assert len(kept) == 4
    for key, value in model.state_dict().items():
        assert torch.equal(value, (own if key in kept else given)[key]), key


# What does not fit


def test_weights_of_another_architecture_are_refused_with_the_keys_listed(tmp_path: Path) -> None:
    other = saved(tmp_path / "resnet18.pth", build("torchvision:resnet18", num_classes=10).state_dict())
    with pytest.raises(ModelError) as caught:
        load(other)
    message = str(caught.value)
    assert "resnet18.pth: does not fit net.py:Net: 5 missing (conv.weight, bn.weight, " in message
    assert "120 unexpected (conv1.weight, bn1.weight, " in message
    assert "and 112 more" in message
    assert "of another shape (fc.weight (10, 512), needs (10, 8))" in message


def test_weights_of_another_width_are_refused_with_both_shapes(tmp_path: Path) -> None:
    for reset_head in (False, True):
        with pytest.raises(ModelError, match=r"of another shape \(conv.weight \(16, 3, 3, 3\), needs \(8, 3, 3, 3\)"):
            load(saved(tmp_path / "net.pth", state(width=16)), reset_head=reset_head)


def test_reset_head_does_not_hide_a_missing_body(tmp_path: Path) -> None:
    part = {key: value for key, value in state().items() if key != "conv.weight"}
    with pytest.raises(ModelError, match=r"1 missing \(conv.weight\)"):
        load(saved(tmp_path / "net.pth", part), reset_head=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    bad = state()
    bad["bn.running_var"][3] = value
    with pytest.raises(ModelError, match=r"1 not finite \(bn.running_var\); .*earlier checkpoint"):
        load(saved(tmp_path / "net.pth", bad))


# Files that are not weights


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "optimizer"])
def test_a_pickle_that_runs_code_is_refused_and_its_code_never_run(tmp_path: Path, zipped: bool, key: str) -> None:
    evil = {"model": state(), key: Runs(tmp_path / "ran")}
    torch.save(evil, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModelError, match=r"evil\.pth: needs code to be read \(posix\.system\).*was not run; save model"
    ):
        load(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_the_pickle_of_these_tests_would_run_its_code(tmp_path: Path) -> None:
    torch.save(Runs(tmp_path / "ran"), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_plain_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(ModelError, match=r"evil\.pth"):
        load(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [Net(), {"model": state(), "loss": nn.CrossEntropyLoss()}, {"a": {Net(): 1}}])
def test_objects_with_code_are_refused_with_the_way_out(tmp_path: Path, content: object) -> None:
    with pytest.raises(ModelError, match=r"needs code to be read \(\S+\).*save model\.state_dict\(\) alone"):
        load(saved(tmp_path / "net.pth", content))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_program_is_called_what_it_is(tmp_path: Path) -> None:
    torch.jit.trace(Net().eval(), torch.ones(1, 3, 8, 8)).save(str(tmp_path / "net.pt"))
    with pytest.raises(ModelError, match=r"net\.pt: is a TorchScript program, not weights, .*state_dict\(\)") as caught:
        load(str(tmp_path / "net.pt"))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_whole_numbers_in_place_of_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    converted = state() | {"conv.weight": torch.ones(8, 3, 3, 3, dtype=dtype)}
    with pytest.raises(ModelError, match=rf"1 not float \(conv\.weight {str(dtype)[6:]}\); give the float weights"):
        load(saved(tmp_path / "net.pth", converted))


@pytest.mark.parametrize("zipped", [True, False])
def test_torchs_advice_to_run_the_code_is_never_passed_on(tmp_path: Path, zipped: bool) -> None:
    for number, content in enumerate([Net(), {"a": {1: Net}}, [Net.forward], {"x": print}]):
        torch.save(content, tmp_path / f"{number}.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ModelError) as caught:
            load(str(tmp_path / f"{number}.pth"))
        assert not re.search("weights_only|add_safe_globals|trust", str(caught.value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors_are_refused(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "net.safetensors"
    save_file(state(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"net\.safetensors: is not a complete safetensors file"):
        load(str(file))


@pytest.mark.parametrize("claimed", [2**31, 2**63 - 1])
def test_a_safetensors_header_that_claims_gigabytes_is_refused(tmp_path: Path, claimed: int) -> None:
    file = tmp_path / "net.safetensors"
    file.write_bytes(claimed.to_bytes(8, "little") + b'{"conv.weight": {}}')
    with pytest.raises(ModelError, match=r"net\.safetensors: is not a complete safetensors file"):
        load(str(file))


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, -100])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, zipped: bool, kept: int) -> None:
    file = tmp_path / "net.pth"
    torch.save(state(), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"net\.pth: is not a"):
        load(str(file))


@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html><html></html>", "version https://git-lfs.github.com/spec/v1\n", "hello"]
)
def test_a_text_in_place_of_weights_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "net.pth").write_text(text)
    with pytest.raises(ModelError, match=r"net\.pth: is not a .*torch file"):
        load(str(tmp_path / "net.pth"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "loss": 0.1}, r"holds no state dict \(epoch, loss\)"),
        ([torch.ones(2)], "holds a list"),
        ({}, "empty"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object, found: str) -> None:
    with pytest.raises(ModelError, match=found):
        load(saved(tmp_path / "net.pth", content))


def test_a_missing_file_is_named_with_one_that_looks_like_it(tmp_path: Path) -> None:
    (tmp_path / "resnet50.pth").touch()
    with pytest.raises(
        ModelError, match=r"resnet05\.pth: the weights file does not exist; did you mean \S+/resnet50\.pth"
    ):
        load(str(tmp_path / "resnet05.pth"))


def test_a_folder_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder; give the file inside it"):
        load(str(tmp_path))


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    with pytest.raises(
        ModelError, match=r"\.onnx is not known; give a \.safetensors, \.pt, \.pth, \.ckpt, \.bin or \.tar file"
    ):
        load(str(tmp_path / "net.onnx"))


# Weights by name


def test_an_unknown_tag_is_refused_with_the_nearest() -> None:
    model = build("torchvision:resnet18", num_classes=10)
    with pytest.raises(ModelError, match="IMAGENET1K_V2: resnet18 has no such weights; did you mean IMAGENET1K_V1"):
        load_weights_(model, "torchvision:resnet18", "torchvision:IMAGENET1K_V2", reset_head=False)


def test_an_unknown_timm_tag_is_refused_with_the_nearest() -> None:
    model = build("timm:resnet10t", num_classes=10)
    with pytest.raises(ModelError, match="timm:c3_in2k: resnet10t has no such weights; did you mean c3_in1k"):
        load_weights_(model, "timm:resnet10t", "timm:c3_in2k", reset_head=False)


def test_another_librarys_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="are torchvision's weights, but the network is net"):
        load("torchvision:IMAGENET1K_V1")


def test_a_refused_download_names_the_file_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = build("torchvision:squeezenet1_1", num_classes=10)
    with pytest.raises(ModelError, match=r"not known\); download https://download\.pytorch\.org/\S+ .*WEIGHTS="):
        load_weights_(model, "torchvision:squeezenet1_1", "torchvision:IMAGENET1K_V1", reset_head=False)


def test_a_refused_timm_download_names_the_file_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("timm:resnet10t", num_classes=10)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(
        ModelError, match=r"download model\.safetensors of https://huggingface\.co/timm/resnet10t\.c3_in1k"
    ):
        load_weights_(model, "timm:resnet10t", "timm:c3_in1k", reset_head=False)


def test_downloaded_weights_are_read_as_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    model = build("torchvision:squeezenet1_1", num_classes=1000)

    def download(url: str, **options: object) -> State:
        asked.update(options)
        return model.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    load_weights_(model, "torchvision:squeezenet1_1", "torchvision:IMAGENET1K_V1", reset_head=False)
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True
