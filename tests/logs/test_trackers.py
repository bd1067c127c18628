"""What a run logs reaches its trackers, goes on where it stopped, and no tracker's fault ends a training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from elsewhere.files import ENVIRONMENTS, is_there
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import CompressError
from compress.logs import trackers
from compress.logs.stage_log import StageLog
from compress.logs.trackers import Tracker, opened

ROOT = Path(__file__).parents[2]
Sent = list[tuple[Any, ...]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What reaches two libraries, of which wandb fails at the second epoch."""
    found: Sent = []

    def library(name: str) -> Any:
        def numbers(values: Mapping[str, float], epoch: int) -> None:
            if name == "wandb" and epoch == 2:
                raise ConnectionError("no route\nto the host")
            found.append((name, dict(values), epoch))

        def open_(_library: ModuleType, run: str, key: str, parameters: Mapping[str, str]) -> Tracker:
            found.append((name, run, key, parameters))
            files = lambda paths: found.append((name, sorted(paths)))  # noqa: E731
            return Tracker(numbers, files, lambda whole: found.append((name, "closed" if whole else "failed")))

        return open_

    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(trackers.TRACKERS, name, library(name))
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name != "trackio" or None)
    return found


def finished(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [{"stage": "source", "metrics": {"score": 0.5, "unknown": None}}]
    (folder / "report.json").write_text(json.dumps({"stages": rows}))
    (folder / "bundle").mkdir()
    return folder


def test_a_sink_gets_settings_epochs_numbers_and_files(sent: Sent, tmp_path: Path) -> None:
    settings = {"seed": 3, "further_targets": ["cpu_arm"], "stages": [{"stage": "source", "fit": {"lr": 0.5}}]}
    with opened(["mlflow"], "tiny", tmp_path, settings) as told:
        with StageLog(tmp_path, stage="source", tell=told.epoch) as log:
            log.start(epochs=1, batches=1)
            log.epoch({"loss": 0.25})
        told.finish({"": finished(tmp_path / "run"), "small": finished(tmp_path / "small")})
    key = (tmp_path / ".logged-as").read_text()
    parameters = {
        "seed": "3",
        "further_targets": "['cpu_arm']",
        "stages.0.source.stage": "source",
        "stages.0.source.fit.lr": "0.5",
    }
    assert sent == [
        ("mlflow", "tiny", key, parameters),
        ("mlflow", {"source/loss": 0.25}, 1),
        ("mlflow", {"source/final_score": 0.5, "small/source/final_score": 0.5}, 0),
        ("mlflow", ["bundle", "report.json", "small/bundle", "small/report.json"]),
        ("mlflow", "closed"),
    ]  # fmt: skip


def test_a_run_that_goes_on_is_the_same_run_there(sent: Sent, tmp_path: Path) -> None:
    for _ in range(2):
        with opened(["mlflow"], "tiny", tmp_path, {}):
            pass
    assert sent[0] == sent[2]


def test_a_sink_that_fails_is_told_of_once_and_the_run_goes_on(
    sent: Sent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(["wandb", "mlflow"], "tiny", tmp_path, {}) as told:
        for epoch in (1, 2, 3):
            told.epoch("source", epoch, {"loss": 0.5})
    assert [(one[0], one[2]) for one in sent if len(one) == 3] == [
        ("wandb", 1),
        ("mlflow", 1),
        ("mlflow", 2),
        ("mlflow", 3),
    ]
    assert capsys.readouterr().err == "log_to: wandb: ConnectionError: no route; the run goes on without it\n"


def test_a_missing_library_is_named(sent: Sent, tmp_path: Path) -> None:
    expected = pytest.raises(CompressError, match=r"log_to: trackio is not installed: pip install trackio")
    with expected, opened(["mlflow", "trackio"], "tiny", tmp_path, {}):
        pass
    assert sent[-1] == ("mlflow", "failed")


def test_a_run_that_is_told_to_end_is_no_running_one_there(sent: Sent, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), opened(["mlflow"], "tiny", tmp_path, {}):
        os.kill(os.getpid(), signal.SIGTERM)
    assert sent[-1] == ("mlflow", "failed")
    assert signal.getsignal(signal.SIGTERM) is before


RECIPE = """
name: sent
log_to: [mlflow]
data: {image_size: 16, limit_per_class: 10}
model: {arch: "cifar:resnet20"}
stages:
  - {stage: source, fit: {epochs: 2, batch_size: 32, lr: 0.05}}
"""


def test_a_run_sends_its_epochs_and_its_report(sent: Sent, tmp_path: Path) -> None:
    (tmp_path / "sent.yaml").write_text(RECIPE)
    command = ["run", str(tmp_path / "sent.yaml"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sent[0][3]["stages.0.source.fit.lr"] == "0.05"
    measured = [one for one in sent if len(one) == 3]
    assert [epoch for _, _, epoch in measured] == [1, 2, 0]
    report = json.loads((tmp_path / "sent" / "report.json").read_text())
    assert (
        measured[1][1]["source/score"]
        == measured[2][1]["source/final_score"]
        == report["stages"][0]["metrics"]["score"]
    )
    assert sent[-2:] == [("mlflow", ["report", "report.json"]), ("mlflow", "closed")]
    kept = [path.name for path in (tmp_path / "sent").glob("00-*")]

    def unreachable(*_: object) -> Tracker:
        raise ConnectionError("no such host")

    trackers.TRACKERS["mlflow"] = unreachable  # which the fixture puts right
    result = CliRunner().invoke(app, [*command, "--set", "source.fit.epochs=3"])
    assert (result.exit_code, result.output) == (
        2,
        "sent: source will run\nlog_to: mlflow: ConnectionError: no such host; start its server, or leave it out\n",
    )
    assert [path.name for path in (tmp_path / "sent").glob("00-*")] == kept


def run_there(
    environment: str, tracker: str, folder: Path, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    if not is_there(environment):
        pytest.skip("run `make elsewhere`")
    command = [
        str(ENVIRONMENTS / environment / "bin" / "python"),
        str(ROOT / "tools/elsewhere/run_trackers.py"),
        tracker,
        str(folder),
        *more,
    ]
    known = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder),
    }
    return subprocess.run(command, env=known | variables, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A real MLflow server with a database of its own."""
    if not is_there("mlflow"):
        pytest.skip("run `make elsewhere`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(ENVIRONMENTS / "mlflow/bin/mlflow"), "server", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/store.db", "--artifacts-destination", str(tmp_path / "kept")]
    process = subprocess.Popen(
        [*command, *store], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.slow
def test_an_mlflow_server_that_dies_ends_no_run(server: tuple[str, int], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said = run_there("mlflow", "mlflow", tmp_path / "run", str(server[1]), MLFLOW_TRACKING_URI=server[0])
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("the run goes on without it") == 1


@pytest.mark.slow
def test_an_mlflow_server_has_one_run_with_all_of_it(server: tuple[str, int], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said = run_there("mlflow", "mlflow", tmp_path / "run", MLFLOW_TRACKING_URI=server[0])
    assert said.returncode == 0, said.stderr
    asked = urllib.request.Request(
        f"{server[0]}/api/2.0/mlflow/runs/search",
        data=b'{"experiment_ids": ["1"]}',
        headers={"Content-Type": "application/json"},
    )
    (run,) = json.load(urllib.request.urlopen(asked))["runs"]
    assert run["info"]["run_name"] == "tiny"
    assert {one["key"]: one["value"] for one in run["data"]["metrics"]} == {
        "source/loss": 1 / 3,
        "source/score": 0.75,
        "source/final_score": 0.75,
    }
    assert {"key": "stages.0.source.fit.lr", "value": "0.5"} in run["data"]["params"]
    assert {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()} == {"report.json", "README.md"}


@pytest.mark.slow
def test_a_server_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    said = run_there("mlflow", "mlflow", tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "CompressError: log_to: mlflow: MlflowException: API request to http://127.0.0.1:9" in said.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_trackio_and_wandb_take_a_run_and_go_on_with_it(tracker: str, tmp_path: Path) -> None:
    said = run_there("trackers", tracker, tmp_path)
    assert said.returncode == 0, said.stderr
    assert "goes on without it" not in said.stderr
    assert (tmp_path / ("compress.db" if tracker == "trackio" else "wandb/latest-run")).exists()
