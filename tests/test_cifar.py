"""The networks and recipes of the published comparisons: sizes and layers as published, the papers' protocol, and a run on a stand-in."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as downloads
from networks import lively
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import ModelError
from compress.models.architectures import build
from compress.models.digest import LIBRARIES as KNOWN
from compress.models.weights import load_weights_
from compress.pipeline import run_recipe
from compress.recipe import Fit, Recipe
from compress.recipe_file import read_recipe
from compress.train import learning_rate

RECIPES = Path(__file__).parent.parent / "recipes"
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# In millions, for 100 classes: HobbitLong/RepDistiller's networks as the papers print them.
PUBLISHED = {
    "resnet20": 0.28,
    "resnet56": 0.86,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_2": 0.70,
    "wrn_40_2": 2.26,
}


# Networks


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_the_published_number_of_parameters(name: str) -> None:
    model = build(f"cifar:{name}", num_classes=100)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == PUBLISHED[name]


def norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias)


def resnet(state: Mapping[str, Tensor], blocks: int, images: Tensor) -> Tensor:
    """Compute the answer from weights under the published names."""
    x = norm(state, "bn1", F.conv2d(images, state["conv1.weight"], padding=1)).relu()
    for stage, index in ((stage, index) for stage in (1, 2, 3) for index in range(blocks)):
        at, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
        y = norm(state, f"{at}.bn1", F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)).relu()
        y = norm(state, f"{at}.bn2", F.conv2d(y, state[f"{at}.conv2.weight"], padding=1))
        if f"{at}.downsample.0.weight" in state:
            x = norm(state, f"{at}.downsample.1", F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride))
        x = (x + y).relu()
    return F.avg_pool2d(x, 8).flatten(1) @ state["fc.weight"].T + state["fc.bias"]


def wide_resnet(state: Mapping[str, Tensor], blocks: int, images: Tensor) -> Tensor:
    """Compute the answer from weights under the published names."""
    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for stage, index in ((stage, index) for stage in (1, 2, 3) for index in range(blocks)):
        at, stride = f"block{stage}.layer.{index}", 2 if stage > 1 and index == 0 else 1
        before = norm(state, f"{at}.bn1", x).relu()
        y = norm(state, f"{at}.bn2", F.conv2d(before, state[f"{at}.conv1.weight"], stride=stride, padding=1)).relu()
        if f"{at}.convShortcut.weight" in state:
            x = F.conv2d(before, state[f"{at}.convShortcut.weight"], stride=stride)
        x = x + F.conv2d(y, state[f"{at}.conv2.weight"], padding=1)
    x = F.avg_pool2d(norm(state, "bn1", x).relu(), 8).flatten(1)
    return x @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(
    ("name", "blocks", "projections"),
    [("resnet20", 3, 2), ("resnet8x4", 1, 3), ("resnet32x4", 5, 3), ("wrn_16_2", 2, 3), ("wrn_40_1", 6, 2)],
)
@torch.no_grad()
def test_a_network_computes_what_the_published_names_say(name: str, blocks: int, projections: int) -> None:
    model = lively(build(f"cifar:{name}", num_classes=7))
    state = model.state_dict()
    shortcuts = [key for key in state if key.endswith(("downsample.0.weight", "convShortcut.weight"))]
    assert len(shortcuts) == projections
    expected = (wide_resnet if name.startswith("wrn") else resnet)(state, blocks, IMAGES)
    assert torch.allclose(model(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_as_the_authors_save_them_is_read(tmp_path: Path) -> None:
    teacher, model = (build("cifar:wrn_16_2", num_classes=100) for _ in range(2))
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    content = {"epoch": 240, "model": teacher.state_dict(), "accuracy": torch.tensor(75.6), "optimizer": optimizer.state_dict()}  # fmt: skip
    torch.save(content, tmp_path / "ckpt_epoch_240.pth")
    load_weights_(model, "cifar:wrn_16_2", str(tmp_path / "ckpt_epoch_240.pth"), reset_head=False)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters(), strict=True))


def test_an_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="^cifar:resnet65: there is no network for CIFAR of this name; did you mean resnet56"):
        build("cifar:resnet65", num_classes=10)
    with pytest.raises(ModelError, match="cifar:best: the weights file does not exist"):
        load_weights_(build("cifar:resnet8", num_classes=2), "cifar:resnet8", "cifar:best", reset_head=False)
    assert "cifar" in KNOWN


# Protocols


def recipe(name: str, *overrides: str) -> Recipe:
    return read_recipe(RECIPES / f"{name}.yaml", overrides, data="/data")


def trainings(name: str) -> list[Fit]:
    stages = [section for section in recipe(name).stages if section.stage in ("source", "distill")]
    return [section.fit for section in stages if section.fit is not None]  # type: ignore[union-attr]


def rates(fit: Fit) -> list[float]:
    """Return the rate in the first, the last and every changing epoch, without repetition."""
    return list(dict.fromkeys(round(learning_rate(fit, epoch * 10 + 5, 10), 12) for epoch in range(fit.epochs)))


PROTOCOLS = {
    "cifar10/resnet56_2_11x": [(200, 128, [0.1, 0.01, 0.001, 1e-4], 5e-4), (100, 128, [0.01, 0.001, 1e-4], 5e-4)],
    "cifar10/resnet56_2_55x": [(200, 128, [0.1, 0.01, 0.001, 1e-4], 5e-4), (100, 128, [0.01, 0.001, 1e-4], 5e-4)],
    "imagenet/resnet50_2gmacs": [(90, 256, [0.01, 0.001, 1e-4], 1e-4)],
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_recipe_trains_by_its_papers_protocol(name: str) -> None:
    found = [(fit.epochs, fit.batch_size, rates(fit), fit.weight_decay) for fit in trainings(name)]
    assert found == PROTOCOLS[name]
    assert all(not fit.nesterov and fit.decay_vectors and fit.momentum == 0.9 for fit in trainings(name))


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith("cifar")])
def test_the_images_of_cifar_move_by_four_pixels(name: str) -> None:
    augment = recipe(name).data.augment
    assert (augment.crop, 32 * augment.pad, augment.flip, augment.mixup, augment.cutmix) == ("pad", 4, True, 0, 0)


@pytest.mark.parametrize(("name", "factor"), [("cifar10/resnet56_2_11x", 2.11), ("cifar10/resnet56_2_55x", 2.55), ("imagenet/resnet50_2gmacs", 4.089 / 2)])  # fmt: skip
def test_a_pruning_recipe_leaves_what_the_paper_left(name: str, factor: float) -> None:
    (section,) = (section for section in recipe(name).stages if section.stage == "prune")
    assert section.keep_macs == pytest.approx(1 / factor, rel=2e-3)


# Data


def test_a_plan_says_in_one_sentence_that_cifar_is_not_there(tmp_path: Path) -> None:
    file = str(RECIPES / "cifar10" / "resnet56_2_11x.yaml")
    absent = CliRunner().invoke(app, ["plan", file, "--data", str(tmp_path)])
    assert absent.exit_code == 0
    assert absent.stderr.splitlines() == [
        f"cifar10: is not in {tmp_path}; a run downloads it there, or give its folder: DATA=/path/to/it"
    ]
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert CliRunner().invoke(app, ["plan", file, "--data", str(tmp_path)]).stderr == ""


def test_a_plan_says_in_one_sentence_that_imagenet_is_not_there() -> None:
    found = CliRunner().invoke(app, ["plan", str(RECIPES / "imagenet" / "resnet50_2gmacs.yaml"), "--data", "/nowhere"])
    assert isinstance(found.exception, SystemExit)
    assert (found.exit_code, found.stderr.splitlines()) == (
        2,
        ["/nowhere: there is no such folder; give DATA=/path/to/images"],
    )


def write_cifar10(root: Path, per_class: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a small CIFAR-10 in CIFAR's own files: ten colours with noise; the archive's digests are told to be those of the stand-in."""
    folder, random = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    digests = {}
    for file in ("data_batch_1", "test_batch", "batches.meta"):
        labels = np.arange(10 * per_class) % 10
        colours = np.stack([labels * 25, 225 - labels * 25, (labels * 75) % 250], 1)[:, :, None]
        pixels = np.clip(colours + random.normal(0, 20, (len(labels), 3, 1024)), 0, 255).astype(np.uint8)
        batch = {"data": pixels.reshape(len(labels), 3072), "labels": labels.tolist()}
        names = {"label_names": [f"colour{label}" for label in range(10)]}
        content = pickle.dumps(names if file == "batches.meta" else batch)
        (folder / file).write_bytes(content)
        digests[file] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(downloads.CIFAR10, "train_list", [["data_batch_1", digests["data_batch_1"]]])
    monkeypatch.setattr(downloads.CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    monkeypatch.setattr(downloads.CIFAR10, "meta", meta)


def one_epoch(path: str) -> list[str]:
    """Return the overrides that leave one epoch of a training."""
    return [f"{path}.epochs=1", f"{path}.schedule=cosine", f"{path}.milestones=[]"]


def test_a_published_recipe_prunes_and_distills_on_a_stand_in_for_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "cifar", 4, monkeypatch)
    overrides = [line for path in ("source.fit", "prune.sparsity.fit", "distill.fit") for line in one_epoch(path)]
    name = "cifar10/resnet56_2_11x"
    short = read_recipe(RECIPES / f"{name}.yaml", overrides, data=str(tmp_path / "cifar"), out=str(tmp_path))
    assert run_recipe(short, trust_code=False, until="distill", verbose=False, command="") == 0
    report = json.loads((tmp_path / short.name / "report.json").read_text())
    metrics = {row["stage"]: row["metrics"] for row in report["stages"]}
    assert 0.46 < metrics["distill"]["macs_m"] / metrics["source"]["macs_m"] <= 0.474
