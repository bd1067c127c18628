"""The conditions under which files are timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from export.runtime.providers import Arithmetic, Runtime, runtime_named
from export.runtime.session import open_session

RUNS = 20
WITHIN = 0.9  # of the process's CPU time is the thread's own where nothing is handed to other threads


@dataclass(frozen=True)
class Conditions:
    """The conditions under which times are measured; `threads` 0 is all cores."""

    provider: str
    threads: int
    batch: int
    arithmetic: Arithmetic = "f32"

    @property
    def runs_in(self) -> Runtime:
        """The provider, with its arithmetic."""
        return runtime_named(self.provider, self.arithmetic)

    def open(self, model: Path | bytes) -> onnxruntime.InferenceSession:
        """Open a file as it will be served, its batch fixed: a plugin runs a fixed and an open one in different ways."""
        return open_session(model, runs_in=self.runs_in, threads=self.threads, batch=self.batch)

    def clock(self, run: Callable[[], object]) -> Callable[[], float]:
        """Return the clock to time with: the thread's CPU time if one thread on a CPU does all of a run's work, else the wall clock.

        Other processes disturb CPU time less: with ten busy processes on two cores the same file took 0.61 to 1.48 times its own time by the
        wall clock, 0.97 to 1.02 times by this one. A plugin may hand its work to threads of its own, so it is looked at.
        """
        if self.threads != 1 or self.runs_in.provider.device != "cpu":
            return time.perf_counter
        run()
        thread, process = time.thread_time(), time.process_time()
        for _ in range(RUNS):
            run()
        thread, process = time.thread_time() - thread, time.process_time() - process
        return time.thread_time if thread >= WITHIN * process else time.perf_counter
