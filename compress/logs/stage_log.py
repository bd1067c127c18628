"""A stage's log while it runs: a live line, `log.jsonl`, TensorBoard.

Lines go to stderr. On a terminal a stage has one live line; elsewhere each epoch prints a plain line.
"""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from compress.ranks import rank
from export.names import LOG_JSONL

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

QUIET_S = 5.0  # without a line, after which a file gets one on what is done now
REFRESH_S = 0.25  # reading a loss waits for the GPU, so it is read four times a second, not at every step
SHOWN = {  # a line's measurements and their formats
    "loss": "loss {:.4g}",
    "score": "score {:.2%}",
    "images_per_s": "{:,.0f} images/s",
}
Tell = Callable[[str, int, Mapping[str, float]], None]
"""Takes a phase, an epoch's number, and its measurements."""


def quiet_libraries(verbose: bool) -> None:
    """Silence libraries' messages below errors, unless verbose; call it before torch is imported.

    Our own lines use neither `logging` nor `warnings`, so both are switched off. `python -W` takes precedence.
    """
    if verbose:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    import onnxruntime  # slow to import

    onnxruntime.set_default_logger_severity(3)


def say(text: str, *, each_rank: bool = False) -> None:
    """Print a line outside of a stage: on rank 0, or on whichever rank has something to say."""
    if each_rank or rank() == 0:
        sys.stderr.write(f"{text}\n")


