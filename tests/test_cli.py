"""The command line: what it passes on, and its exit codes."""

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner, Result

from compress import pipeline
from compress.cli import _command, app
from compress.logs import stage_log
from compress.pipeline import PlanLine
from compress.recipe.read import read_recipe
from compress.recipe.reference import reference
from compress.recipe.schema import Recipe
from export.errors import BundleError, DataError

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in this process, on rank 0 of 1, with logging left as it is."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stage_log, "quiet_libraries", lambda verbose: None)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, dict[str, Any]]]:
    """What `run` passed on; nothing is run, and every run misses a target."""
    passed: list[tuple[Recipe, dict[str, Any]]] = []

    def run_recipe(recipe: Recipe, **settings: Any) -> int:
        passed.append((recipe, settings))
        return 1

    monkeypatch.setattr(pipeline, "run_recipe", run_recipe)
    return passed


def raising(error: BaseException) -> Callable[..., int]:
    def run_recipe(*_: object, **__: object) -> int:
        raise error

    return run_recipe


def test_run_passes_its_settings_on_and_ends_with_the_runs_exit_code(
    invoke: Invoke, runs: list[tuple[Recipe, dict[str, Any]]], recipe_path: Path
) -> None:
    result = invoke(
        "run", recipe_path, "--set", "seed=3", "--out", "elsewhere", "--until", "prune", "--trust-code", "-v"
    )
    assert result.exit_code == 1
    ((recipe, settings),) = runs
    assert recipe == read_recipe(recipe_path, ["seed=3", "out=elsewhere"])
    assert {name: settings[name] for name in ("trust_code", "until", "verbose")} == {
        "trust_code": True, "until": "prune", "verbose": True,
    }  # fmt: skip


def test_the_command_that_is_passed_on_runs_the_same_again(
    invoke: Invoke, runs: list[tuple[Recipe, dict[str, Any]]], recipe_path: Path
) -> None:
    invoke(
        "run",
        recipe_path,
        "--data",
        "/my images",
        "--weights",
        "w.pth",
        "--set",
        "prune.exclude=[a.*, b]",
        "--set",
        "seed=3",
    )
    words = shlex.split(runs[0][1]["command"])
    assert words[0] == "compress"
    invoke(*words[1:])
    assert runs[1] == runs[0]


