"""Several ranks train, evaluate and prune as one process does, whatever their shares."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import small
from photographs import write_classes
from safetensors.torch import load_file
from several import ended, start
from test_detection_chain import write_squares
from torch import nn

from compress.artifact import Meta, read_meta
from compress.data import dataset
from compress.errors import CompressError
from compress.models.saved import WEIGHTS
from compress.pipeline import plan_recipe, run_recipe
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.run import open_run
from compress.training.sync_batchnorm import synchronized

PLAIN = """
from torch import nn

def plain(classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes),
    )
"""
RECIPE = """
name: shares
target: cpu_avx2
data: {image_size: 16, limit_per_class: 6, eval_batch_size: 32}
model: {arch: "FOLDER/plain.py:plain"}
stages:
  - {stage: source, fit: {epochs: 2, batch_size: 9, lr: 0.05, clip_norm: 1.0}}
  - {stage: prune, criterion: taylor, keep_macs: 0.6, round_to: 4}
  - {stage: distill, fit: {epochs: 1, batch_size: 9, lr: 0.01}, loss: [{name: kd}, {name: cross_entropy}]}
"""
# What rank 0 decides: the others never get there, or would decide otherwise.
RANK = """
import sys
from compress import cli, pipeline
from compress.data import dataset
from compress.stages import prune

def never(*given, **named):
    raise AssertionError("decided by rank 0")

dataset.MEMORY_BYTES = LIMIT
if rank > 0:
    pipeline.plan_recipe = pipeline.resolve_target = prune.choose = never
sys.argv = ["compress", "run", *sys.argv[1:]]
cli.main()
"""


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / "plain.py").write_text(PLAIN)
    (folder / "shares.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return folder / "shares.yaml"


def opened(file: Path, out: Path, *overrides: str) -> Recipe:
    return read_recipe(file, [f"out={out}", *overrides])


def alone(file: Path, out: Path, *overrides: str, until: str) -> None:
    run_recipe(opened(file, out, *overrides), trust_code=True, until=until, verbose=False, command="")


def together(file: Path, out: Path, *overrides: str, until: str, ranks: int = 2, memory: int = 10**9) -> None:
    changes = [part for override in overrides for part in ("--set", override)]
    arguments = [str(file), "--out", str(out), "--until", until, "--trust-code", *changes]
    said = ended(start(RANK.replace("LIMIT", str(memory)), *arguments, ranks=ranks), within_s=300)
    assert [code for code, _ in said] == [0] * ranks, said


def made(
    file: Path, out: Path, stage: str, *overrides: str
) -> tuple[dict[str, torch.Tensor], Meta, list[dict[str, Any]]]:
    """Return a stage's weights, what it says of itself, and its epochs."""
    folder = next(line.directory for line in plan_recipe(opened(file, out, *overrides)) if line.stage == stage)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_file(folder / WEIGHTS), read_meta(folder), [line for line in lines if "epoch" in line]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_nine_images_on_two_ranks_are_nine_images_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Five and four in each step; with images that cannot be read, even fewer on one of the ranks."""
    file, changes = write(tmp_path / "recipe"), list[str]()
    if broken:
        photos = write_classes(tmp_path / "photos", per_class=14)
        for number in (2, 3, 5):
            sorted(photos.rglob("*.*"))[number].write_bytes(b"no image")
        changes = ["data.dataset=imagefolder", f"data.path={photos}", "data.skip_broken=true", "data.workers=0"]
        monkeypatch.setattr(dataset, "MEMORY_BYTES", 0)
    alone(file, tmp_path / "alone", *changes, until="distill")
    together(file, tmp_path / "together", *changes, until="distill", memory=0 if broken else 10**9)
    for stage in ("source", "prune", "distill"):
        (one, one_meta, one_log), (two, two_meta, two_log) = (
            made(file, tmp_path / out, stage, *changes) for out in ("alone", "together")
        )
        assert one_meta.key == two_meta.key
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
        assert two_meta.metrics == pytest.approx(one_meta.metrics, rel=1e-4)
        assert len(one_log) == len(two_log)
        for a, b in zip(one_log, two_log, strict=True):
            del a["images_per_s"], b["images_per_s"]
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


DETECTOR = """
from networks import boxes
from torch import nn

