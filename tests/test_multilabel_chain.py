"""Images with several labels through the whole chain: a small network, from scenes of digits to its gated bundle."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import few_scenes
from typer.testing import CliRunner

from compress.artifact import read_meta
from compress.cli import app
from compress.data import scenes
from compress.data.named import DATA_SETS, NamedSet
from compress.errors import CompressError
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.run import Run, open_run
from export import audit, predict, verify
from export.bundle.read import read_bundle
from export.errors import DataError
from export.gate.__main__ import main as gate_main

RECIPE = f"""
name: tagged
task: multilabel
target: cpu_avx2
data: {{dataset: scenes_plain, image_size: 16, balance: class_weights, augment: {{crop: pad, mixup: 0.2}}}}
model: {{arch: "{Path(__file__).with_name("networks.py")}:small"}}
stages:
  - {{stage: source, fit: {{epochs: 6, batch_size: 16, optimizer: adamw, lr: 0.01}}}}
  - {{stage: prune, keep_macs: 0.6, round_to: 4}}
  - {{stage: distill, fit: {{epochs: 2, batch_size: 16, lr: 0.01}}, loss: [{{name: cross_entropy}}, {{name: kd}}]}}
  - {{stage: ptq, calibration_images: 32, methods: [minmax]}}
  - {{stage: qat, fit: {{epochs: 1, batch_size: 16, lr: 0.001}}, calibration_images: 32}}
  - {{stage: export, verify_images: 16}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's folder, and beside it in `data` its validation images."""
    folder = tmp_path_factory.mktemp("tagged")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_SETS, "scenes_plain", NamedSet(32, scenes=few_scenes("scenes_plain", train=96, val=48)))
        recipe = read_recipe(folder / "recipe.yaml", [f"out={folder}"])
        assert run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run recipe.yaml") == 0
        done = CliRunner().invoke(app, ["export-data", str(folder / "tagged"), str(folder / "data")])
        assert done.exit_code == 0, done.output
    return folder / "tagged"


def report_of(root: Path) -> Any:
    return json.loads((root / "report.json").read_text())


def test_every_file_is_scored_by_mean_average_precision_as_torch_scored_it(root: Path) -> None:
    report = report_of(root)
    assert report["metric"] == {"name": "macro_ap", "title": "mAP"}
    deployed = {row["name"]: row["score"] for row in report["deployed"]}
    for file, stage, name in (("teacher_fp32", "source", "score"), ("student_int8", "qat", "score_cpu_avx2")):
        (line,) = [line for line in report["stages"] if line["stage"] == stage]
        assert deployed[file] == pytest.approx(read_meta(root / line["directory"]).metrics[name], abs=0.0005)
    assert report["classes"]["files"]["student_int8"]["scores"]
    page = (root / "report" / "index.html").read_text()
    assert "AP of each class" in page
    assert "top-1" not in page


def test_the_validation_images_are_written_with_their_table(root: Path) -> None:
    with (root.parent / "data" / "val" / "labels.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["file", *map(str, range(10))]
    drawn = scenes.draw_scenes(few_scenes("scenes_plain", val=48), "val", size=16, seed=0)
    wanted = [[str(int(digit + 1 in boxes[:, 4])) for digit in range(10)] for boxes in drawn.boxes]
    assert [row[1:] for row in rows] == wanted


def test_the_bundle_passes_its_gate_and_answers_with_labels(
    root: Path, called: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = read_bundle(root / "bundle")
    assert bundle.golden.truths.shape == (len(bundle.golden.images), 10)
    assert "its sigmoid" in (root / "bundle" / "README.md").read_text()
    words = [root / "bundle", "--baseline", root.parent / "b.json", "--data", root.parent / "data", "--no-latency"]
    assert called(gate_main, *words, "--update-baseline") == 0
    assert called(gate_main, *words) == 0
    assert "mAP" in capsys.readouterr().out
    image = next((root.parent / "data").rglob("*.bmp"))
    assert called(predict.main, root / "bundle", image) == 0
    assert "probability" in capsys.readouterr().out
    assert called(verify.main, root / "bundle", "--data", root.parent / "data", "--images", 16) == 0
    assert called(audit.main, root / "bundle" / "student_int8.onnx") == 0


def run_of(tmp_path: Path, *changes: str) -> Run:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path}", *changes])
    return open_run(recipe, trust_code=True, verbose=False)


def test_a_class_that_no_training_image_has_is_refused(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train", "val"):
        (data / part).mkdir(parents=True)
        image = next((root.parent / "data").rglob("*.bmp"))
        (data / part / "a.bmp").write_bytes(image.read_bytes())
        (data / part / "labels.csv").write_text(f"file,cat,dog\na.bmp,1,{int(part == 'val')}\n")
    with pytest.raises(DataError, match=r"class 'dog': no training image has this label: add some, or remove it"):
        _ = run_of(tmp_path, "data.dataset=imagefolder", f"data.path={data}").dataset


def test_a_sampler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = few_scenes("scenes_plain", train=96, val=8)
    monkeypatch.setitem(DATA_SETS, "scenes_plain", NamedSet(32, scenes=few))
    run = run_of(tmp_path, "data.balance=sampler")
    section = run.recipe.stages[0]
    assert section.stage == "source"
    assert section.fit is not None
    with pytest.raises((CompressError, DataError), match=r"data\.balance: .* one label each"):
        next(iter(run.feed.training(section.fit.batch_size, epoch=0, view=0)))
    labels = run.dataset.train.labels
    assert labels.shape == (96, 10)
    assert np.isin(labels.numpy(), (0, 1)).all()
