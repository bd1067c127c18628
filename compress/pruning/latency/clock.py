"""Time a student's file against the unpruned network's, interleaved, until the ratio's interval is narrow; refuse a busy machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from export.images.size import Shape
from export.runtime.conditions import Conditions
from export.runtime.latency import Ratio, median_ratio, time_sessions
from export.runtime.session import bind

SECONDS, BLOCKS = 0.4, 12
CLOSE = 1.01  # stop once the interval's ends differ by less than this factor
REPEATS = 6  # at most; even, so that each file is opened first equally often
QUIET = 0.02  # the most by which a file may seem faster or slower than itself
TRIES, WAIT_S = 5, 10.0


@dataclass(frozen=True)
class Clock:
    """Times files against a reference file, on images of `image_size` pixels."""

    reference: Path
    conditions: Conditions
    shape: Shape

    def against(self, file: Path) -> tuple[Ratio, float, float]:
        """Return the ratio of `file`'s time to the reference's, and the medians of the reference and the file in ms."""
        images = np.random.default_rng(0).standard_normal((self.conditions.batch, *self.shape), np.float32)
        files = {"reference": self.reference, "file": file}
        reference, other = np.empty(0), np.empty(0)
        for seed in range(REPEATS):
            # Reopen in alternating order: of two sessions of one file, the one opened first was 1.5 % slower.
            names = [*files] if seed % 2 else [*reversed(files)]
            runs = {name: bind(self.conditions.open(files[name]), images) for name in names}
            clock = self.conditions.clock(runs["reference"])
            timed = time_sessions(runs, seconds=SECONDS, blocks=BLOCKS, seed=seed, clock=clock)
            reference = np.append(reference, timed["reference"].block_ms)
            other = np.append(other, timed["file"].block_ms)
            ratio = median_ratio(other / reference)
            if seed % 2 and ratio.high / ratio.low < CLOSE:
                break
        return ratio, float(np.median(reference)), float(np.median(other))

    def require_quiet(self, tell: Callable[[str], None]) -> float:
        """Time the reference against itself and return its median in ms; wait and retry while the two differ.

        Raises CompressError if they differ at every try.
        """
        for number in range(1, TRIES + 1):
            ratio, ms, _ = self.against(self.reference)
            if ratio.low >= 1 - QUIET and ratio.high <= 1 + QUIET:
                tell(
                    f"A/A test: the same file takes {ratio.low:.3f} to {ratio.high:.3f} times its own time, {ms:.3f} ms"
                )
                return ms
            tell(
                f"A/A test {number} of {TRIES}: the same file takes {ratio.low:.2f} to {ratio.high:.2f} times its own time: too busy, waiting"
            )
            time.sleep(WAIT_S)
        raise CompressError(
            f"prune: this machine is too busy to measure times, the same file takes {ratio.low:.2f} to {ratio.high:.2f} times its own time: "
            "end other processes and run again, or prune by keep_macs"
        )
