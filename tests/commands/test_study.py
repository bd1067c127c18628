"""Studies: several recipes, variants and seeds in one table."""

import json
import re
from pathlib import Path

import pytest

from compress.commands.study import Study, measurements, read_study, run_study
from compress.errors import CompressError
from compress.recipe import strict_yaml
from compress.recipe.read import read_recipe

STUDIES = sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml"))
PAGE = Path(__file__).parents[2] / "docs" / "study.md"
RECIPE = """
name: studied
data: {{dataset: digits, image_size: 16, limit_per_class: 10}}
model: {{arch: "{networks}:small"}}
stages:
  - {{stage: source, fit: {{epochs: 1, batch_size: 32}}}}
  - {{stage: distill, fit: {{epochs: 1, batch_size: 32, lr: 0.02}}}}
"""
STUDY = """
name: two
recipes: [a.yaml]
seeds: [0, 1]
variants:
  slow: []
  fast: ["distill.fit.lr=0.5"]
"""


def test_the_page_shows_a_legal_study_and_names_every_field() -> None:
    page = PAGE.read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    study = Study.model_validate(strict_yaml.load(example[1]))
    for overrides in study.variants.values():
        read_recipe(PAGE.parent.parent / "recipes" / "quickstart.yaml", overrides)
    assert [field for field in Study.model_fields if f"| `{field}` |" not in page] == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_is_a_legal_recipe(path: Path) -> None:
    study = read_study(path)
    for recipe in study.recipes:
        for overrides in study.variants.values():
            read_recipe(path.parent / recipe, overrides, data="/data/images")
    assert "Command:" in path.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nrecipes: []\nvariants: {a: []}\n", "recipes"),
        ("name: a\nname: b\n", "name"),
        ("[]", "must be a mapping"),
        ("name: A b\nrecipes: [a]\nvariants: {a/b: []}\n", r"(?s)name: must be lower-case .*variants\.a/b"),
    ],
)
def test_a_wrong_study_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(CompressError, match=words):
        read_study(tmp_path / "study.yaml")


def test_measurements_name_where_each_number_comes_from() -> None:
    method = {"engine": "onnxruntime", "method": "minmax", "scored_in": "onnxruntime", "score": 0.5}
    report = {
        "stages": [
            {"stage": "source", "metrics": {"score": 0.9}},
            {"stage": "ptq", "metrics": {"score": 0.8}},
            {"stage": "qat", "metrics": {"score": 0.7}},
        ],
        "deployed": [{"name": "student_int8", "score": 0.6}, {"name": "teacher_fp32", "score": 0.9}],
        "ptq": {"targets": {"cpu_vnni": {"methods": [method, method | {"method": "x", "score": None}]}}},
    }
    assert measurements(report) == {
        "source (PyTorch)": 0.9,
        "qat (PyTorch)": 0.7,
        "teacher_fp32": 0.9,
        "student_int8": 0.6,
        "PTQ onnxruntime minmax, cpu_vnni": 0.5,
    }


@pytest.mark.slow
def test_a_study_runs_every_variant_and_seed_with_the_first_seeds_teacher(tmp_path: Path) -> None:
    networks = Path(__file__).parents[1] / "networks.py"
    (tmp_path / "a.yaml").write_text(RECIPE.format(networks=networks))
    (tmp_path / "study.yaml").write_text(STUDY)
    out = tmp_path / "runs"
    text = run_study(tmp_path / "study.yaml", data=None, out=str(out), arguments=("--trust-code",))
    reports = {path.stem: json.loads(path.read_text()) for path in (out / "two").glob("*.json")}
    assert set(reports) == {"a-slow-0", "a-slow-1", "a-fast-0", "a-fast-1"}
    teachers = {name: report["stages"][0]["metrics"]["score"] for name, report in reports.items()}
    assert len(set(teachers.values())) == 1
    assert reports["a-slow-1"]["recipe"]["model"]["weights"].endswith("weights.safetensors")
    assert reports["a-slow-0"]["recipe"]["stages"][1]["fit"]["lr"] == 0.02
    assert "| source (PyTorch) |" in text
    assert "| distill (PyTorch), slow |" in text
    assert "| distill (PyTorch), fast |" in text
