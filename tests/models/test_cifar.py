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
from compress.data.teachers import FOREIGN
from compress.distillation.step import weight_of
from compress.errors import ModelError
from compress.models.architectures import LIBRARIES, build
from compress.models.known import LACKS
from compress.models.weights import load_weights_
from compress.pipeline import run_recipe
from compress.recipe.losses import DKDTerm
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.recipe.stages import Fit
from compress.training.loop import learning_rate

RECIPES = Path(__file__).parents[2] / "recipes"
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
    with pytest.raises(
        ModelError, match=r"^cifar:resnet65: there is no network for CIFAR of this name; did you mean resnet56"
    ):
        build("cifar:resnet65", num_classes=10)
    with pytest.raises(ModelError, match="cifar:best: the weights file does not exist"):
        load_weights_(build("cifar:resnet8", num_classes=2), "cifar:resnet8", "cifar:best", reset_head=False)


def test_the_digest_knows_every_library() -> None:
    assert {*LACKS, *FOREIGN} == set(LIBRARIES)


# Protocols


def recipe(name: str, *overrides: str) -> Recipe:
    return read_recipe(RECIPES / f"{name}.yaml", overrides, data="/data")


def trainings(name: str) -> list[Fit]:
    stages = [section for section in recipe(name).stages if section.stage in ("source", "distill")]
    return [section.fit for section in stages if section.fit is not None]


def rates(fit: Fit) -> dict[int, float]:
    """Return each rate by the first epoch that has it."""
    found = [learning_rate(fit, epoch * 10, 10) for epoch in range(fit.epochs)]
    return {epoch: rate for epoch, rate in enumerate(found) if epoch == 0 or rate != found[epoch - 1]}


CRD = (240, 64, {0: 0.05, 150: 0.005, 180: 5e-4, 210: 5e-5}, 5e-4)
DEPGRAPH = [
    (200, 128, {0: 0.1, 120: 0.01, 150: 0.001, 180: 1e-4}, 5e-4),
    (100, 128, {0: 0.01, 60: 0.001, 80: 1e-4}, 5e-4),
]
PROTOCOLS = {
    "cifar100/resnet56_resnet20": [CRD, CRD],
    "cifar100/resnet32x4_resnet8x4": [CRD, CRD],
    "cifar100/wrn40_2_wrn16_2": [CRD, CRD],
    "cifar10/resnet56_2_11x": DEPGRAPH,
    "cifar10/resnet56_2_55x": DEPGRAPH,
    "imagenet/resnet34_resnet18": [(100, 256, {0: 0.1, 30: 0.01, 60: 0.001, 90: 1e-4}, 1e-4)],
    "imagenet/resnet50_2gmacs": [(90, 256, {0: 0.01, 30: 0.001, 60: 1e-4}, 1e-4)],
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_recipe_trains_by_its_papers_protocol(name: str) -> None:
    for fit, (epochs, batch_size, by_epoch, weight_decay) in zip(trainings(name), PROTOCOLS[name], strict=True):
        assert (fit.epochs, fit.batch_size, fit.weight_decay) == (epochs, batch_size, weight_decay)
        assert rates(fit) == pytest.approx(by_epoch)
    assert all(not fit.nesterov and fit.decay_vectors and fit.momentum == 0.9 for fit in trainings(name))
    assert recipe(name).teaching.mode == "online"


@pytest.mark.parametrize(
    ("name", "beta"), [("resnet56_resnet20", 2), ("resnet32x4_resnet8x4", 8), ("wrn40_2_wrn16_2", 6)]
)
def test_dkd_has_its_authors_weights_for_each_pair(name: str, beta: float) -> None:
    (section,) = (section for section in recipe(f"cifar100/{name}").stages if section.stage == "distill")
    labels, dkd = section.loss
    assert isinstance(dkd, DKDTerm)
    assert (labels.name, labels.weight) == ("cross_entropy", 1)
    assert (dkd.weight, dkd.alpha, dkd.beta, dkd.temperature) == (1, 1, beta, 4)
    assert [weight_of(dkd, done) for done in (0, 10 / 240, 0.1, 0.9)] == pytest.approx([0, 0.5, 1, 1], abs=1e-3)


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
        f"cifar10: is not in {tmp_path}; a run downloads it, or give its folder: DATA=/path/to/it"
    ]
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert CliRunner().invoke(app, ["plan", file, "--data", str(tmp_path)]).stderr == ""


