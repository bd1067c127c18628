"""A task that lives in this file alone goes through the whole chain: the mean brightness of a digit, as a number."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import compress.tasks
import export.tasks
from compress.cli import app
from compress.data.augment import Augmentation
from compress.data.dataset import Dataset
from compress.data.labelled import open_dataset, write_validation
from compress.data.settings import DataSettings
from compress.tasks.task import Task
from export import predict, verify
from export.bundle.read import read_bundle
from export.errors import BundleError
from export.gate.__main__ import main as gate_main
from export.images.folders import list_folder
from export.images.preprocess import Preprocess
from export.images.read import Examples, find_examples
from export.tasks.paired import compare_classes
from export.tasks.task import Array, Metric, OutputTask

# The half that runs where the model runs.


def check_output(file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
    if shape[1:] != (1,) or len(labels) != 1:
        raise BundleError(f"{file}: must answer with one number an image, got {shape}: export it again")


def examples(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    found = find_examples(data, preprocess, labels)
    return replace(
        found, truths=np.array([brightness(found.pixels(index)) for index in range(len(found.truths))], np.float32)
    )


def brightness(pixels: Array) -> float:
    return float(pixels.mean() / 255)


def statistics(answers: Array, truths: Array, _output: tuple[int, ...]) -> Array:
    return np.stack([truths, np.abs(answers - truths)], axis=1)


def total(rows: Array) -> float:
    return float(max(0.0, 1 - rows[:, 1].mean()))


def further(rows: Array) -> Mapping[str, float | None]:
    return {"largest error": float(rows[:, 1].max())}


BRIGHTNESS = OutputTask(
    name="brightness",
    metric=Metric("closeness", "closeness", counts_images=False),
    output_shape=lambda _classes, _image_size: (1,),
    check_output=check_output,
    truths_json=lambda truths: truths.tolist(),
    listing=list_folder,
    truths=lambda values, _output: np.array(values, np.float32),
    examples=examples,
    decode=lambda outputs: outputs[:, 0],
    statistics=statistics,
    total=total,
    further=further,
    by_class=lambda _rows, _labels, _confused: None,
    agreement=lambda answers, others: np.exp(-np.abs(answers - others)),
    divergence=lambda outputs, reference: np.abs(outputs - reference)[:, 0],
    compare=lambda before, now, labels: compare_classes(
        before,
        now,
        labels,
        resampled=lambda rows, weights: 1 - weights @ rows[:, 1:] / len(rows),
        measure="closeness",
        changed=np.any(before != now, axis=1),
        how="measured differently",
    ),
    truth_text=lambda row, _labels: f"{row[0]:.4f}",
    show=lambda output, labels, _lines: (labels, [(float(output[0]),)]),
)

# The half that training needs.


def open_digits(settings: DataSettings, augmentation: Augmentation) -> Dataset:
    data = open_dataset(settings, augmentation)
    return replace(data, classes=("brightness",), train=measured(data.train), val=measured(data.val))


def measured(images: Any) -> Any:
    pixels = images.still.images(torch.arange(len(images)), torch.device("cpu"))
    return replace(images, labels=pixels.float().mean((1, 2, 3)) / 255)


def write(dataset: Dataset, folder: Path) -> int:
    held_out: Any = dataset.held_out
    unlabelled = replace(held_out, labels=torch.zeros(len(held_out), dtype=torch.int64))
    return write_validation(replace(dataset, held_out=unlabelled), folder)


def loss(outputs: torch.Tensor, truths: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
    return torch.nn.functional.mse_loss(outputs[:, 0], truths)


TASK = Task(
    BRIGHTNESS,
    open_digits,
    write,
    loss,
    rows=lambda outputs, _truths: outputs,
    truth_rows=lambda _outputs, truths: truths,
)

RECIPE = """
name: brightness
task: brightness
data: {dataset: digits, image_size: 16, limit_per_class: 30}
model: {arch: "NETWORKS:small"}
stages:
  - {stage: source, fit: {epochs: 6, batch_size: 32, optimizer: adamw, lr: 0.01}}
  - {stage: prune, keep_macs: 0.7}
  - {stage: distill, fit: {epochs: 2, batch_size: 32, lr: 0.01}, loss: [{name: mse}, {name: cross_entropy}]}
  - {stage: ptq, calibration_images: 64, methods: [minmax]}
  - {stage: qat, fit: {epochs: 1, batch_size: 32, lr: 0.001}, loss: [{name: mse}], calibration_images: 64}
  - {stage: export, verify_images: 64}
  - {stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}
targets: {max_drop: 0.1}
""".replace("NETWORKS", str(Path(__file__).with_name("networks.py")))


def test_a_task_that_only_this_file_knows_goes_through_the_whole_chain(
    tmp_path: Path,
    called: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(export.tasks.TASKS, "brightness", BRIGHTNESS)
    monkeypatch.setitem(compress.tasks.TASKS, "brightness", TASK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "runs"
    words = ["run", str(tmp_path / "recipe.yaml"), "--out", str(out), "--trust-code"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    root = out / "brightness"
    report = json.loads((root / "report.json").read_text())
    assert report["metric"] == {"name": "closeness", "title": "closeness"}
    scores = {row["name"]: row["score"] for row in report["deployed"]}
    assert set(scores) == {"teacher_fp32", "student_fp32", "student_fp16", "student_ptq_int8", "student_int8"}
    assert min(scores.values()) > 0.9
    page = (root / "report" / "index.html").read_text()
    assert "Closeness" in page
    assert "top-1" not in page.lower()
    bundle = read_bundle(root / "bundle")
    assert bundle.task is BRIGHTNESS
    assert bundle.golden.truths.dtype == np.float32

    images = tmp_path / "images"
    assert CliRunner().invoke(app, ["export-data", str(root), str(images)]).exit_code == 0
    baseline = [root / "bundle", "--baseline", tmp_path / "baseline.json", "--data", images, "--no-latency"]
    assert called(gate_main, *baseline, "--update-baseline") == 0
    assert called(gate_main, *baseline) == 0
    assert "closeness" in capsys.readouterr().out
    assert called(predict.main, root / "bundle", next(images.rglob("*.bmp"))) == 0
    assert "brightness\n" in capsys.readouterr().out
    assert called(verify.main, root / "bundle", "--data", images, "--images", 16) == 0
    assert "closeness" in capsys.readouterr().out
