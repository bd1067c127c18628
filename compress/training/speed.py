"""Find the fastest precision (bfloat16 or float32) and number of threads of a training on a CPU by timing a few steps.

Both change results by rounding only. The checkpoint holds them, so a resumed training continues to the same bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal, TypeVar

import torch

from compress.ranks import first_decides, gather
from compress.recipe.stages import Fit
from compress.training.checkpoint import Progress
from export.onnx_file.targets import host_instruction_sets

Precision = Literal["fp32", "bf16"]
Choice = TypeVar("Choice", bound=int | str)
AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
FAST_BF16 = {"avx512_bf16", "amx_bf16"}
TURNS = 3  # timed steps of each choice, after one that is not timed
GAIN = 0.9  # another choice must take less than this fraction of the usual one's time
PAYS_STEPS = 200  # timing, which takes eight steps or a few more, pays only if at least this many steps follow
SLOWER = 0.75  # threads are timed again when an epoch falls below this fraction of the best speed


def precisions(settings: Fit, device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions to choose from, the usual first; more than one where only timing can decide."""
    if settings.precision != "auto":
        return (settings.precision,)
    if device.type == "cuda":
        return ("bf16",) if torch.cuda.is_bf16_supported() else ("fp32",)
    return ("fp32", "bf16") if host_instruction_sets() & FAST_BF16 else ("fp32",)


@contextmanager
def thread_limit() -> Iterator[int]:
    """Give the smallest number of threads of any rank (OMP_NUM_THREADS, or its cores); restore this rank's at the end."""
    own = torch.get_num_threads()
    try:
        yield min(gather(own))
    finally:
        torch.set_num_threads(own)


@dataclass(frozen=True)
class Pace:
    """A training's precision and threads, kept in its progress and chosen by timing steps that are undone."""

    progress: Progress
    settings: Fit
    device: torch.device
    steps_per_epoch: int
    limit: int  # of threads
    rehearsal: Callable[[], AbstractContextManager[Callable[[], None]]]  # gives a function that runs one step
    note: Callable[[str], None]  # for the log
    tell: Callable[[str], None]  # for the log and the report

    def begin_(self) -> bool:
        """Choose for a new training, by timing where that pays; a resumed one keeps its checkpoint's choice.

        Return whether anything was timed. Timing again could choose otherwise, so the checkpoint must be saved now.
        """
        progress, choices = self.progress, first_decides(lambda: precisions(self.settings, self.device))
        resumed, progress.precision = bool(progress.precision), progress.precision or choices[0]
        if self.device.type != "cpu":
            return False
        if resumed and progress.threads > self.limit:
            self.tell(f"resumed with {self.limit} of its {progress.threads} threads: the last digits will differ")
        progress.threads = min(progress.threads or self.limit, self.limit)
        torch.set_num_threads(progress.threads)
        if resumed or not self._pays:
            return False
        self._choose_threads_()
        if len(choices) > 1:
            with self.rehearsal() as run_step:
                # CPU seconds do not grow with the machine's other work, but they do with threads that wait for one
                # another, so the threads are chosen first.
                one_step = partial(self._run_in, run_step)
                progress.precision, seconds = fastest(choices, one_step, time.process_time)
            took = ", ".join(f"{1e3 * span:.3g} ms in {name}" for name, span in seconds.items())
            self.note(f"computes in {progress.precision}: a step takes {took} of one core")
        return len(choices) > 1 or self.limit > 1

    def after_epoch_(self, images_per_s: float) -> None:
        """Time the threads again after PAYS_STEPS steps if the epoch was slower than before, or if some are unused."""
        progress = self.progress
        rested = (progress.epoch - progress.timed_epoch) * self.steps_per_epoch >= PAYS_STEPS
        slower = images_per_s < SLOWER * progress.images_per_s
        progress.images_per_s = max(progress.images_per_s, images_per_s)
        movable = self.device.type == "cpu" and not self.settings.compile  # compiled code has a fixed number of threads
        if first_decides(lambda: movable and rested and self._pays and (slower or progress.threads < self.limit)):
            self._choose_threads_()

    @property
    def _pays(self) -> bool:
        return (self.settings.epochs - self.progress.epoch) * self.steps_per_epoch >= PAYS_STEPS

    def _run_in(self, run_step: Callable[[], None], precision: Precision) -> None:
        self.progress.precision = precision
        run_step()

    def _choose_threads_(self) -> None:
        progress, before = self.progress, self.progress.threads
        if self.limit > 1:
            with self.rehearsal() as run_step:
                progress.threads = count_threads(self.limit, before, run_step)
        torch.set_num_threads(progress.threads)
        progress.timed_epoch, progress.images_per_s = progress.epoch, 0.0
        if progress.threads != before:
            say = self.tell if progress.epoch else self.note  # at the start nothing has changed
            say(f"{progress.threads} of {self.limit} threads from epoch {progress.epoch + 1} on: faster at the moment")


def count_threads(limit: int, usual: int, run_step: Callable[[], None]) -> int:
    """Return the fastest number of threads: halve `limit` as long as that gains; `usual` wins a draw."""

    def run_with(threads: int) -> None:
        torch.set_num_threads(threads)
        run_step()

    count = limit
    while count > 1:
        pair = sorted((count, count // 2), key=lambda one: one != usual)
        if fastest(pair, run_with, time.perf_counter)[0] == count:
            break
        count //= 2
    return count


def fastest(
    choices: Sequence[Choice], trial: Callable[[Choice], None], clock: Callable[[], float]
) -> tuple[Choice, dict[Choice, float]]:
    """Time the choices in turns; return the fastest (the first unless GAIN is reached) and rank 0's seconds of each."""
    spans: dict[Choice, list[float]] = {choice: [] for choice in choices}
    for _ in range(1 + TURNS):
        for choice in choices:
            started = clock()
            trial(choice)
            spans[choice].append(clock() - started)
    seconds = first_decides(lambda: {choice: median(times[1:]) for choice, times in spans.items()})
    best = min(choices, key=seconds.__getitem__)
    return (best if seconds[best] < GAIN * seconds[choices[0]] else choices[0]), seconds