def test_a_plan_says_in_one_sentence_that_imagenet_is_not_there() -> None:
    found = CliRunner().invoke(app, ["plan", str(RECIPES / "imagenet" / "resnet50_2gmacs.yaml"), "--data", "/nowhere"])
    assert isinstance(found.exception, SystemExit)
    assert (found.exit_code, found.stderr.splitlines()) == (
        2,
        ["/nowhere: there is no such folder; give another with --data (DATA= under make)"],
    )


def write_cifar(root: Path, number: int, per_class: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a small CIFAR-10 or -100 in CIFAR's own files: colours with noise; the archive's digests are told to be those of the stand-in."""
    kind, labels_key, names_key = {
        10: (downloads.CIFAR10, "labels", "label_names"),
        100: (downloads.CIFAR100, "fine_labels", "fine_label_names"),
    }[number]
    folder, random, digests = root / kind.base_folder, np.random.default_rng(0), []
    folder.mkdir(parents=True)
    labels = np.arange(number * per_class) % number
    colours = np.stack([labels * 250 // number, 250 - labels * 250 // number, labels * 75 % 250], 1)[:, :, None]
    for file in ("train", "test", "meta"):
        pixels = np.clip(colours + random.normal(0, 20, (len(labels), 3, 1024)), 0, 255).astype(np.uint8)
        batch = {"data": pixels.reshape(len(labels), 3072), labels_key: labels.tolist()}
        content = pickle.dumps({names_key: [f"colour{label}" for label in range(number)]} if file == "meta" else batch)
        (folder / file).write_bytes(content)
        digests.append(hashlib.md5(content).hexdigest())
    monkeypatch.setattr(kind, "train_list", [["train", digests[0]]])
    monkeypatch.setattr(kind, "test_list", [["test", digests[1]]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": names_key, "md5": digests[2]})


def one_epoch(*paths: str) -> list[str]:
    """Return the overrides that leave one epoch of each training."""
    return [f"{path}.{rest}" for path in paths for rest in ("epochs=1", "schedule=cosine", "milestones=[]")]


def run(short: Recipe, until: str) -> dict[str, Mapping[str, float]]:
    """Run the recipe and return each stage's metrics."""
    assert run_recipe(short, trust_code=False, until=until, verbose=False, command="") == 0
    report = json.loads((Path(short.out) / short.name / "report.json").read_text())
    return {row["stage"]: row["metrics"] for row in report["stages"]}


@pytest.mark.acceptance
def test_a_pruning_recipe_runs_on_a_stand_in_for_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, 10, 4, monkeypatch)
    overrides = one_epoch("source.fit", "prune.sparsity.fit", "distill.fit")
    file = RECIPES / "cifar10" / "resnet56_2_11x.yaml"
    metrics = run(read_recipe(file, overrides, data=str(tmp_path), out=str(tmp_path)), "distill")
    assert 0.46 < metrics["distill"]["macs_m"] / metrics["source"]["macs_m"] <= 0.474


@pytest.mark.acceptance
def test_a_distillation_recipe_runs_to_its_qat_on_a_stand_in_for_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, 100, 2, monkeypatch)
    overrides = [
        *one_epoch("source.fit", "distill.fit"), "target=cpu_avx2", "ptq.methods=[minmax]",
        "ptq.calibration_images=32", "ptq.max_trials=1", "qat.calibration_images=32", "qat.fit.epochs=1",
    ]  # fmt: skip
    file = RECIPES / "cifar100" / "resnet56_resnet20.yaml"
    metrics = run(read_recipe(file, overrides, data=str(tmp_path), out=str(tmp_path)), "qat")
    assert metrics["source"]["params_m"] == pytest.approx(0.8616, abs=1e-4)
    assert metrics["qat"]["params_m"] == pytest.approx(0.2783, abs=1e-4)
