"""The Makefile passes on what a person gives it, and nothing else."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = {
    "help",
    "setup",
    "init",
    "compress",
    "test",
    "acceptance",
    "check",
    "bench",
    "report",
    "search",
    "zoo",
    "names",
    "overhead",
    "latency",
    "providers",
    "results",
    "recovery",
    "gate",
    "trials",
    "elsewhere",
    "fuzz",
    "clean",
}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs GNU make")


def make(*words: str, **environment: str) -> str:
    """What make would run, with the virtual environment taken as made."""
    command = ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/.ready", *words]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True
    ).stdout


def test_every_target_is_phony_and_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS
    assert set(re.findall(r"^([a-z]+):.* ## ", text, re.MULTILINE)) == TARGETS


def test_compress_runs_the_quickstart() -> None:
    assert make("compress").split("\n")[0].split()[:3] == [".venv/bin/compress", "run", "'recipes/quickstart.yaml'"]


def test_compress_passes_on_every_variable() -> None:
    shown = make("compress", "RECIPE=r.yaml", "DATA=/my images", "WEIGHTS=w.pth", "OUT=o", "SET=a=1 b.c=2", "ARGS=-v")
    words = "run 'r.yaml' --data '/my images' --weights 'w.pth' --out 'o' --set 'a=1' --set 'b.c=2' -v"
    assert words in re.sub(r"[\s\\]+", " ", shown)


@pytest.mark.parametrize("path", ["/it's here", '/"my" images', "/a$HOME/`ls`", "/a#b;c&d\\e"])
@pytest.mark.parametrize(
    ("target", "variable", "option"),
    [
        ("compress", "DATA", "--data"), ("compress", "WEIGHTS", "--weights"), ("compress", "OUT", "--out"),
        ("compress", "SET", "--set"), ("gate", "DATA", "--data"), ("gate", "BASELINE", "--baseline"),
        ("search", "DATA", "--data"), ("search", "STORAGE", "--storage"), ("report", "RUN", "report"), ("bench", "BUNDLE", "export.bench"),
    ],
)  # fmt: skip
def test_whatever_stands_in_a_value_arrives(path: str, target: str, variable: str, option: str) -> None:
    value = path.replace(" ", "") if variable == "SET" else path
    words = shlex.split(make(target, f"{variable}={value}"))
    assert words[words.index(option) + 1] == value


@pytest.mark.parametrize("word", ["recipe=r.yaml", "data=/d", "RECPIE=r.yaml"])
def test_a_variable_that_is_unknown_is_an_error(word: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        make("compress", word)
    assert caught.value.returncode == 2
    assert f"{word.partition('=')[0]}: no such variable; known, in capitals: RECIPE DATA" in caught.value.stderr


def test_the_environment_changes_no_run() -> None:
    assert make("compress", DATA="/elsewhere", OUT="/elsewhere", SET="seed=1", RECIPE="x.yaml") == make("compress")


def test_several_processes_start_under_torchrun() -> None:
    assert ".venv/bin/torchrun --standalone --nproc-per-node=8 --no-python .venv/bin/compress run" in make(
        "compress", "RANKS=8"
    )


def test_several_machines_meet_at_one_of_them() -> None:
    words = shlex.split(make("compress", "RANKS=8", "NODES=2", "HEAD=a$b:29500"))
    assert words[:7] == [
        ".venv/bin/torchrun", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=compress", "--rdzv-endpoint=a$b:29500",
        "--nproc-per-node=8", "--no-python",
    ]  # fmt: skip


def test_machines_without_a_place_to_meet_are_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        make("compress", "NODES=2")
    assert "NODES=2: the machines need a place to meet: HEAD=HOST:29500" in caught.value.stderr


def test_clean_keeps_runs_and_the_virtual_environment() -> None:
    shown = make("clean")
    assert "rm -rf" in shown
    assert not re.search(r"runs|\.venv", shown)
