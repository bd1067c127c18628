"""A run's bundle: what it takes from the run, its model card, and publishing it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from reports import build_report
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import ArtifactError
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.report.bundling import publish, serving_of
from compress.report.files import print_again
from compress.report.hub import publish_to_hub
from compress.report.page.card import card, front_matter
from export.bundle.read import read_bundle
from export.errors import BundleError
from export.onnx_file.model_file import Value
from export.onnx_file.targets import TARGETS

pytestmark = pytest.mark.usefixtures("unrehearsed")
RECIPE = """
name: small
target: cpu_avx2
data: {dataset: digits, image_size: 16, limit_per_class: 20}
model: {arch: "NETWORKS:small"}
stages:
  - {stage: source, fit: {epochs: 1, batch_size: 32, lr: 0.05}}
  - {stage: ptq, calibration_images: 32, methods: [minmax]}
  - {stage: export, verify_images: 32, golden_images: 5}
  - {stage: bench, seconds: 0.05, blocks: 6, batches: [1, 2], threads: [1, 2]}
""".replace("NETWORKS", str(Path(__file__).parents[1] / "networks.py"))


def recipe(folder: Path) -> Recipe:
    (folder / "small.yaml").write_text(RECIPE)
    return read_recipe(folder / "small.yaml", [f"out={folder}"])


def run(folder: Path) -> Path:
    code = run_recipe(recipe(folder), trust_code=True, until=None, verbose=False, command="compress run small.yaml")
    assert code == 0
    return folder / "small"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("bundling"))


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_golden_images_are_validation_images_as_they_are(finished: Path) -> None:
    golden = read_bundle(finished / "bundle").golden
    digits = (load_digits().images * (255 / 16)).round()
    assert golden.images.shape == (5, 16, 16, 3)
    for image, label in zip(golden.images, golden.truths, strict=True):
        small = image[..., 0].reshape(8, 2, 8, 2).mean((1, 3))  # the data set's 8 x 8, enlarged
        same = np.abs(digits - small).mean((1, 2))
        assert load_digits().target[same.argmin()] == label
        assert np.ptp(image, axis=2).max() == 0


def test_a_second_run_writes_the_same_bytes(finished: Path) -> None:
    before = contents(finished / "bundle")
    shutil.rmtree(finished / "bundle")
    run(finished.parent)
    assert contents(finished / "bundle") == before


def test_the_bundle_holds_where_it_is_from(finished: Path) -> None:
    bundle, report = finished / "bundle", json.loads((finished / "report.json").read_text())
    assert read_recipe(bundle / "recipe.yaml", ()) == recipe(finished.parent)
    assert json.loads((bundle / "environment.json").read_text()) == report["environment"]
    held = json.loads((bundle / "report.json").read_text())
    assert {**held, "stages": []} == {**report, "stages": []}
    assert [row["metrics"] for row in held["stages"]] == [row["metrics"] for row in report["stages"]]
    assert "<html" in (bundle / "report" / "index.html").read_text()
    assert "Apache License" in (bundle / "LICENSE").read_text()
    assert "trained by this recipe" in (bundle / "NOTICE").read_text()


def test_a_server_gets_the_threads_and_batches_of_the_best_measured_throughput(finished: Path) -> None:
    bundle = read_bundle(finished / "bundle")
    rows = json.loads((finished / "report.json").read_text())["deployed"]
    best = max((row for row in rows if row["name"] == bundle.served), key=lambda row: row["throughput_ips"])
    assert bundle.manifest["serving"] == {
        "files": {"cpu": bundle.served, "cuda": "student_fp16", "tensorrt": "student_fp16"},
        "kind": "cpu", "threads": best["threads"], "instances": 1, "max_batch_size": 2,
    }  # fmt: skip


def test_the_card_is_one_that_hugging_face_reads(finished: Path) -> None:
    bundle = read_bundle(finished / "bundle")
    found = ModelCard((finished / "bundle" / "README.md").read_text())
    assert isinstance(found.data, ModelCardData)
    assert (found.data.library_name, found.data.pipeline_tag) == ("onnx", "image-classification")
    assert found.data.eval_results is not None
    (result,) = found.data.eval_results
    files: Any = bundle.manifest["files"]
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "digits",
        "accuracy",
        files[bundle.served]["score"],
    )


def test_unknown_numbers_are_left_out_of_the_card(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    for row in report["deployed"]:
        row["speedup"] = row["speedup_vs_student_fp32"] = None
    tensors = {"input": Value("input", (None, 3, 8, 8), "float32"), "outputs": (Value("logits", (None, 3), "float32"),)}
    text = card(report, name="net", served="student_int8", classes=3, golden=2, tensors=tensors)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.97778
    header = next(line for line in body.splitlines() if line.startswith("| File"))
    assert "Top-1" in header
    assert "vs teacher" not in header
    assert "None" not in body.replace("run(None", "")
    assert "nan" not in body
    assert "INT8 file with ONNX Runtime 1.21 to 1.24 on processors with AMX (`amx_int8`)" in body
    report["deployed"] = [row for row in report["deployed"] if row["precision"] != "int8"]
    text = card(report, name="net", served="student_fp16", classes=3, golden=2, tensors=tensors)
    assert "AMX" not in text, "float files are computed rightly"


@pytest.mark.parametrize(
    ("task", "hub"),
    [
        ("segmentation", ("image-segmentation", "mean_iou")),
        ("detection", ("object-detection", "mAP")),
        ("multilabel", ("image-classification", "mAP")),
        ("unlabelled", ("image-classification", "agreement")),
    ],
)
def test_the_card_of_another_task_says_so(tmp_path: Path, task: str, hub: tuple[str, str]) -> None:
    report = build_report(tmp_path)
    report["recipe"]["task"] = task
    data = front_matter(report, "net", "student_int8")
    (result,) = data["model-index"][0]["results"]
    assert (data["pipeline_tag"], result["task"]["type"]) == (hub[0], hub[0])
    assert result["metrics"][0]["type"] == hub[1]


@pytest.mark.parametrize(
    ("target", "further", "expected"),
    [
        ("cpu_vnni", [], {"cpu": "student_int8", "cuda": "student_fp16", "tensorrt": "student_fp16"}),
        ("cpu_vnni", ["student_int8_tensorrt"], {"cpu": "student_int8", "cuda": "student_fp16", "tensorrt": "student_int8_tensorrt"}),
        ("tensorrt", [], {"cpu": "student_fp32", "cuda": "student_fp16", "tensorrt": "student_int8"}),
        ("cuda", [], {"cpu": "student_fp32", "cuda": "student_fp16", "tensorrt": "student_fp16"}),
    ],
)  # fmt: skip
def test_each_kind_of_machine_gets_the_file_that_is_right_there(
    tmp_path: Path, target: str, further: list[str], expected: dict[str, str]
) -> None:
    report = build_report(tmp_path)
    report["recommendation"] = None
    names = ["teacher_fp32", "student_fp32", "student_fp16", "student_ptq_int8", "student_int8", *further]
    if target == "cuda":
        names = names[:3]
    found = serving_of(report, {name: Path(name) for name in names}, TARGETS[target], size=224)
    assert found.files == expected
    assert found.kind == ("cpu" if target.startswith("cpu") else target)


def test_a_published_bundle_is_the_runs_and_shares_its_models(finished: Path, tmp_path: Path) -> None:
    publish(finished, tmp_path / "out", key=None)
    assert contents(tmp_path / "out") == contents(finished / "bundle")
    found = read_bundle(tmp_path / "out")
    served = found.files[found.served]
    assert (tmp_path / "out" / "serving" / "triton" / "small" / "1" / "model.onnx").samefile(served)
    assert not served.samefile(finished / "bundle" / served.name)
    publish(finished, tmp_path / "out", key=None)  # an older bundle is replaced
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publishing_replaces_nothing_but_a_bundle(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        publish(finished, tmp_path / "home", key=None)


def test_a_damaged_bundle_is_not_published(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "bundle", tmp_path / "run" / "bundle")
    (tmp_path / "run" / "bundle" / "labels.txt").write_text("other\n")
    with pytest.raises(BundleError, match=r"labels\.txt: is not the file"):
        publish(tmp_path / "run", tmp_path / "out", key=None)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_bundle_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no bundle; run its recipe up to the export stage"):
        publish(tmp_path, tmp_path / "out", key=None)


def test_a_bundle_that_cannot_be_signed_is_not_published(finished: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["publish", str(finished), "--to", str(tmp_path / "out"), "--sign", os.devnull])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_publishes_and_says_where(finished: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["publish", str(finished), "--to", str(tmp_path / "out")], catch_exceptions=False)
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'out'}\n")
    read_bundle(tmp_path / "out")


def test_a_dry_run_lists_what_the_hub_would_hold_and_asks_no_server(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    command = ["publish", str(finished), "--to", "hf://user/small", "--dry-run"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    *files, end = result.output.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in map(str.split, files)}
    assert listed == {name: len(content) for name, content in contents(finished / "bundle").items()}
    assert end == f"hf://user/small: would get these {len(files)} files; nothing was sent"


def test_a_process_of_its_own_reaches_the_hub_s_library(finished: Path) -> None:
    """It has its modules only once somebody imported them, as other tests do."""
    command = [sys.executable, "-m", "compress.cli", "publish", str(finished), "--to", "hf://user/small", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing was sent" in done.stdout


def test_a_bundles_page_is_never_written_again(finished: Path) -> None:
    before = contents(finished / "bundle")
    with pytest.raises(ArtifactError, match="is a bundle, whose files never change; give the folder of its run"):
        print_again(finished / "bundle", verbose=False)
    assert contents(finished / "bundle") == before


def test_the_hub_gets_the_bundle_in_one_commit(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def create_repo(self, repository: str, *, exist_ok: bool) -> None:
            asked["made"] = repository, exist_ok

        def upload_folder(self, *, folder_path: Path, **said: Any) -> None:
            asked.update(said, sent=contents(folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    publish_to_hub(finished, "hf://user/small", key=None, dry_run=False)
    assert asked == {
        "made": ("user/small", True),
        "repo_id": "user/small",
        "commit_message": "The bundle of small",
        "delete_patterns": ["*"],
        "sent": contents(finished / "bundle"),
    }


def test_a_hub_that_cannot_be_reached_is_one_sentence(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["publish", str(finished), "--to", "hf://user/small"])
    assert result.exit_code == 2
    assert result.output.startswith("hf://user/small: ConnectError: ")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("to", ["hf://small", "hf://a/b/c", "hf://us er/x", "hf://"])
def test_another_name_is_refused(finished: Path, to: str) -> None:
    with pytest.raises(ArtifactError, match="give hf://USER/NAME"):
        publish_to_hub(finished, to, key=None, dry_run=True)
