"""Other students than the pruned teacher, and several of one teacher in one recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import run as run_small
from typer.testing import CliRunner

from compress.artifact import lineage, read_meta
from compress.cli import app
from compress.errors import CompressError, RecipeError
from compress.models.saved import read_architecture
from compress.pipeline import plan_recipe, run_recipe
from compress.recipe.read import read_recipe, write_recipe
from compress.recipe.schema import Recipe
from export.bundle.read import read_bundle

NETWORKS = Path(__file__).with_name("networks.py")
DISTILL = """
      - {stage: distill, fit: {epochs: 2, batch_size: 32, lr: 0.05}}"""
INTEGERS = """
      - {stage: ptq, calibration_images: 64, methods: [minmax]}"""
REST = """
      - {stage: export, verify_images: 64}
      - {stage: bench, seconds: 0.05, blocks: 6, batches: [1], threads: [1]}
"""
RECIPE = f"""
name: several
target: cpu_avx2
data: {{dataset: digits, image_size: 16, limit_per_class: 40}}
model: {{arch: "{NETWORKS}:small"}}
stages:
  - {{stage: source, fit: {{epochs: 4, batch_size: 32, lr: 0.05}}}}
students:
  half:
    stages:
      - {{stage: prune, keep_macs: 0.5}}{DISTILL}{INTEGERS}{REST}
  thin:
    targets: {{max_size_ratio: 0.9}}
    stages:
      - {{stage: student, arch: "{NETWORKS}:thin"}}{DISTILL}{REST}
"""


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "several.yaml"
    path.write_text(RECIPE)
    return read_recipe(path, [f"out={folder}", *overrides])


def run(folder: Path, *overrides: str) -> int:
    made = recipe(folder, *overrides)
    return run_recipe(made, trust_code=True, until=None, verbose=False, command="compress run several.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    assert run(folder) == 0
    return folder / "several"


def report(root: Path, student: str) -> Any:
    return json.loads((root / "students" / student / "report.json").read_text())


def test_all_students_learn_from_one_teacher(finished: Path) -> None:
    sources = {
        lineage(Path(finished / "students" / student / report(finished, student)["stages"][-1]["directory"]))[
            0
        ].resolve()
        for student in ("half", "thin")
    }
    assert len(sources) == 1
    assert len(list(finished.glob("00-source-*"))) == 1
    assert len(list((finished.parent / "teacher-logits").iterdir())) == 1


def test_another_network_takes_the_pruned_teachers_place(finished: Path) -> None:
    (folder,) = finished.glob("01-student-*")
    assert read_architecture(folder).arch == f"{NETWORKS}:thin"
    teacher, student = (read_meta(next(finished.glob(name))).metrics for name in ("00-source-*", "01-student-*"))
    assert student["params_m"] < teacher["params_m"]  # type: ignore[operator]
    distilled = report(finished, "thin")["stages"][2]["metrics"]
    assert distilled["params_m"] == student["params_m"]
    assert distilled["score"] > 0.3 > student["score"]  # type: ignore[operator]


def test_every_student_has_its_report_and_its_bundle(finished: Path) -> None:
    for student, last in (("half", "student_ptq_int8"), ("thin", "student_fp16")):
        folder = finished / "students" / student
        assert f"<title>several · {student} · compression report" in (folder / "report" / "index.html").read_text()
        assert [*read_bundle(folder / "bundle").files][-1] == last
        assert [row["name"] for row in report(finished, student)["deployed"]][:2] == ["teacher_fp32", "student_fp32"]


def test_commands_on_the_whole_run_name_its_students(finished: Path, tmp_path: Path) -> None:
    names = f"{finished}/students/half or {finished}/students/thin"
    for words in (
        ["publish", finished, "--to", tmp_path / "out"],
        ["compare", finished, tmp_path],
        ["report", finished],
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert (done.exit_code, names in done.stderr) == (2, True), done.stderr


def test_one_page_compares_the_students_and_links_to_each(finished: Path) -> None:
    page = (finished / "report" / "index.html").read_text()
    assert all(f'href="../students/{student}/report/index.html"' in page for student in ("half", "thin"))
    compared = json.loads((finished / "comparison.json").read_text())
    assert [one["name"] for one in compared["candidates"]] == ["half", "thin"]
    assert len(compared["teachers"]) == 1


def test_a_second_run_makes_nothing_and_a_change_touches_one_student(finished: Path) -> None:
    chains = recipe(finished.parent).chains()
    assert all(line.cached for chain in chains.values() for line in plan_recipe(chain))
    changed = recipe(finished.parent, "students.half.prune.keep_macs=0.4").chains()
    assert [line.cached for line in plan_recipe(changed["half"])] == [True] + 5 * [False]
    assert all(line.cached for line in plan_recipe(changed["thin"]))


def test_each_student_is_judged_by_its_own_targets(finished: Path) -> None:
    assert run(finished.parent, "students.thin.targets.max_size_ratio=0.0001") == 1
    assert report(finished, "thin")["verdict"] == "fail"
    assert report(finished, "half")["verdict"] == "pass"


def test_a_students_weights_are_part_of_its_key(finished: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"one")
    change = f"students.thin.student.weights={weights}"
    first = plan_recipe(recipe(finished.parent, change).chains()["thin"])[1].key
    weights.write_bytes(b"other")
    assert plan_recipe(recipe(finished.parent, change).chains()["thin"])[1].key != first


def test_the_resolved_recipe_reads_back(finished: Path, tmp_path: Path) -> None:
    made = recipe(finished.parent)
    write_recipe(made, tmp_path / "again.yaml")
    assert read_recipe(tmp_path / "again.yaml") == made


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("students.thin.stages.1.stage=prune", "students.thin.stages.1.fit: unknown key"),
        ("students.thin.stages.0={stage: bench}", "students.thin.stages.0: bench takes onnx, but source gives float"),
        ("students.half.stages.1.stage=student", "students.half.stages.1"),
        ("students.half.stages.2={stage: qat, fit: {epochs: 1}}", "students.half.stages.2: qat needs a ptq stage before it"),
        ("students.thin.stages=[{stage: student, arch: 'torchvision:resnet18'}, {stage: export}]",
         "students.thin.stages.0: its classifier starts untrained: add a distill stage"),
        ("students.Thin={stages: [{stage: prune, keep_macs: 0.5}]}", "students.Thin"),
        ("students.thin.prun.keep_macs=0.5", "unknown path students.thin.prun.keep_macs"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_student_names_its_place(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, override)
    assert sentence in str(error.value)


def test_a_student_stands_right_behind_the_source(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"stages.2: student starts another network, which discards the work of prune"
    ):
        run_small(tmp_path, "stages.2={stage: student, arch: 'torchvision:resnet18'}")


def test_a_student_whose_layers_a_loss_does_not_find_is_refused_before_the_teacher_trains(tmp_path: Path) -> None:
    change = "students.thin.distill.loss=[{name: pkt, layers: [block7], teacher_layers: [block1]}]"
    with pytest.raises(CompressError, match="layer 'block7'"):
        run(tmp_path, change)
    assert not list((tmp_path / "several").glob("00-source-*"))