def plain(classes):
    model = boxes(classes)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
    return model
"""
DETECTION = """
name: shares
task: detection
target: cpu_avx2
data: {dataset: imagefolder, path: FOLDER/data, image_size: 48, eval_batch_size: 4}
model: {arch: "FOLDER/plain.py:plain"}
stages:
  - {stage: source, fit: {epochs: 2, batch_size: 5, lr: 0.002, clip_norm: 1.0}}
  - stage: distill
    fit: {epochs: 1, batch_size: 5, lr: 0.002, micro_batches: 2}
    loss: [{name: cross_entropy}, {name: kd}, {name: boxes}]
"""


@pytest.mark.slow
def test_a_detector_on_two_ranks_is_a_detector_on_one(tmp_path: Path) -> None:
    """Images have no, one or two objects, so that the ranks' and micro-batches' losses are means over different numbers."""
    write_squares(tmp_path / "data", "train", 11, 0)
    write_squares(tmp_path / "data", "val", 7, 1)
    (tmp_path / "plain.py").write_text(DETECTOR)
    file = tmp_path / "shares.yaml"
    file.write_text(DETECTION.replace("FOLDER", str(tmp_path)))
    alone(file, tmp_path / "alone", until="distill")
    together(file, tmp_path / "together", until="distill")
    for stage in ("source", "distill"):
        (one, one_meta, one_log), (two, two_meta, two_log) = (
            made(file, tmp_path / out, stage) for out in ("alone", "together")
        )
        assert one_meta.key == two_meta.key
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
        assert two_meta.metrics == pytest.approx(one_meta.metrics, rel=1e-3)
        for a, b in zip(one_log, two_log, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.mark.acceptance
def test_the_score_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """Twelve batches on three ranks, then the same network on one: equal to the last bit."""
    file = write(tmp_path / "recipe")
    together(file, tmp_path / "three", "source.fit.epochs=1", until="source", ranks=3)
    weights = next((tmp_path / "three" / "shares").glob("00-source-*")) / WEIGHTS
    given = [f"model.weights={weights}", "source.fit=null"]
    alone(file, tmp_path / "one", *given, until="source")
    assert made(file, tmp_path / "one", "source", *given)[1].metrics == made(file, tmp_path / "three", "source", "source.fit.epochs=1")[1].metrics  # fmt: skip


@pytest.mark.acceptance
def test_a_rank_killed_in_its_training_ends_the_other_and_the_run_goes_on(tmp_path: Path) -> None:
    file, changes = write(tmp_path / "recipe"), ["--set", "source.fit.epochs=2000"]
    arguments = [str(file), "--out", str(tmp_path), "--until", "source", "--trust-code"]
    ranks = start(RANK.replace("LIMIT", str(10**9)), *arguments, *changes)
    while not list(tmp_path.glob("shares/.00-source-*/log.jsonl")):
        assert ranks[0].process.is_alive()
        time.sleep(0.2)
    ranks[1].process.kill()
    (code, text), (killed, _) = ended(ranks)
    assert (code, killed) == (70, -signal.SIGKILL)
    assert text.splitlines()[-1].startswith("rank 1 on ")
    assert text.count("ended without a message") == 1
    shutil.rmtree(next(tmp_path.glob("shares/.00-source-*")))
    together(file, tmp_path, until="source")


# --- batch-norm ---


def test_synchronized_batch_norms_are_torchs_own_and_become_what_they_were(tmp_path: Path) -> None:
    model, images = small(10).train(), torch.randn(4, 3, 16, 16)
    kinds, state = [type(module) for module in model.modules()], model.state_dict()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        with synchronized(model, None):
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            assert norms
            assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
                model(images)
            model.eval()(images)
    finally:
        dist.destroy_process_group()
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == state.keys()
    model.train()(images)


def test_synchronized_batch_norms_on_cpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = opened(write(tmp_path / "recipe"), tmp_path, "distill.fit.sync_batchnorm=true")
    open_run(recipe, trust_code=True, verbose=False)  # one process has nobody to share with
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("compress.run.gather", lambda value: [value])
    try:
        with pytest.raises(CompressError, match=r"fit\.sync_batchnorm: torch has it on GPUs only"):
            open_run(recipe, trust_code=True, verbose=False)
    finally:
        dist.destroy_process_group()
