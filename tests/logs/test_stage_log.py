import json
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from compress.logs.stage_log import StageLog


class CountedLoss:
    """A loss that counts how often it is read, as a tensor on a GPU would stall."""

    reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 0.5


def console(*, terminal: bool) -> tuple[Console, StringIO]:
    screen = StringIO()
    return Console(file=screen, force_terminal=terminal, force_interactive=terminal, width=80), screen


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_each_epoch_is_one_line_of_json(tmp_path: Path) -> None:
    with StageLog(tmp_path, stage="distill", console=console(terminal=False)[0]) as log:
        log.start(epochs=2, batches=3)
        log.epoch({"loss": 0.5, "score": 0.9})
        log.epoch({"loss": 0.25, "score": 0.95})
    assert lines(tmp_path) == [
        {"epoch": 1, "epochs": 2, "loss": 0.5, "score": 0.9},
        {"epoch": 2, "epochs": 2, "loss": 0.25, "score": 0.95},
    ]


def test_a_loss_that_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    with StageLog(tmp_path, stage="distill", console=console(terminal=False)[0]) as log:
        log.start(epochs=1, batches=1)
        log.epoch({"loss": float("nan")})
    assert lines(tmp_path)[0]["loss"] is None


def test_without_a_terminal_an_epoch_is_one_plain_line_and_a_batch_is_none(tmp_path: Path) -> None:
    screen_console, screen = console(terminal=False)
    with StageLog(tmp_path, stage="distill", console=screen_console) as log:
        log.start(epochs=1, batches=2)
        log.batch(images=64, loss=0.7)
        log.batch(images=64, loss=0.6)
        log.epoch({"loss": 0.65, "lr": 0.05, "images_per_s": 1234.4, "score": 0.9})
    assert screen.getvalue() == "distill 1/1  loss 0.65  score 90.00%  1,234 images/s\n"


def test_of_short_epochs_a_file_shows_those_that_are_due_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen_console, screen = console(terminal=False)
    with StageLog(tmp_path, stage="distill", console=screen_console) as log:
        log.start(epochs=7, batches=1)
        for seconds in (2, 2, 2, 4, 4, 2, 2):
            now[0] += seconds
            log.epoch({"loss": 0.5})
    shown = [int(line.split("/")[0].split()[1]) for line in screen.getvalue().splitlines()]
    assert shown == [2, 4, 5, 7]  # at 4, 10, 14 and 18 s
    assert len(lines(tmp_path)) == 7


def test_verbose_lines_show_every_measurement(tmp_path: Path) -> None:
    screen_console, screen = console(terminal=False)
    with StageLog(tmp_path, stage="distill", verbose=True, console=screen_console) as log:
        log.start(epochs=1, batches=2)
        log.epoch({"loss": 0.65, "lr": 0.05})
    assert screen.getvalue() == "distill 1/1  loss 0.65  lr 0.05\n"


def test_on_a_terminal_the_live_line_fits_80_columns(tmp_path: Path) -> None:
    screen_console, screen = console(terminal=True)
    with StageLog(tmp_path, stage="distill", console=screen_console) as log:
        log.start(epochs=12, batches=2)
        log.epoch({"loss": 0.1234, "images_per_s": 12345.0, "score": 0.9777})
    assert "loss 0.1234  score 97.77%  12,345 images/s" in screen.getvalue()


def test_the_loss_is_read_only_when_the_line_is_redrawn(tmp_path: Path) -> None:
    loss = CountedLoss()
    with StageLog(tmp_path, stage="distill", console=console(terminal=True)[0]) as log:
        log.start(epochs=1, batches=1000)
        for _ in range(1000):
            log.batch(images=64, loss=loss)
    assert loss.reads <= 2


def test_a_disabled_log_writes_nothing(tmp_path: Path) -> None:
    screen_console, screen = console(terminal=True)
    with StageLog(tmp_path, stage="distill", enabled=False, console=screen_console) as log:
        log.start(epochs=1, batches=1)
        log.batch(images=64, loss=0.5)
        log.epoch({"loss": 0.5})
        log.note("nobody reads this")
    assert (screen.getvalue(), list(tmp_path.iterdir())) == ("", [])


def test_a_resume_keeps_the_epochs_before_it_and_drops_the_rest(tmp_path: Path) -> None:
    old = ['{"note": "a"}', '{"epoch": 1, "loss": 3}', '{"epoch": 2, "loss": 2}', '{"epoch": 3, "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(old))
    with StageLog(tmp_path, stage="distill", console=console(terminal=False)[0]) as log:
        log.start(epochs=3, batches=1, done=1)
        log.epoch({"loss": 1.5})
    assert lines(tmp_path) == [{"note": "a"}, {"epoch": 1, "loss": 3}, {"epoch": 2, "epochs": 3, "loss": 1.5}]


def test_a_second_phase_keeps_the_first_one(tmp_path: Path) -> None:
    with StageLog(tmp_path, stage="prune", console=console(terminal=False)[0]) as log:
        for phase in ("sparsity", "recover"):
            log.start(epochs=1, batches=1, phase=phase)
            log.epoch({"loss": 0.5})
    assert [line["phase"] for line in lines(tmp_path)] == ["sparsity", "recover"]


def test_tensorboard_reads_the_epochs(tmp_path: Path) -> None:
    with StageLog(tmp_path, stage="distill", console=console(terminal=False)[0]) as log:
        log.start(epochs=2, batches=1)
        log.epoch({"loss": 0.5})
        log.epoch({"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "distill"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_markup_in_a_note_is_printed_as_it_is(tmp_path: Path) -> None:
    screen_console, screen = console(terminal=False)
    with StageLog(tmp_path, stage="source", console=screen_console) as log:
        log.note("class [red]:smile: left out")
    assert screen.getvalue() == "source: class [red]:smile: left out\n"


@pytest.mark.parametrize(("verbose", "expected"), [(False, ""), (True, "said")])
def test_libraries_are_quiet_unless_verbose(verbose: bool, expected: str) -> None:
    program = (
        "import logging, warnings; from compress.logs.stage_log import quiet_libraries; "
        f"quiet_libraries({verbose}); import torch; logging.getLogger('torch').warning('said'); warnings.warn('said')"
    )
    spoken = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert expected in spoken
    assert bool(spoken) == verbose


def test_a_long_unit_of_work_has_a_line_of_its_own_and_a_short_one_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen_console, screen = console(terminal=False)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StageLog(tmp_path, stage="ptq", console=screen_console) as log:
        for second in range(0, 21, 3):
            now[0] = float(second)
            log.doing(f"layer {second}")
    assert screen.getvalue() == "ptq: layer 6\nptq: layer 12\nptq: layer 18\n"
    assert not (tmp_path / "log.jsonl").exists()


def test_the_live_line_says_what_is_done_and_counts_images(tmp_path: Path) -> None:
    screen_console, screen = console(terminal=True)
    with StageLog(tmp_path, stage="ptq", console=screen_console) as log:
        log.doing("scores six files")
        log.seen(192)
    assert "scores six files: 192 images" in screen.getvalue()
