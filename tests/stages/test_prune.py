"""What the prune stage scores by, and at which size it times layers."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import small
from several import ended, start
from torch import nn
from torch.nn import functional as F

from compress.data.batches import Batch
from compress.errors import CompressError
from compress.logs.stage_log import StageLog
from compress.models.architectures import build
from compress.models.saved import Architecture, load_float, save_network
from compress.models.structure import count
from compress.pruning.inside_heads import HeadAttention
from compress.pruning.plan import Options
from compress.recipe.arguments import goal_of
from compress.recipe.schema import Recipe
from compress.recipe.stages import PruneStage
from compress.run import Run, open_run
from compress.stages import prune
from compress.stages.prune import _accumulate_gradients_
from compress.tasks import TASKS, evaluate
from export.images.preprocess import IGNORED


def open_small() -> Run:
    data = {"image_size": 16, "limit_per_class": 6}
    arch = f"{Path(__file__).parents[1] / 'networks.py'}:small"
    stages = [{"stage": "source", "fit": {"epochs": 1}}]
    return open_run(
        Recipe.model_validate({"name": "a", "data": data, "model": {"arch": arch}, "stages": stages, "device": "cpu"}),
        trust_code=True,
        verbose=False,
    )


@pytest.mark.parametrize("images", [24, 40, 10_000])
def test_every_one_of_so_many_images_has_the_same_part_in_the_gradient(images: int) -> None:
    """Also those of the last batch, which is smaller; of fewer images than asked for, all."""
    run = open_small()
    model = small(10).eval()
    _accumulate_gradients_(model, PruneStage(stage="prune", keep_macs=0.5, score_images=images), run)
    batches = list(run.feed.calibration(images))
    assert sum(len(batch.targets) for batch in batches) == min(images, len(run.dataset.train))
    loss = F.cross_entropy(
        model(torch.cat([batch.images for batch in batches])), torch.cat([batch.targets for batch in batches])
    )
    for name, parameter in model.named_parameters():
        (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, expected, msg=name)


def test_every_pixel_that_counts_has_the_same_part_in_gradient_and_loss() -> None:
    """Of two batches of masks, of which one is mostly ignored."""
    network, task = nn.Conv2d(3, 2, 1), TASKS["segmentation"]
    images, masks = torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8)
    masks[1, 1:] = IGNORED
    batches = [Batch(images[i : i + 1], masks[i : i + 1]) for i in range(2)]
    feed = SimpleNamespace(calibration=lambda _: batches)
    run: Any = SimpleNamespace(
        device=torch.device("cpu"), judged=task, dataset=SimpleNamespace(train=range(2)), feed=feed
    )
    _accumulate_gradients_(network, PruneStage(stage="prune", keep_macs=0.5), run)
    loss = task.loss(network(images), masks, label_smoothing=0.0)
    (expected,) = torch.autograd.grad(loss, network.weight)
    assert network.weight.grad is not None
    ratios = network.weight.grad / expected
    torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios))
    assert evaluate(network, batches, task)["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


GRADIENTS = """
from types import SimpleNamespace
import torch
from torch import nn
from compress.data.batches import Batch
from compress.recipe.stages import PruneStage
from compress.stages.prune import _accumulate_gradients_
from compress.tasks import TASKS
network = nn.Sequential(nn.Conv2d(8, 24, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
batch = Batch(torch.randn(9, 8, 96, 96).to(memory_format=torch.channels_last), torch.zeros(9, dtype=torch.int64))
run = SimpleNamespace(
    device=torch.device("cpu"), judged=TASKS["classification"], dataset=SimpleNamespace(train=range(27)),
    feed=SimpleNamespace(calibration=lambda _: [batch] * 3),
)
_accumulate_gradients_(network, PruneStage(stage="prune", keep_macs=0.5), run)
assert all(parameter.grad is not None for parameter in network.parameters())
"""


def test_gradients_reach_a_convolution_that_onednn_cannot_train_in_channels_last() -> None:
    """In a process of its own, as it was a segmentation fault on a CPU with AVX-512."""
    assert ended(start(GRADIENTS, ranks=1)) == [(0, "")]


@pytest.mark.parametrize("size", [16, 48])
def test_layers_are_timed_with_the_maps_that_are_served(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's images have 16 pixels, those that the time is asked for others."""
    seen: list[Options] = []

    def open_latency(_: nn.Module, options: Options, *__: object, **___: object) -> None:
        seen.append(options)
        raise CompressError("enough")

    monkeypatch.setattr(prune, "open_latency", open_latency)
    run, model = open_small(), small(10).eval()
    cfg = PruneStage.model_validate(
        {"stage": "prune", "keep_latency": 0.5, "conditions": {"image_size": size, "precision": "fp32"}}
    )
    smallest = dict.fromkeys(dict(model.named_modules()), 1)
    with run.log(tmp_path, "prune") as log:
        planner = prune._Planner(cfg, goal_of(cfg), {}, smallest, tmp_path, log, run)
        with pytest.raises(CompressError, match="enough"):
            planner.cuts(model, torch.zeros(1, 3, 16, 16), 1)
    convolution = next(layer for layer in seen[0].layers if layer.kind == "Conv2d")
    assert convolution.maps[0] == (size, size)


def test_a_verbose_run_says_each_layer_that_is_solved_and_counts_the_images_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(open_small(), verbose=True)
    given = run.recipe.model
    assert given is not None
    architecture, model = run.start(given)
    save_network(model, architecture, tmp_path)
    counted = list[int]()
    monkeypatch.setattr(StageLog, "seen", lambda _, images: counted.append(images))
    (out := tmp_path / "out").mkdir()
    prune.apply(PruneStage(stage="prune", keep_macs=0.6, reconstruct_images=16), tmp_path, out, run)
    said = capsys.readouterr().err
    assert said.index("scores the channels") < said.index("solves layer 1 of") < said.index("measures the cut network")
    assert sum(counted) >= 3 * len(run.dataset.val)  # before, as cut, and solved


def test_a_stage_of_two_cuts_removes_dimensions_inside_heads_and_its_network_comes_back(tmp_path: Path) -> None:
    run = open_small()
    (out := tmp_path / "out").mkdir()
    architecture = Architecture("timm:test_vit", 10, run.shape)
    whole = build(architecture.arch, num_classes=10, shape=run.shape)
    save_network(whole, architecture, tmp_path)
    cfg = PruneStage(stage="prune", keep_macs=0.5, inside_heads=True, steps=2, reconstruct_images=16)
    metrics = prune.apply(cfg, tmp_path, out, run)
    cut = load_float(out, trust_code=False)
    attentions = [module for module in cut.modules() if isinstance(module, HeadAttention)]
    assert attentions
    assert all(module.heads == 2 and width < 32 for module in attentions for width in module.widths.values())
    assert metrics["macs_m"] == count(cut, run.shape).macs / 1e6 <= 0.5 * count(whole, run.shape).macs / 1e6
    assert run.measure(cut)["score"] == metrics["score"]
