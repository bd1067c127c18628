"""What the gate writes and reads: baselines, reports, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from gated_bundles import flip_a_byte, gated_place

from export.bundle.read import inspect_here
from export.errors import BundleError
from export.gate.__main__ import main
from export.gate.baseline import find_baseline, read_baseline, write_baseline
from export.gate.checks import Check, Limits, Verdict
from export.gate.commands import judge, update
from export.gate.latency import Plan, Recorded
from export.gate.outputs import as_json, as_junit, as_text
from export.gate.run import Terms
from export.runtime.environment import environment, fingerprint

REPOSITORY = Path(__file__).parents[2]
NO_LATENCY = Limits(max_latency_ratio=None)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox costs a second each time; the files are our own."""
    monkeypatch.setattr("export.gate.subject.vet", inspect_here)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, images, and the bundle's baseline without times."""
    return gated_place(tmp_path_factory.mktemp("gate"))


# Baseline files


def test_the_baseline_is_the_same_bytes_each_time_and_is_named_by_the_machine(place: Path, tmp_path: Path) -> None:
    path, _ = update(place / "bundle", tmp_path, Terms(place / "images.npz", NO_LATENCY, Plan()))
    assert path.name == f"{fingerprint(environment())}.json"
    assert path.read_bytes() == (place / "baselines" / path.name).read_bytes()
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


def test_a_baseline_finds_its_images_from_anywhere_and_says_where_they_were(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(place / "images.npz", tmp_path / "images.npz")
    monkeypatch.chdir(tmp_path)
    update(place / "bundle", tmp_path / "b", Terms(Path("images.npz"), NO_LATENCY, Plan()))
    monkeypatch.chdir(place)
    terms = Terms(None, NO_LATENCY, Plan())
    assert judge(place / "bundle", tmp_path / "b", terms).exit_code == 0
    (tmp_path / "images.npz").unlink()
    (check,) = (one for one in judge(place / "bundle", tmp_path / "b", terms).checks if one.name == "top-1")
    assert (check.status, f"({tmp_path}/images.npz): give --data" in check.detail) == ("inconclusive", True)


def test_a_baseline_reads_back_as_it_was_written(place: Path, tmp_path: Path) -> None:
    timed = replace(
        read_baseline(next((place / "baselines").iterdir())),
        latency=Recorded("student_fp32", 1, 1, [0.5, 0.51], 2.0, 4.0),
    )
    write_baseline(tmp_path / "b.json", timed)
    assert read_baseline(tmp_path / "b.json") == timed


def test_this_machines_baseline_is_taken_before_anothers(tmp_path: Path) -> None:
    for name in ("a", "mine"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert find_baseline(tmp_path, "mine").stem == "mine"
    assert find_baseline(tmp_path, "unknown").stem == "a"


@pytest.mark.parametrize("where", ["nowhere", "nowhere.json", "."])
def test_no_baseline_is_a_sentence_with_the_repair(where: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="record one with --update-baseline"):
        find_baseline(tmp_path / where, "mine")


def without(key: str) -> Callable[[dict[str, object]], object]:
    return lambda document: {name: value for name, value in document.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document | {"schema_version": 99},
        lambda document: document | {"files": {"student_int8": {"bytes": 3}}},
        lambda document: document | {"answers": {"labels": {}, "predictions": {"0": 99}}},
        lambda document: document | {"latency": 5},
        *map(without, ("schema_version", "classes", "environment", "files", "served", "answers", "latency", "data")),
    ],
)
def test_a_damaged_baseline_is_a_sentence(
    damage: Callable[[dict[str, object]], object], place: Path, tmp_path: Path
) -> None:
    document = json.loads(next((place / "baselines").iterdir()).read_text())
    (tmp_path / "b.json").write_text(json.dumps(damage(document)))
    with pytest.raises(BundleError, match=r"b\.json: .*record it with --update-baseline"):
        read_baseline(tmp_path / "b.json")


@pytest.mark.parametrize("document", [[], {"schema_version": 3, "name": "small"}, {"timings": []}])
def test_another_file_is_named_as_such(document: object, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"b\.json: is another file, no baseline: name one"):
        read_baseline(tmp_path / "b.json")


# What the gate writes

VERDICT = Verdict(
    "small, student_int8",
    (
        Check("size", "pass", "1 MB", "1 MB", "1.010 times"),
        Check("top-1", "fail", "90 %", "80 %", "0.995 times", "lost | accuracy\x1b"),
        Check("latency", "inconclusive", detail="noise"),
        Check("operators", "skipped"),
    ),
    environment={"cpu": "A CPU", "cores": 2},
)


def test_junit_tells_failures_from_errors() -> None:
    suite = ElementTree.fromstring(as_junit(VERDICT))
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
    }
    failure = suite.find("testcase[@name='top-1']/failure")
    assert failure is not None
    assert (failure.get("message"), failure.text) == (
        "fail: lost | accuracy?",
        "baseline 90 %, now 80 %, limit 0.995 times",
    )


