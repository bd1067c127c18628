"""Loads like MLPerf's; MLCommons' LoadGen lives in an environment that `make elsewhere` makes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elsewhere.serving import PYTHON, ROOT, is_there, start
from onnx_files import small_files, write_small_bundle

from export import loadgen

PERCENTILES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "p99_9_ms")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_there(), reason="run `make elsewhere`")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    write_small_bundle(folder / "bundle", small_files(folder))
    return folder / "bundle"


@pytest.fixture(scope="module")
def sleeper() -> dict[str, dict[str, Any]]:
    """Every scenario's row for a network that takes 10 ms for up to four images."""
    command = [str(PYTHON), str(ROOT / "tools/elsewhere/run_loadgen.py"), "10", "4"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row["scenario"]: row for row in json.loads(done.stdout)}


def test_one_image_at_a_time_takes_as_long_as_the_network(sleeper: dict[str, dict[str, Any]]) -> None:
    row = sleeper["single_stream"]
    assert row["images_per_query"] == 1
    assert 10 <= row["p50_ms"] < 20  # bounds for a busy machine
    assert 50 < row["images_per_second"] <= 100


def test_eight_images_at_once_are_two_runs_of_four(sleeper: dict[str, dict[str, Any]]) -> None:
    row = sleeper["multi_stream"]
    assert row["images_per_query"] == 8
    assert 20 <= row["p50_ms"] < 40
    assert 200 < row["images_per_second"] <= 400


def test_all_at_once_fill_every_run(sleeper: dict[str, dict[str, Any]]) -> None:
    row = sleeper["offline"]
    assert (row["queries"], row["p50_ms"]) == (1, None)
    assert row["images_per_query"] >= 400  # a second's worth
    assert 200 < row["images_per_second"] <= 400


def test_random_arrivals_come_at_the_asked_rate_and_some_wait(sleeper: dict[str, dict[str, Any]]) -> None:
    """Poisson arrivals at 20 a second: an image finds the network busy now and then, so the tail is longer than one run."""
    row = sleeper["server"]
    assert row["asked_qps"] == 20
    assert row["images_per_second"] == pytest.approx(20, rel=0.4)  # 64 arrivals: one sigma is 12 %
    assert 10 <= row["p50_ms"] < 20
    assert row["p99_ms"] > 13


def test_every_scenario_of_a_bundle_is_measured_and_called_what_it_is(bundle: Path, tmp_path: Path) -> None:
    with start(
        "export.loadgen", str(bundle), "--seconds", "0.1", "--qps", "200", "--json", str(tmp_path / "a.json")
    ) as run:
        text, errors = run.communicate(timeout=120)
    assert (run.returncode, errors) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())
    for output in (text, found["notice"]):
        assert output.startswith("MLPerf-style load, not an MLPerf result")
    assert [row["scenario"] for row in found["scenarios"]] == list(loadgen.SCENARIOS)
    assert (found["file"], found["bundle"]) == ("student_fp32.onnx", "small")
    for row in found["scenarios"]:
        assert row["queries"] * row["images_per_query"] >= 64
        times = [row[name] for name in PERCENTILES]
        assert times == [None] * 5 if row["scenario"] == "offline" else sorted(times)
        assert f"{row['scenario']} " in text


def test_a_rate_beyond_the_machine_is_one_sentence(bundle: Path) -> None:
    with start("export.loadgen", str(bundle), "--seconds", "0.1", "--qps", "1e12") as run:
        text, errors = run.communicate(timeout=60)
    assert (run.returncode, text, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("--qps: this machine processes ")