class StageLog:
    """The log of one stage; silent unless `enabled` (on rank 0).

    `log.jsonl` has {"epoch": 1, "epochs": 5, …measurements} for each epoch and {"note": …} for each note, written at
    once; a reopened log continues. TensorBoard's events are in `tensorboard/PHASE`; `tell` also gets each epoch.
    """

    def __init__(
        self,
        out: Path,
        *,
        stage: str,
        verbose: bool = False,
        enabled: bool = True,
        console: Console | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.stage = stage
        self.verbose = verbose
        self.enabled = enabled
        self.out = out
        self._lines = out / LOG_JSONL
        self._tell = tell
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._board: SummaryWriter | None = None
        self._phase = stage
        self._epochs = self._batches = self._epoch = self._first_epoch = 0
        self._batch = self._images = 0
        self._shown: dict[str, float] = {}
        self._started_s = self._epoch_started_s = self._refresh_at_s = 0.0
        self._unit, self._unit_images, self._said_s = "", 0, time.monotonic()

    def __enter__(self) -> Self:
        """Open the log, and the live line where there is a terminal."""
        if self.enabled and self._console.is_interactive:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[shown]}", table_column=Column(overflow="fold")),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self._console,
                refresh_per_second=1 / REFRESH_S,
            )
            self._bar = self._progress.add_task(self.stage, total=None, shown="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the live line, which stays visible, and close the files."""
        if self._progress:
            self._progress.stop()
        if self._board:
            self._board.close()

    def start(self, *, epochs: int, batches: int, done: int = 0, phase: str | None = None) -> None:
        """Begin a training of `epochs` epochs of `batches` batches; after a resume, `done` epochs are finished.

        A stage that trains more than once names each training's `phase`. Logged epochs after `done` are dropped, as they
        are trained again.
        """
        self._phase = phase or self.stage
        self._unit, self._unit_images = "", 0
        self._epochs, self._batches, self._epoch, self._first_epoch = epochs, batches, done, done
        self._batch = self._images = 0
        self._shown = {}
        self._started_s = self._epoch_started_s = time.monotonic()
        if not self.enabled:
            return
        self._forget_after(done)
        if self._board:
            self._board.close()
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.out / "tensorboard" / self._phase), purge_step=done + 1)
        if self._progress:
            self._progress.reset(self._bar, total=epochs * batches, completed=done * batches)
        self._refresh()

    def batch(self, *, images: int, loss: SupportsFloat) -> None:
        """Count one training step; a tensor `loss` is read only when the line is redrawn."""
        if not self._progress:
            return
        self._batch += 1
        self._images += images
        now_s = time.monotonic()
        if now_s >= self._refresh_at_s:
            speed = self._images / max(now_s - self._epoch_started_s, 1e-9)
            self._shown |= {"loss": float(loss), "images_per_s": speed}
            self._refresh()

    def epoch(self, measurements: Mapping[str, float]) -> None:
        """Record a finished epoch's measurements: mean loss, learning rate, speed, validation score."""
        self._epoch += 1
        self._batch = self._images = self._unit_images = 0
        took_s, self._epoch_started_s = time.monotonic() - self._epoch_started_s, time.monotonic()
        if not self.enabled:
            return
        phase = {} if self._phase == self.stage else {"phase": self._phase}
        self._append({"epoch": self._epoch, "epochs": self._epochs, **phase, **measurements})
        for name, value in measurements.items():
            if self._board:
                self._board.add_scalar(name, value, self._epoch)
        if self._tell:
            self._tell(self._phase, self._epoch, measurements)
        self._shown = {name: measurements[name] for name in SHOWN if name in measurements}
        self._refresh()
        # In a file the next epoch's line is soon enough, unless it would come too late.
        is_due = self._epoch == self._epochs or time.monotonic() + took_s - self._said_s > QUIET_S
        if self.verbose or (not self._progress and is_due):
            self._say(self._epoch_line(measurements))

    def epoch_again(self) -> None:
        """Reset the current epoch's steps, as it is trained again."""
        self._batch = self._images = self._unit_images = 0
        self._epoch_started_s = time.monotonic()

    def doing(self, unit: str) -> None:
        """Say what is done now: in the live line, or in a line of its own if there was none for a while."""
        if not self.enabled:
            return
        self._unit, self._unit_images = unit, 0
        if self._progress:
            self._progress.update(self._bar, description=self._phase, shown=unit)
        elif self.verbose or time.monotonic() - self._said_s > QUIET_S:
            self._say(f"{self.stage}: {unit}")

    def seen(self, images: int) -> None:
        """Count images of what is done now, in the live line."""
        self._unit_images += images
        if self._progress and time.monotonic() >= self._refresh_at_s:
            self._refresh_at_s = time.monotonic() + REFRESH_S
            what = f"{self._unit}: " if self._unit else ""
            self._progress.update(self._bar, shown=f"{what}{self._unit_images:,} images")

    def note(self, text: str) -> None:
        """Log and print one line."""
        if self.enabled:
            self._append({"note": text})
            self._say(f"{self.stage}: {text}")

    def note_detail(self, text: str) -> None:
        """Log one line, and print it if verbose."""
        if self.enabled:
            self._append({"note": text})
            if self.verbose:
                self._say(f"{self.stage}: {text}")

    def _say(self, line: str) -> None:
        self._said_s = time.monotonic()
        self._console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def _append(self, entry: Mapping[str, object]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False) + "\n")

    def _forget_after(self, done: int) -> None:
        """Drop this phase's epochs after `done`, all later epochs, and a line cut off by a kill; keep the notes."""
        if not self._lines.exists():
            return
        kept: list[str] = []
        repeated = False
        for line in self._lines.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a line cut off by a kill
                continue
            same_phase = entry.get("phase", self.stage) == self._phase
            repeated |= same_phase and entry.get("epoch", 0) > done
            if not repeated or "note" in entry:
                kept.append(line)
        self._lines.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _refresh(self) -> None:
        """Redraw the live line."""
        self._refresh_at_s = time.monotonic() + REFRESH_S
        if not self._progress:
            return
        finished = self._epoch == self._epochs
        self._progress.update(
            self._bar,
            description=f"{self._phase} {min(self._epoch + 1, self._epochs)}/{self._epochs}",
            completed=self._epochs * self._batches if finished else self._epoch * self._batches + self._batch,
            shown=_format(self._shown),
        )

    def _epoch_line(self, measurements: Mapping[str, float]) -> str:
        """Return one epoch as plain text, with all measurements if verbose."""
        spent_s = time.monotonic() - self._started_s
        left_s = spent_s / (self._epoch - self._first_epoch) * (self._epochs - self._epoch)
        more = [f"{name} {value:.4g}" for name, value in measurements.items() if self.verbose and name not in SHOWN]
        parts = [f"{self._phase} {self._epoch}/{self._epochs}", _format(measurements), *more]
        if left_s:
            parts.append(f"{clock(left_s)} left")
        return "  ".join(part for part in parts if part)


def _format(measurements: Mapping[str, float]) -> str:
    """Return a line's measurements with their units."""
    return "  ".join(text.format(measurements[name]) for name, text in SHOWN.items() if name in measurements)


def clock(seconds: float) -> str:
    """Return a time as 0:07, 12:30 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