def test_the_terminal_text_ends_with_the_verdict() -> None:
    assert as_text(VERDICT).splitlines()[-1] == "fail: worse than the baseline (top-1, latency)"


def test_the_worst_check_decides() -> None:
    codes = {
        status: Verdict("", (Check("a", "pass"), Check("b", status))).exit_code
        for status in ("pass", "skipped", "unexplained", "inconclusive", "fail", "broken")
    }
    assert codes == {"pass": 0, "skipped": 0, "unexplained": 2, "inconclusive": 2, "fail": 1, "broken": 3}
    assert VERDICT.exit_code == 1


def test_json_has_everything() -> None:
    document = json.loads(as_json(VERDICT))
    assert (document["status"], document["exit_code"], len(document["checks"])) == ("fail", 1, 4)


# The command


def command(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {**os.environ, "PYTHONPATH": str(REPOSITORY)} | variables
    return subprocess.run(
        [sys.executable, "-m", "export.gate", *map(str, words)], cwd=cwd, env=inherited, capture_output=True, text=True
    )


def test_the_command_records_judges_and_writes_its_files(place: Path, tmp_path: Path) -> None:
    quick = ("--data", place / "images.npz", "--no-latency")
    recorded = command(place / "bundle", "--update-baseline", *quick, cwd=tmp_path)
    assert (recorded.returncode, recorded.stderr) == (0, "")
    files = [word for name in ("junit", "json") for word in (f"--{name}", f"new/{name}.out")]
    done = command(place / "bundle", *quick, *files, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "pass: nothing is worse than the baseline"
    assert {path.name for path in tmp_path.iterdir()} == {"baselines", "new"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"junit.out", "json.out"}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--baseline", "nowhere.json"), 2, "nowhere.json: no such baseline"),
        (("--max-latency-ratio", "1"), 2, "max_latency_ratio: must be > 1, got 1.0"),
        (("--blocks", "2"), 2, "blocks: must be >= 6, got 2"),
        (("--update-baseline",), 2, "no images to record predictions on: give --data"),
        (("--against", "nowhere"), 2, "nowhere: is not a sound bundle to judge against"),
    ],
)
def test_a_wrong_command_is_a_sentence(words: tuple[str, ...], code: int, sentence: str, place: Path) -> None:
    done = command(place / "bundle", *words, cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert sentence in done.stderr


def test_a_recording_says_how_to_leave_the_times_out_before_it_takes_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def busy(*_: object) -> Check:
        said.append(capsys.readouterr().err)
        return Check("machine", "inconclusive", detail="unfit")

    monkeypatch.setattr("export.gate.commands.self_test", busy)
    monkeypatch.setattr(sys, "argv", ["gate", str(place / "bundle"), "--update-baseline", "--no-accuracy"])
    assert main() == 2
    assert said == ["timing takes 16 s and an idle machine: on a busy one, leave it out with --no-latency\n"]


def test_a_broken_bundle_is_not_recorded(place: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(place / "bundle", tmp_path / "bundle"))
    flip_a_byte(bundle)
    done = command(bundle, "--update-baseline", "--no-accuracy", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "baselines").exists()) == (3, False)
    assert "SHA-256 differs" in done.stderr


def test_the_gate_needs_no_torch() -> None:
    code = (
        "import sys, export.gate.__main__; sys.exit(bool({'torch', 'compress', 'scipy', 'pytest'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
