"""The bench stage's classes, from a run's first stage to its exit code: a teacher that knows nothing, images that are broken."""

import json
from pathlib import Path

import pytest
from photographs import write_classes

from compress.errors import ModelError
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.report.shape import Report

NETWORKS = Path(__file__).parents[1] / "networks.py"
RECIPE = f"""
name: small
target: cpu_avx2
data: {{dataset: digits, image_size: 16, limit_per_class: 20}}
model: {{arch: "{NETWORKS}:small"}}
stages:
  - {{stage: source, fit: {{epochs: 1, batch_size: 32, lr: 0.05}}}}
  - {{stage: prune, keep_macs: 0.9}}
  - {{stage: export, verify_images: 8, golden_images: 2}}
  - {{stage: bench, seconds: 0.02, blocks: 6, batches: [1], threads: [1]}}
targets: {{max_drop: 0.5}}
"""
SOFTMAX = """
from torch import nn
def network(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes), nn.Softmax(1))
"""


def run(folder: Path, *overrides: str) -> tuple[int, Report]:
    (folder / "small.yaml").write_text(RECIPE)
    recipe = read_recipe(folder / "small.yaml", [f"out={folder}", *overrides])
    code = run_recipe(recipe, trust_code=True, until=None, verbose=False, command="compress run small.yaml")
    return code, json.loads((folder / "small" / "report.json").read_text())


def test_an_untrained_teacher_fails_targets_that_its_student_meets(tmp_path: Path) -> None:
    code, report = run(tmp_path, "source.fit.lr=1e-9")
    assert code == 1
    assert report["failures"][0].startswith("teacher_fp32 predicts at chance: ")
    assert len(report["failures"]) == 1  # the target itself is met


def test_broken_images_are_counted_and_every_class_is_reported(tmp_path: Path) -> None:
    for part, images in (("train", 12), ("val", 7)):
        write_classes(tmp_path / "data" / part, per_class=images)
        (tmp_path / "data" / part / "dog" / "5.png").write_text("no image")
    code, report = run(
        tmp_path,
        "data.dataset=imagefolder",
        f"data.path={tmp_path / 'data'}",
        "data.skip_broken=true",
        "data.limit_per_class=null",
        "targets.max_drop=null",
    )
    assert code == 0
    assert "validation images that cannot be read count in no score: 1, first val/dog/5.png" in report["warnings"]
    assert "source: training images that cannot be read were left out: 1" in report["warnings"]
    classes = report["classes"]
    assert classes is not None
    assert (classes["names"], classes["images"]) == (["cat", "dog", "owl"], [7, 6, 7])
    assert set(classes["files"]) == {"teacher_fp32", "student_fp32", "student_fp16"}
    for row in report["deployed"]:
        found = classes["files"][row["name"]]
        assert sum(found["correct"]) / 20 == row["score"]
        assert sum(found["answered"]) == row["images"] == 20


@pytest.mark.parametrize("place", ["teacher", "student"])
def test_a_network_that_ends_in_softmax_is_refused_before_the_teacher_trains(tmp_path: Path, place: str) -> None:
    (tmp_path / "mine.py").write_text(SOFTMAX)
    fit = "fit: {epochs: 1, batch_size: 32, lr: 0.05}"
    student = f"{{stage: student, arch: '{tmp_path}/mine.py:network'}}"
    changes = {
        "teacher": f"model.arch={tmp_path}/mine.py:network",
        "student": f"stages=[{{stage: source, {fit}}}, {student}, {{stage: distill, {fit}}}]",
    }
    with pytest.raises(ModelError, match="Sequential: returns probabilities, as after a softmax"):
        run(tmp_path, changes[place], "targets={}")
    assert not list((tmp_path / "small").glob("00-source-*"))
