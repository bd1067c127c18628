"""A detector of one's own, from an ONNX file of dense rows to its bundle: pruned, distilled without a label, in INT8, scored by mAP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_detection_chain import SIZE, write_squares
from yolo import Yolo, trained_

from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.run import open_run
from export import predict
from export.bundle.read import read_bundle
from export.check.findings import check_bundle
from export.onnx_file.to_onnx import to_onnx
from export.runtime.session import open_session
from export.tasks.boxes import NONE

pytestmark = pytest.mark.acceptance

RECIPE = f"""
name: mine
task: detection
target: cpu_avx2
data: {{dataset: imagefolder, path: DATA, image_size: {SIZE}, pixels: unit, eval_batch_size: 16, augment: {{flip: true}}}}
model: {{arch: "onnx:FOLDER/my_yolo.onnx"}}
decode: {{function: dense, detections: 20}}
stages:
  - {{stage: source}}
  - {{stage: prune, keep_macs: 0.7, round_to: 4}}
  - stage: distill
    fit: {{epochs: 2, batch_size: 8, optimizer: adamw, lr: 0.002}}
    loss: [{{name: kd}}, {{name: boxes}}]
  - {{stage: ptq, calibration_images: 32, methods: [minmax]}}
  - {{stage: export, verify_images: 16}}
  - {{stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's folder."""
    folder = tmp_path_factory.mktemp("mine")
    write_squares(folder / "data", "train", 64, 0)
    write_squares(folder / "data", "val", 24, 1)
    (folder / "recipe.yaml").write_text(RECIPE.replace("DATA", str(folder / "data")).replace("FOLDER", str(folder)))
    torch.manual_seed(0)
    network = Yolo(2)
    seen = f"""{{name: seen, task: detection, model: {{arch: ssd:resnet18}}, stages: [{{stage: source, fit: {{epochs: 1}}}}],
    data: {{dataset: imagefolder, path: {folder / "data"}, image_size: {SIZE}, pixels: unit}}}}"""
    (folder / "seen.yaml").write_text(seen)
    batches = [*open_run(read_recipe(folder / "seen.yaml"), trust_code=False, verbose=False).feed.calibration(64)]
    trained_(network, torch.cat([one.images for one in batches]), torch.cat([one.targets for one in batches]), 80)
    to_onnx(network, folder / "my_yolo.onnx", shape=(3, SIZE, SIZE), metadata={})
    recipe = read_recipe(folder / "recipe.yaml", [f"out={folder}"])
    assert run_recipe(recipe, trust_code=False, until=None, verbose=False, command="compress run recipe.yaml") == 0
    return folder / "mine"


def report_of(root: Path) -> Any:
    return json.loads((root / "report.json").read_text())


def test_every_file_is_scored_by_map(root: Path) -> None:
    scores = {row["name"]: row["score"] for row in report_of(root)["deployed"]}
    assert scores["teacher_fp32"] > 0.5
    assert scores["student_ptq_int8"] > 0.8 * scores["teacher_fp32"]
    assert report_of(root)["metric"]["title"] == "mAP"


def test_the_bundle_holds_the_graph_and_is_sound(root: Path) -> None:
    bundle, problems = check_bundle(root / "bundle")
    assert not problems
    assert bundle is not None
    assert bundle.manifest["decode"] == "decode.onnx"
    assert bundle.golden.truths.shape[2] == 6


def test_pixels_give_the_detections_that_the_file_gives(root: Path) -> None:
    bundle = read_bundle(root / "bundle")
    answers = onnxruntime.InferenceSession(
        (root / "bundle" / "serving" / "triton-answers" / "mine" / "1" / "model.onnx").read_bytes()
    )
    assert [one.name for one in answers.get_outputs()] == ["boxes", "scores", "labels"]
    outputs = open_session(bundle.file(None), threads=1).run(None, {"input": bundle.golden.inputs})[0]
    expected = bundle.task.decode(outputs)
    assert expected.shape[1] == 20
    found = 0
    for image, wanted in zip(bundle.golden.images, expected, strict=True):
        boxes, scores, labels = answers.run(None, {"pixels": image[None]})
        wanted = wanted[wanted[:, 0] != NONE]
        np.testing.assert_array_equal(labels, wanted[:, 0])
        np.testing.assert_allclose(scores, wanted[:, 1], rtol=1e-4)
        np.testing.assert_allclose(boxes, wanted[:, 2:], atol=1e-5)
        found += len(boxes)
    assert found > 20


def test_predict_prints_and_draws_boxes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = root.parent / "data" / "images" / "val" / "5.png"
    options = [str(root / "bundle"), str(image), "--json", "--draw", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["predict", *options])
    assert predict.main() == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert {one["label"] for one in found} <= {"red", "blue"}
    assert found[0]["score"] > 0.3
    assert (tmp_path / "5.png").exists()
