"""Several students, a latency to keep, further targets, FP16, comparisons and searches: for masks and boxes as for labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import few_scenes
from typer.testing import CliRunner

from compress.cli import app
from compress.data.named import DATA_SETS, NamedSet
from compress.models.saved import save_network
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.recipe.schema import Recipe
from compress.recipe.stages import PruneStage
from compress.run import open_run
from compress.stages import prune
from export.bundle.read import read_bundle

pytestmark = pytest.mark.acceptance  # the chains of each task hold the rest
HEAD = """
name: {name}
task: {task}
target: cpu_avx2
further_targets: [cpu_vnni]
data: {{dataset: scenes_plain, image_size: 48, eval_batch_size: 32, limit_per_class: 64}}
model: {{arch: "{networks}:{network}"}}
stages:
  - {{stage: source, fit: {{epochs: 4, batch_size: 8, optimizer: adamw, lr: 0.005}}}}
"""
REST = """
      - {stage: ptq, calibration_images: 16, methods: [minmax]}
      - {stage: export, verify_images: 8, limits: {max_float_fraction: 0.5}}
      - {stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}
"""
STUDENTS = f"""
students:
  half:
    stages:
      - {{stage: prune, keep_macs: 0.6, round_to: 4}}{REST}
  third:
    stages:
      - {{stage: prune, keep_macs: 0.4, round_to: 4}}
"""
NETWORKS = {"segmentation": "outlines", "detection": "boxes"}
FEW = NamedSet(32, scenes=few_scenes("scenes_plain", train=64, val=32))
TITLES = {"segmentation": "mIoU", "detection": "mAP"}


def head(task: str) -> str:
    file = Path(__file__).with_name("networks.py")
    return HEAD.format(name=task, task=task, networks=file, network=NETWORKS[task])


@pytest.fixture(scope="module", params=["segmentation", "detection"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two students."""
    folder = tmp_path_factory.mktemp("alike")
    (folder / "recipe.yaml").write_text(head(request.param) + STUDENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_SETS, "scenes_plain", FEW)
        recipe = read_recipe(folder / "recipe.yaml", [f"out={folder}"])
        assert run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run recipe.yaml") == 0
    return folder / str(request.param)


def report_of(root: Path, student: str) -> Any:
    return json.loads((root / "students" / student / "report.json").read_text())


def test_each_target_has_its_files_and_half_precision_scores_as_single(root: Path) -> None:
    rows = {row["name"]: row["score"] for row in report_of(root, "half")["deployed"]}
    assert {"student_ptq_int8", "student_ptq_int8_cpu_vnni", "student_fp16"} <= rows.keys()
    assert rows["student_fp16"] == pytest.approx(rows["student_fp32"], abs=0.01)
    assert rows["student_ptq_int8_cpu_vnni"] > 0.5 * rows["student_fp32"] > 0
    assert read_bundle(root / "students" / "half" / "bundle").golden.outputs["student_ptq_int8"].shape[0] > 0


def test_students_are_compared_in_the_words_of_their_metric(root: Path) -> None:
    compared = json.loads((root / "comparison.json").read_text())
    assert [one["name"] for one in compared["candidates"]] == ["half", "third"]
    folders = [str(root / "students" / name) for name in ("half", "third")]
    done = CliRunner().invoke(app, ["compare", *folders, "--html", str(root / "page.html")])
    assert done.exit_code == 0, done.output
    page = (root / "page.html").read_text()
    assert TITLES[root.name] in page
    assert "top-1" not in page.lower()


@pytest.mark.parametrize(("task", "arch"), [("segmentation", "fpn:resnet18"), ("detection", "ssd:resnet18")])
def test_a_cut_keeps_its_fraction_of_the_latency(
    task: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATA_SETS, "scenes_plain", FEW)
    data = {"dataset": "scenes_plain", "image_size": 64}
    stages = [{"stage": "source", "fit": {"epochs": 1}}]
    given = {"name": "a", "task": task, "out": str(tmp_path), "data": data, "model": {"arch": arch}, "stages": stages}
    run = open_run(Recipe.model_validate(given), trust_code=False, verbose=False)
    assert run.recipe.model is not None
    architecture, model = run.start(run.recipe.model)
    for name in ("source", "prune"):
        (tmp_path / name).mkdir()
    save_network(model, architecture, tmp_path / "source")
    section = PruneStage(stage="prune", keep_latency=0.6)
    metrics = prune.apply(section, tmp_path / "source", tmp_path / "prune", run)
    before, after = metrics["latency_before_ms"], metrics["latency_ms"]
    assert before is not None
    assert after is not None
    assert after <= 0.6 * before


def test_a_search_tries_either_task(tmp_path: Path) -> None:
    for task in NETWORKS:
        (tmp_path / f"{task}.yaml").write_text(f"{head(task)}  - {{stage: prune, keep_macs: 0.6, round_to: 4}}\n")
    (tmp_path / "search.yaml").write_text(
        "{name: both, recipes: [segmentation.yaml, detection.yaml], sampler: grid, objectives: [score, macs], "
        "judge_by: validation, set: [source.fit.epochs=1], space: {prune.keep_macs: [0.6]}}"
    )
    words = ["search", str(tmp_path / "search.yaml"), "--out", str(tmp_path), "--trust-code"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("both/trials/*/report.json")]
    assert sorted(report["metric"]["title"] for report in reports) == sorted(TITLES.values())
    assert np.isfinite([report["stages"][-1]["metrics"]["score"] for report in reports]).all()