def test_the_command_says_on_how_many_processes(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    command = _command(recipe_path, [], trust_code=False)
    assert command == f"torchrun --nnodes=2 --nproc-per-node=8 --no-python compress run {recipe_path}"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("/data: no images; name another folder"), "/data: no images; name another folder\n"),
        (BundleError("a.onnx: damaged; export it again"), "a.onnx: damaged; export it again\n"),
        (OSError(errno.ENOSPC, "No space left", "/runs/x"), "/runs/x: no space left on device; free some space, or "),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs"),
            "/runs: permission denied; check its permissions, or ",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "runs"), "runs: file exists; name another place"),
        (OSError(errno.EFBIG, "File too large"), "file too large; raise the limit on file sizes"),
        (
            SafetensorError("Error while serializing: I/O error: full (os error 28)"),
            "no space left on device; free some",
        ),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    invoke: Invoke, recipe_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    monkeypatch.setattr(pipeline, "run_recipe", raising(error))
    result = invoke("run", recipe_path)
    assert result.exit_code == 2
    assert result.output.startswith(sentence)
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("ours"), FileNotFoundError(errno.ENOENT, "ours", "x"), SafetensorError("invalid header")]
)
def test_an_unexpected_error_keeps_its_traceback(
    invoke: Invoke, recipe_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(pipeline, "run_recipe", raising(error))
    with pytest.raises(type(error)) as caught:
        invoke("run", recipe_path)
    assert caught.value is error


def test_an_interrupted_run_says_that_it_goes_on_and_ends_with_130(
    invoke: Invoke, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run_recipe", raising(KeyboardInterrupt()))
    result = invoke("run", recipe_path)
    assert (result.exit_code, result.output) == (
        130,
        "interrupted; the same command continues\n",
    )


def test_a_wrong_recipe_stops_before_anything_runs(
    invoke: Invoke, runs: list[tuple[Recipe, dict[str, Any]]], recipe_path: Path
) -> None:
    result = invoke("run", recipe_path, "--set", "qat.fit.epochs=0")
    assert (result.exit_code, result.output) == (2, f"{recipe_path}: stages.3.fit.epochs: must be > 0, got 0\n")
    assert runs == []


@pytest.mark.parametrize("words", [["chekc"], ["run"], ["run", "a.yaml", "--ste", "a=1"], ["stage", "qat", "a.yaml"]])
def test_a_wrong_command_line_ends_with_2(invoke: Invoke, words: list[str]) -> None:
    assert invoke(*words).exit_code == 2


def test_check_judges_every_file_and_tells_all_mistakes(invoke: Invoke, recipe_path: Path) -> None:
    wrong = recipe_path.with_name("wrong.yaml")
    wrong.write_text(recipe_path.read_text().replace("epochs: 1", "epochs: 0") + "seed: x\n")
    result = invoke("check", wrong, recipe_path, recipe_path.with_name("absent.yaml"))
    assert result.exit_code == 2
    assert f"{recipe_path}: ok (source → prune → ptq → qat)\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("checked: keys and values")
    places = [line.removeprefix(f"{wrong}: ").partition(":")[0] for line in result.stderr.splitlines()[:-1]]
    assert sorted(places) == ["seed", "stages.0.fit.epochs", "stages.3.fit.epochs"]
    assert "absent.yaml: no such file" in result.stderr.splitlines()[-1]


def test_stage_passes_its_folders_on(invoke: Invoke, recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, object] = {}

    def run_stage(recipe: Recipe, stage: str, **settings: object) -> int:
        passed.update(settings, recipe=recipe, stage=stage)
        return 0

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    assert invoke("stage", "prune", recipe_path, "--src", "a", "--out", "b").exit_code == 0
    assert passed == {
        "recipe": read_recipe(recipe_path), "stage": "prune", "src": Path("a"), "out": Path("b"), "trust_code": False,
        "verbose": False,
    }  # fmt: skip


def test_plan_says_what_runs_what_is_cached_and_why(
    invoke: Invoke, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        PlanLine("source", "a1", True, "unchanged", Path("runs/tiny/00-source-a1")),
        PlanLine("prune", "b2", False, "not made yet", Path("runs/tiny/01-prune-b2")),
    ]
    monkeypatch.setattr(pipeline, "plan_recipe", lambda recipe: lines)
    assert invoke("plan", recipe_path).output.splitlines() == [
        "cached  source   runs/tiny/00-source-a1  (unchanged)",
        "runs    prune    runs/tiny/01-prune-b2  (not made yet)",
    ]


def test_schema_is_the_json_schema_of_a_recipe(invoke: Invoke) -> None:
    assert json.loads(invoke("schema").output) == Recipe.model_json_schema()


def test_schema_as_markdown_is_the_reference(invoke: Invoke) -> None:
    assert invoke("schema", "--markdown").output == reference()


def test_version_is_the_distributions(invoke: Invoke) -> None:
    assert invoke("--version").output.startswith("compress ")


@pytest.mark.parametrize("command", ["check", "plan"])
def test_check_and_plan_import_no_torch(command: str, recipe_path: Path) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "compress.cli", command, str(recipe_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "compress.recipe.schema" in imported
    assert not imported & {"torch", "torchvision", "timm"}


def test_check_takes_less_than_a_second_of_processor_time(recipe_path: Path) -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "compress.cli", "check", str(recipe_path)], capture_output=True, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


ENDS_AT_TORCH = """
import os, sys
from compress.cli import main

class Finder:
    @staticmethod
    def find_spec(name, *_):
        return os._exit(9) if name == "torch" else None  # what is still in a buffer is lost

sys.meta_path.insert(0, Finder)
main()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_first_line_says_what_will_run_before_torch_is_imported(recipe_path: Path, unbuffered: str) -> None:
    words = [sys.executable, "-c", ENDS_AT_TORCH, "run", str(recipe_path), "--out", str(recipe_path.parent)]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (9, "tiny: source, prune, ptq, qat will run\n")
