"""What ptq and qat choose by: never the validation images, which only judge; the best calibration, by both stages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Residual
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.data.batches import Batch
from compress.data.feed import Feed
from compress.data.split import sampled
from compress.pipeline import plan_recipe, run_recipe
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.run import open_run

RECIPE = """
name: choice
target: cpu_avx2
data: {dataset: digits, image_size: 16, limit_per_class: 60}
model: {arch: "NETWORKS:thin"}
stages:
  - {stage: source, fit: {epochs: 3, batch_size: 32, lr: 0.05}}
  - {stage: ptq, calibration_images: 64, methods: [minmax, percentile, entropy]}
  - {stage: qat, fit: {epochs: 1, batch_size: 32, lr: 0.1}, calibration_images: 64, max_drop: 0.0}
""".replace("NETWORKS", str(Path(__file__).parents[1] / "networks.py"))


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "choice.yaml"
    path.write_text(RECIPE)
    return read_recipe(path, [f"out={folder}", *overrides])


def chosen(folder: Path) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Run the recipe; return ptq.json of its target, qat's trials without their times, and the layers that qat keeps in float."""
    run_recipe(recipe(folder), trust_code=True, until="qat", verbose=False, command="compress run")
    _, ptq, qat = (line.directory for line in plan_recipe(recipe(folder)))
    found = json.loads((ptq / "ptq.json").read_text())["targets"]["cpu_avx2"]
    trials = json.loads((qat / "trials-cpu_avx2.json").read_text())
    for trial in (*found["trials"], *trials):
        del trial["latency_ratio"], trial["latency_ci95"]
    return found, trials, json.loads((qat / "cpu_avx2" / "architecture.json").read_text())["keep_float"]


@pytest.mark.acceptance
def test_other_validation_images_change_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    for stage in ("ptq", "qat"):  # time decides between engines, and differs from run to run
        monkeypatch.setattr(f"compress.stages.{stage}.faster_than", lambda *_: lambda _: None)
    before, *trained = chosen(tmp_path / "own")
    validation = Feed.validation

    def negatives(feed: Feed, *, limit: int | None = None, shared: bool = False) -> Iterator[Batch]:
        return (batch._replace(images=-batch.images) for batch in validation(feed, limit=limit, shared=shared))

    monkeypatch.setattr(Feed, "validation", negatives)
    after, *retrained = chosen(tmp_path / "other")
    assert before["score"] > after["score"] + 0.3  # the images that judge are other ones
    assert [row["score"] for row in before["methods"]] != [row["score"] for row in after["methods"]]
    for name in ("trials", "chosen", "calibration"):
        assert before[name] == after[name]
    assert trained == retrained
    assert len(trained[0]) > 1  # it had something to choose


def test_the_tuning_split_is_training_images_of_every_class_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.data.feed.TUNING_IMAGES", 100)
    splits = []
    for seed in (0, 0, 1):
        run = open_run(recipe(tmp_path, f"seed={seed}"), trust_code=True, verbose=False)
        images, labels = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in run.feed.tuning()), strict=True))
        assert torch.bincount(labels).tolist() == [10] * 10
        trained = torch.cat([batch.images for batch in run.feed.calibration(len(run.dataset.train))]).flatten(1)
        assert all((trained == image).all(1).any() for image in images.flatten(1))
        splits.append(images)
    assert torch.equal(splits[0], splits[1])
    assert not torch.equal(splits[0], splits[2])


def test_few_of_many_images_are_of_every_class_in_proportion() -> None:
    labels = np.repeat(np.arange(4), [1000, 500, 100, 1])
    picked = sampled(labels, 4, images=160, seed=0)
    assert np.bincount(labels[picked]).tolist() == [100, 50, 10, 1]
    assert len(set(picked.tolist())) == len(picked)
    assert np.array_equal(sampled(labels, 4, images=10_000, seed=0), np.arange(1601))


def with_an_outlier_channel(weights: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Let a channel that nobody reads fire at one value in 2,000 of its own, a thousand times as strongly as the others."""
    model = Residual(10, width=8)
    model.load_state_dict(
        weights | {"block1.conv2.weight": weights["block1.conv2.weight"].index_fill(1, torch.tensor([0]), 0)}
    )
    model.eval()
    block = model.block1
    with torch.no_grad():
        values = block.bn1(block.conv1(model.pool(model.stem(images))))[:, 0].flatten()
        threshold = values.kthvalue(int(values.numel() * (1 - 1 / 2000))).values
        strength = 1000 / (values.max() - threshold)
        block.bn1.bias[0] = (block.bn1.bias[0] - threshold) * strength
        block.bn1.weight[0] *= strength
    return dict(model.state_dict())


@pytest.mark.acceptance
def test_both_stages_take_the_best_calibration_and_not_the_first_that_holds(tmp_path: Path) -> None:
    """Every calibration holds within 50 points; min-max, which comes first, is ruined by an outlier."""
    run_recipe(recipe(tmp_path), trust_code=True, until="source", verbose=False, command="compress run")
    source = plan_recipe(recipe(tmp_path))[0].directory
    run = open_run(recipe(tmp_path), trust_code=True, verbose=False)
    images = torch.cat([batch.images for batch in run.feed.calibration(64)])
    save_file(
        with_an_outlier_channel(load_file(source / "weights.safetensors"), images), tmp_path / "planted.safetensors"
    )
    changes = [f"model.weights={tmp_path / 'planted.safetensors'}", "ptq.max_drop=0.5", "qat.max_drop=null"]
    planted = recipe(tmp_path, *changes)
    run_recipe(planted, trust_code=True, until="qat", verbose=False, command="compress run")
    _, ptq, qat = (line.directory for line in plan_recipe(planted))
    found = json.loads((ptq / "ptq.json").read_text())["targets"]["cpu_avx2"]
    own = [trial for trial in found["trials"] if trial["engine"] == "compress"]
    assert [trial["met"] for trial in own] == [True, True, True]
    best = min(own, key=lambda trial: trial["kl"])
    assert best["calibration"] != "minmax"
    assert best["agreement"] > own[0]["agreement"] + 0.05
    chosen = found["trials"][found["chosen"]]
    assert chosen == min(
        (trial for trial in found["trials"] if trial["engine"] == chosen["engine"]), key=lambda trial: trial["kl"]
    )
    assert found["calibration"] == best["calibration"]
    assert f"after calibration by {best['calibration']} alone" in (qat / "log.jsonl").read_text()
