"""The conditions under which files are timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from export.onnx_file.targets import CPU


@dataclass(frozen=True)
class Conditions:
    """The conditions under which times are measured; `threads` 0 is all cores."""

    provider: str
    threads: int
    batch: int

    @property
    def clock(self) -> Callable[[], float]:
        """The clock to time with: the thread's CPU time for one thread on a CPU, else the wall clock.

        Other processes disturb CPU time less: with ten busy processes on two cores the same file took 0.61 to 1.48 times its own time by the
        wall clock, 0.97 to 1.02 times by this one.
        """
        return time.thread_time if (self.provider, self.threads) == (CPU, 1) else time.perf_counter
