"""The gate as a pytest plugin, in a pytest of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gated_bundles import flip_a_byte, gated_place

REPOSITORY = Path(__file__).parents[2]
MARKED = """
import pytest

@pytest.mark.compression({limits})
def test_bundle():
    print("the body ran")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gated_place(tmp_path_factory.mktemp("plugin"))


def suite(place: Path, *words: object, limits: str = "max_latency_ratio=None") -> str:
    """What pytest says of one marked test; warnings are errors there too."""
    (place / "test_it.py").write_text(MARKED.format(limits=limits))
    # Whether or not this environment's copy of the package has the entry point, the plugin is this folder's.
    plugin = ("-p", "no:compression", "-p", "export.gate.pytest_plugin", "-p", "no:cacheprovider")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rA",
            "--strict-markers",
            "-W",
            "error",
            *plugin,
            "test_it.py",
            *map(str, words),
        ],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_the_accepted_bundle_passes_and_the_body_runs(place: Path) -> None:
    said = suite(place, "--bundle", "bundle")
    assert "1 passed" in said
    assert "the body ran" in said


def test_a_broken_bundle_fails_before_the_body_and_shows_the_verdict(place: Path) -> None:
    shutil.copytree(place / "bundle", place / "broken")
    flip_a_byte(place / "broken")
    said = suite(place, "--bundle", "broken")
    assert "1 failed" in said
    assert "student_int8.onnx: is not the file the bundle was made with" in said
    assert "the body ran" not in said
    assert "Traceback" not in said


def test_a_marked_test_is_skipped_without_a_bundle(place: Path) -> None:
    assert "no --bundle to judge" in suite(place)


def test_the_baseline_is_recorded_on_demand(place: Path) -> None:
    words = ("--bundle", "bundle", "--baseline", "other", "--bundle-data", "images.npz")
    assert "1 passed" in suite(place, *words, "--update-baseline")
    assert len(list((place / "other").iterdir())) == 1
    assert "1 passed" in suite(place, *words)


def test_an_unknown_limit_is_a_sentence(place: Path) -> None:
    by_place = "1.05)\ndef test_other():\n    pass\n\n@pytest.mark.compression(max_latncy_ratio=1.05"
    said = suite(place, "--bundle", "bundle", limits=by_place)
    takes = "takes max_latency_ratio, min_score_ratio, max_size_ratio by name, got"
    assert f"{takes} 1.05" in said
    assert f"{takes} max_latncy_ratio" in said


def test_the_plugin_costs_other_suites_nothing() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import export.gate.pytest_plugin; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['export', 'export.gate', 'export.gate.pytest_plugin']"


def test_the_entry_point_names_the_plugin() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"compression": "export.gate.pytest_plugin"}
