"""Images without labels: beside labelled ones, and alone with a teacher."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import small
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F
from typer.testing import CliRunner

from compress.cli import app
from compress.data.batches import balanced
from compress.data.digest import dataset_digest, given, images_digest
from compress.errors import RecipeError
from compress.pipeline import plan_recipe, run_recipe
from compress.recipe.arguments import data_settings
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.run import Run, open_run
from compress.stages.bench import seen_without_label
from compress.tasks.classification import cross_entropy_loss
from export.bundle.read import read_bundle
from export.gate.checks import Limits, Verdict
from export.gate.commands import judge, update
from export.gate.latency import Plan
from export.gate.run import Terms
from export.images.listing import NO_LABEL

NETWORKS = Path(__file__).parent.parent / "networks.py"
RECIPE = f"""
name: own
target: cpu_avx2
data: {{image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
model: {{arch: "{NETWORKS}:small", weights: WEIGHTS}}
stages:
  - {{stage: source}}
  - {{stage: prune, keep_macs: 0.6, reconstruct_images: 64}}
  - {{stage: distill, fit: {{epochs: 2, batch_size: 32, lr: 0.02}}}}
  - {{stage: ptq, calibration_images: 64, methods: [minmax]}}
  - {{stage: qat, fit: {{epochs: 1, batch_size: 32, lr: 0.001}}, calibration_images: 64}}
  - {{stage: export, verify_images: 32}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files: labelled/CLASS/*, all of them in loose/*, and a network's weights in small.safetensors."""
    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    pictures = [drawn(image) for image in found.images[:400]]
    for index, (picture, label) in enumerate(zip(pictures, found.target, strict=False)):
        places = [
            folder / "loose" / f"{index}.png",
            *([folder / "labelled" / str(label) / f"{index}.png"] if index < 120 else []),
        ]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
    save_file(
        trained(np.stack([np.asarray(picture) for picture in pictures]), found.target[:400]).state_dict(),
        folder / "small.safetensors",
    )
    return folder


def drawn(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR)


def trained(pixels: np.ndarray, labels: np.ndarray) -> torch.nn.Module:
    torch.manual_seed(0)
    network = small(10)
    images = (torch.from_numpy(pixels)[:, None].float() / 127.5 - 1).expand(-1, 3, -1, -1)
    optimizer, targets = torch.optim.AdamW(network.parameters(), 0.01), torch.from_numpy(labels)
    for step in range(80):
        rows = torch.randperm(400, generator=torch.Generator().manual_seed(step))[:100]
        loss = F.cross_entropy(network(images[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def recipe(digits: Path, folder: Path, *overrides: str) -> Recipe:
    path = folder / "own.yaml"
    path.write_text(RECIPE.replace("WEIGHTS", str(digits / "small.safetensors")))
    return read_recipe(path, [f"out={folder}", *overrides])


def opened(digits: Path, folder: Path, *overrides: str) -> Run:
    return open_run(recipe(digits, folder, f"data.path={digits}/labelled", *overrides), trust_code=True, verbose=False)


def test_only_distillation_and_calibration_see_unlabelled_images(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(digits, tmp_path, f"data.unlabelled={digits}/loose")
    every = run.dataset.with_unlabelled.train
    assert f"{digits}/loose: " in capsys.readouterr().err
    assert len(run.dataset.train) + len(run.dataset.val) == 120
    assert len(every) == len(run.dataset.train) + 280, "those that are labelled or judged by count once"
    assert (every.labels == NO_LABEL).sum() == 280
    assert ["280 images without a label" in said for said in seen_without_label(run)] == [True]
    assert seen_without_label(opened(digits, tmp_path)) == []
    assert int((run.dataset.train.labels == NO_LABEL).sum()) == 0
    assert sum(len(batch.targets) for batch in run.feed.calibration(1000)) == len(every)


def test_no_validation_image_is_seen_without_its_label_while_others_stand_in_for_it(
    digits: Path, tmp_path: Path
) -> None:
    own, tuned = (
        opened(digits, tmp_path, f"data.unlabelled={digits}/loose", f"data.judge_by={images}").dataset
        for images in ("validation", "tuning")
    )
    judged, stand_ins = set(own.validation_digests()), set(tuned.validation_digests())
    assert judged.isdisjoint(stand_ins)
    assert len(tuned.with_unlabelled.train) == 400 - len(judged) - len(stand_ins)
    assert len(own.with_unlabelled.train) == 400 - len(judged)


def test_the_source_stays_where_unlabelled_images_come(digits: Path, tmp_path: Path) -> None:
    plain = plan_recipe(recipe(digits, tmp_path, f"data.path={digits}/labelled"))
    more = plan_recipe(recipe(digits, tmp_path, f"data.path={digits}/labelled", f"data.unlabelled={digits}/loose"))
    assert [one.key == other.key for one, other in zip(plain, more, strict=True)] == [True] + [False] * 6


def test_a_reports_digest_covers_the_unlabelled_images_and_that_of_a_run_without_any_stays(
    digits: Path, tmp_path: Path
) -> None:
    more = [f"data.path={digits}/labelled", f"data.unlabelled={digits}/loose"]
    plain, beside, fewer = (data_settings(recipe(digits, tmp_path, *more[:n])) for n in (1, 2, 2))
    (tmp_path / "few").mkdir()
    shutil.copy(digits / "loose" / "0.png", tmp_path / "few")
    found = [images_digest(one) for one in (plain, beside, replace(fewer, unlabelled=tmp_path / "few"))]
    assert found[0] == dataset_digest(plain, given(plain)) == found[1].partition("-")[0]
    assert len(set(found)) == 3


def test_an_image_without_a_label_adds_nothing_to_a_loss_on_labels_and_counts() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, -1, 2, -1, 1, -1])
    known = labels >= 0
    found = cross_entropy_loss(logits, labels, label_smoothing=0.1)
    assert torch.allclose(found, F.cross_entropy(logits[known], labels[known], label_smoothing=0.1) * 3 / 6)
    assert cross_entropy_loss(logits, torch.full((6,), -1), label_smoothing=0.0) == 0


def test_a_loss_that_needs_every_label_is_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"data\.unlabelled: dkd in distill needs every image's label: use kd or dist"
    ):
        recipe(digits, tmp_path, f"data.path={digits}/labelled", "data.unlabelled=x", "distill.loss=[{name: dkd}]")


def test_mixing_gives_an_image_without_a_label_no_target(digits: Path, tmp_path: Path) -> None:
    run = opened(digits, tmp_path, f"data.unlabelled={digits}/loose", "data.augment.mixup=1.0")
    images = run.dataset.with_unlabelled
    run = replace(run, opened=lambda: images)
    batch = next(run.feed.training(run.recipe.stages[2].fit.batch_size, epoch=0, view=0))  # type: ignore[union-attr]
    assert batch.targets.sum(1).max() <= 1
    assert batch.targets.sum(1).min() < 0.5


@pytest.fixture(scope="module")
def bundle(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a run without any label."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "names.txt").write_text("".join(f"digit {label}\n" for label in range(10)))
    settings = [f"data.path={digits}/loose", "task=unlabelled", f"data.classes={folder}/names.txt"]
    made = recipe(digits, folder, *settings, "distill.fit.epochs=6")
    assert run_recipe(made, trust_code=True, until=None, verbose=False, command="") == 0
    return folder / "own" / "bundle"


def test_a_folder_without_labels_goes_from_teacher_to_bundle(bundle: Path, tmp_path: Path) -> None:
    report: dict[str, Any] = json.loads((bundle.parent / "report.json").read_text())
    assert report["metric"]["title"] == "agreement with the teacher"
    scores = {row["name"]: row["score"] for row in report["deployed"]}
    assert scores["teacher_fp32"] == 1
    assert scores["student_int8"] > 0.8
    assert "top-1" not in (bundle.parent / "report" / "index.html").read_text()
    assert "top-1" not in (bundle / "README.md").read_text()
    found = CliRunner().invoke(app, ["export-data", str(bundle.parent), str(tmp_path / "val")])
    assert "80 validation images" in found.output
    assert {folder.name for folder in (tmp_path / "val").iterdir()} <= {f"digit {label}" for label in range(10)}


def judged(bundle: Path, data: Path, folder: Path) -> Verdict:
    """Accept a bundle on some images, and judge it by that."""
    limits, plan = Limits(max_latency_ratio=None), Plan(seconds=0.1)
    update(bundle, folder / "baseline.json", Terms(data, limits, plan))
    return judge(bundle, folder / "baseline.json", Terms(None, limits, plan))


def test_the_gate_judges_a_bundle_without_labels_by_agreement(bundle: Path, digits: Path, tmp_path: Path) -> None:
    score = json.loads((bundle / "bundle.json").read_text())["files"]["student_int8"]["score"]
    CliRunner().invoke(app, ["export-data", str(bundle.parent), str(tmp_path / "val")], catch_exceptions=False)
    for data in (digits / "loose", tmp_path / "val"):
        verdict = judged(bundle, data, tmp_path)
        assert verdict.exit_code == 0, verdict
        (error,) = [metric.value for metric in verdict.metrics if metric.name == "agreement with the teacher error"]
        assert error == pytest.approx(100 * (1 - score))


def test_the_gate_takes_images_that_it_never_saw(bundle: Path, tmp_path: Path) -> None:
    found = load_digits()
    for index in range(400, 450):
        path = tmp_path / "foreign" / ("a" if index % 2 else "b/c") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn(found.images[index]).save(path)
    verdict = judged(bundle, tmp_path / "foreign", tmp_path)
    assert verdict.exit_code == 0
    assert any("none of the 50 images is one of the network's 80" in note for note in verdict.notes)
    assert any("teacher_fp32 of this bundle predicts" in note for note in verdict.notes)
    examples = read_bundle(bundle).examples(tmp_path / "foreign")
    truths = np.concatenate([batch for _, batch in examples.batches()])
    assert (truths == found.target[[*range(401, 450, 2), *range(400, 450, 2)]]).mean() > 0.7


def test_training_on_labels_that_are_not_there_is_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.0\.fit: there are no labels to train on"):
        recipe(digits, tmp_path, f"data.path={digits}/loose", "task=unlabelled", "source.fit={epochs: 1}")


def test_a_balanced_epoch_shows_every_class_as_often_and_repeats(digits: Path, tmp_path: Path) -> None:
    run = opened(digits, tmp_path, "data.balance=sampler", f"data.unlabelled={digits}/loose")
    labels = torch.tensor([0] * 90 + [1] * 10)
    drawn = labels[torch.multinomial(balanced(labels), 20_000, replacement=True)].float().mean()
    assert drawn == pytest.approx(0.5, abs=0.02)
    mixed = balanced(torch.tensor([0] * 90 + [1] * 10 + [NO_LABEL] * 100))
    assert mixed[100:].sum() / mixed.sum() == pytest.approx(0.5)
    fit = run.recipe.stages[2].fit  # type: ignore[union-attr]
    assert fit is not None
    first, again, later = (
        torch.cat([batch.targets for batch in run.feed.training(fit.batch_size, epoch=epoch, view=0)])
        for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
