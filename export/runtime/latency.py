"""Time several files interleaved, so that changes in the machine's speed cancel.

All files are open in one process and alternate in blocks. The order in a block is random, and the next block reverses it.
Ratios are taken within a block, so that a slow block affects both sides. Timed one after the other, a file
measured 0.64 to 1.67 times as fast as itself; interleaved, 0.945 to 1.029 times.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.runtime.intervals import median_interval

Floats = NDArray[np.float64]
MIN_BLOCKS = (
    6  # the smallest and largest of five medians contain the true one in only 93.8 % of cases, too few for 95 %
)
MAX_RUNS = 2_000  # per block: enough for any percentile, and a bound on memory


@dataclass(frozen=True)
class Timing:
    """The wall-clock time of every run, by block, in milliseconds."""

    blocks: tuple[Floats, ...]

    @property
    def block_ms(self) -> Floats:
        """The median of each block."""
        return np.array([np.median(block) for block in self.blocks])

    @property
    def runs(self) -> int:
        """The number of timed runs."""
        return sum(map(len, self.blocks))

    def percentile(self, percent: float) -> float:
        """Return a percentile over all runs, in milliseconds."""
        return float(np.percentile(np.concatenate(self.blocks), percent))


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times with its interval, 95 % unless stated otherwise."""

    ratio: float
    low: float
    high: float


def time_sessions(
    sessions: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    blocks: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run every session for about `seconds` (at least once per block), in `blocks` blocks of alternating order.

    The warm-up takes another tenth of the time, and tells how many runs fill a session's share of a block.
    """
    with no_garbage_collection():
        share = seconds / blocks
        counts = {name: runs_within(share, run, warmup=seconds / 10, clock=clock) for name, run in sessions.items()}
        timed: dict[str, list[Floats]] = {name: [] for name in sessions}
        for order in orders(list(sessions), blocks, seed):
            for name in order:
                timed[name].append(time_block(sessions[name], counts[name], clock))
    return {name: Timing(tuple(parts)) for name, parts in timed.items()}


def orders(names: list[str], blocks: int, seed: int) -> Iterator[list[str]]:
    """Yield one order per block: a random one, then its reverse, so that every name is early as often as late."""
    rng = np.random.default_rng(seed)
    order = names
    for block in range(blocks):
        order = order[::-1] if block % 2 else [names[i] for i in rng.permutation(len(names))]
        yield order


def runs_within(share: float, run: Callable[[], object], *, warmup: float, clock: Callable[[], float]) -> int:
    """Warm up for `warmup` seconds (at least two runs) and return how many runs fill `share` seconds."""
    durations: list[float] = []
    while len(durations) < 2 or sum(durations) < warmup:
        start = clock()
        run()
        durations.append(clock() - start)
    return int(np.clip(share / max(np.median(durations[1:]), 1e-9), 1, MAX_RUNS))


def time_block(run: Callable[[], object], count: int, clock: Callable[[], float]) -> Floats:
    """Return the milliseconds of `count` runs; if there are more than two, an untimed run fills the caches first."""
    if count > 2:
        run()
    ticks = np.empty(count + 1)
    ticks[0] = clock()
    for index in range(count):
        run()
        ticks[index + 1] = clock()
    return np.diff(ticks) * 1e3


def speedup(reference: Timing, other: Timing) -> Ratio:
    """Return how many times faster `other` is than `reference`; both must come from one call of `time_sessions`."""
    return median_ratio(reference.block_ms / other.block_ms)


def median_ratio(ratios: Floats, *, confidence: float = 0.95) -> Ratio:
    """Return the median of `ratios`, one per block, with its exact interval."""
    low, high = np.exp(median_interval(np.log(ratios), confidence=confidence))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def change(now: Ratio, then: Ratio) -> Ratio:
    """Return `now` over `then`, adding squared distances to the ends on the log scale (MOVER, Zou & Donner 2008)."""
    lower = math.hypot(math.log(now.ratio / now.low), math.log(then.high / then.ratio)) if now.low else math.inf
    upper = math.hypot(math.log(now.high / now.ratio), math.log(then.ratio / then.low)) if then.low else math.inf
    ratio = now.ratio / then.ratio
    return Ratio(ratio, ratio * math.exp(-lower), ratio * math.exp(upper))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector off inside the block, as timeit does; to collect beside torch takes 0.5 s, and sessions need none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
