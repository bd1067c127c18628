"""Several ranks: rank 0 decides for all, and the end of one is the end of all, with its sentence, within a minute."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from several import MINUTE_S, TESTS, Rank, ended, start

from compress.ranks import first_decides, gather, joined, rank, ranks

COMMAND = """
import os, sys, time
from compress import cli, pipeline, ranks
from export.errors import DataError

def run_recipe(recipe, **_):
    ranks.barrier()
    print("ready", flush=True)
    PLANTED
    ranks.barrier()
    return 0

pipeline.run_recipe = run_recipe
sys.argv = ["compress", "run", *sys.argv[1:]]
cli.main()
"""
WAIT = "time.sleep(600)"


def command(planted: str, recipe_path: Path, **settings: float) -> list[Rank]:
    """Start `compress run` on two ranks, whose work is the planted statement."""
    changed = "".join(f"ranks.{name} = {value}\n" for name, value in ({"TICK_S": 0.25} | settings).items())
    code = COMMAND.replace("PLANTED", planted).replace("def run_recipe", f"{changed}\ndef run_recipe")
    return start(code, str(recipe_path))


def killed(number: int, started: list[Rank], signal_: signal.Signals = signal.SIGKILL) -> list[tuple[int, str]]:
    """Kill one rank in the middle and return how all ended."""
    while [rank.said("stdout") for rank in started] != ["ready\n"] * len(started):
        assert all(rank.process.is_alive() for rank in started)
        time.sleep(0.05)
    os.kill(started[number].process.pid or 0, signal_)
    started[1 - number].process.join(MINUTE_S)
    started[number].process.kill()
    return ended(started)


def test_a_process_of_its_own_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    with joined():
        assert (rank(), ranks(), first_decides(lambda: "mine"), gather("mine")) == (0, 1, "mine", ["mine"])


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_ranks_mistake_ends_all_with_its_sentence_once(recipe_path: Path, number: int) -> None:
    said = ended(command(f"if rank == {number}: raise DataError('/data: no images; name another folder')", recipe_path))
    assert [code for code, _ in said] == [2, 2]
    assert "".join(text for _, text in said) == f"rank {number}: /data: no images; name another folder\n"


@pytest.mark.slow
def test_a_mistake_that_all_ranks_make_is_told_once(recipe_path: Path) -> None:
    said = ended(command("raise DataError('no images')", recipe_path))
    assert [code for code, _ in said] == [2, 2]
    assert "".join(text for _, text in said) in ("rank 0: no images\n", "rank 1: no images\n")


@pytest.mark.slow
def test_a_wrong_recipe_is_told_by_rank_0_alone(recipe_path: Path) -> None:
    recipe_path.write_text("name: nothing")
    said = ended(command("pass", recipe_path))
    assert [code for code, _ in said] == [2, 2]
    assert said[0][1].startswith(f"rank 0: {recipe_path}: ")
    assert said[1][1] == ""


@pytest.mark.slow
def test_a_crash_ends_all_and_only_the_rank_that_crashed_has_a_traceback(recipe_path: Path) -> None:
    (first, silent), (second, traceback) = ended(command("if rank == 1: raise ValueError('ours')", recipe_path))
    assert (first, second, silent) == (70, 70, "")
    assert traceback.count("ValueError: ours") == 1


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_killed_while_the_others_wait_for_it_ends_all(recipe_path: Path, number: int) -> None:
    said = killed(number, command(f"if rank == {number}: {WAIT}", recipe_path))
    assert said[number] == (-signal.SIGKILL, "")
    code, text = said[1 - number]
    assert code == 70
    assert text.startswith(f"rank {number} on ")
    assert "ended without a message" in text
    assert text.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.acceptance), 1])
def test_a_rank_killed_while_the_others_work_ends_all(recipe_path: Path, number: int) -> None:
    """No collective is there to fail: only the silence tells; for half a minute of it, a few seconds."""
    code, text = killed(number, command(WAIT, recipe_path, TICK_S=1.0, SILENT_TICKS=4))[1 - number]
    assert code == 70
    assert text.startswith(f"rank {number} on ")
    assert text.count("\n") == 1


@pytest.mark.acceptance
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_whose_machine_stands_still_ends_the_others(recipe_path: Path, number: int) -> None:
    """Its connections stay open, as those of a machine without power do."""
    code, text = killed(number, command(WAIT, recipe_path, TICK_S=1.0, SILENT_TICKS=6), signal.SIGSTOP)[1 - number]
    assert code == 70
    assert text.startswith(f"rank {number} on ")
    assert text.count("\n") == 1


@pytest.mark.acceptance
def test_a_rank_that_is_busy_for_long_is_not_taken_for_dead(recipe_path: Path) -> None:
    said = ended(command("if rank == 0: time.sleep(8)", recipe_path, TICK_S=1.0, SILENT_TICKS=4))
    assert said == [(0, ""), (0, "")]


@pytest.mark.slow
def test_ranks_that_do_not_come_are_told_of(recipe_path: Path) -> None:
    code = COMMAND.replace("PLANTED", "pass").replace(
        "def run_recipe", "ranks.MEETING = ranks.timedelta(seconds=3)\n\ndef run_recipe"
    )
    first, second = start(code, str(recipe_path))
    second.process.kill()
    (code_, text), _ = ended([first, second])
    assert code_ == 2
    assert text.startswith("rank 0: 2 ranks did not connect (")
    assert text.endswith("); start all with torchrun within 3 seconds\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "sentence", "told"),
    [
        ("if rank == 1: raise DataError('no images')", "rank 1: no images", 1),
        ("ranks.barrier(); return 1 - rank", "a target is missed: see the report above", 0),
    ],
)
def test_torchruns_summary_has_the_sentence(
    recipe_path: Path, tmp_path: Path, planted: str, sentence: str, told: int
) -> None:
    script = tmp_path / "planted.py"
    script.write_text("import os\nrank = int(os.environ['RANK'])\n" + COMMAND.replace("PLANTED", planted))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(recipe_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}"},
    )
    assert done.returncode == 1
    assert f"\n{done.stderr}".count(f"\n{sentence}\n") == told
    assert f"traceback : {sentence}\n" in done.stderr
