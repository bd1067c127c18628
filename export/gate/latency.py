"""Is the new file slower? Time two files interleaved in one process, after a file against itself, to see if the machine is fit."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.errors import BundleError
from export.gate.checks import Check, Status
from export.images.preprocess import Preprocess
from export.runtime.latency import MIN_BLOCKS, Floats, Ratio, Timing, change, median_ratio, time_sessions
from export.runtime.providers import PLAIN, Runtime
from export.runtime.session import Run, bind, open_session

Opener = Callable[[], Run]
"""Opens a new session and returns a function that runs it once."""
NEW, AGAIN, OTHER = "new", "again", "other"
LOOKS_FOR_ALARM = 2  # a single look may be slow only because of where its sessions' memory lies
ALONE = Ratio(1.0, 1.0, 1.0)  # the earlier ratio, if none was recorded


@dataclass(frozen=True)
class Plan:
    """Where and how long to measure. Each look adds blocks of newly opened sessions; looks are added until the result is clear."""

    seconds: float = 1.0  # for each file in each look
    blocks: int = 20
    looks: int = 4
    threads: int = 1
    batch: int = 1
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter
    runs_in: Runtime = PLAIN

    def __post_init__(self) -> None:
        """Raise BundleError for a plan that cannot measure."""
        for name, least in (("blocks", MIN_BLOCKS), ("looks", 1), ("threads", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise BundleError(f"{name}: must be >= {least}, got {getattr(self, name)}")
        if not 0 < self.seconds < math.inf:
            raise BundleError(f"seconds: must be > 0, got {self.seconds}")

    @property
    def confidence(self) -> float:
        """Confidence of the interval after each look, so that all looks together are wrong in at most 5 % of cases (Bonferroni)."""
        return 1 - 0.05 / self.looks


@dataclass(frozen=True)
class Recorded:
    """Times of a bundle's served file and its float file, for a later gate that has neither."""

    reference: str
    threads: int
    batch: int
    ratios: list[float]  # served over reference, one per block
    served_ms: float
    reference_ms: float


def opener(path: Path, preprocess: Preprocess, plan: Plan) -> Opener:
    """Return the opener of a file, with images of noise that are the same for every file."""
    images = np.random.default_rng(plan.seed).standard_normal((plan.batch, *preprocess.shape), dtype=np.float32)
    return lambda: bind(open_session(path, threads=plan.threads, runs_in=plan.runs_in), images)


def looks(openers: Mapping[str, Opener], plan: Plan) -> Iterator[dict[str, Timing]]:
    """Yield all timings so far after each look; each look opens new sessions, since their memory's place affects speed."""
    so_far = {name: Timing(()) for name in openers}
    for look in range(plan.looks):
        sessions = {name: open_() for name, open_ in openers.items()}
        found = time_sessions(
            sessions, seconds=plan.seconds, blocks=plan.blocks, seed=plan.seed + look, clock=plan.clock
        )
        so_far = {name: Timing(so_far[name].blocks + found[name].blocks) for name in openers}
        yield so_far


def over(timed: Mapping[str, Timing], other: str) -> Floats:
    """Return the new file's time over `other`'s, per block."""
    return timed[NEW].block_ms / timed[other].block_ms


def fits(found: Ratio, limit: float) -> bool:
    """Tell whether the whole interval lies within the limit in both directions."""
    return 1 / limit <= found.low and found.high <= limit


def self_test(new: Opener, plan: Plan, limit: float) -> Check:
    """Time the new file against itself; a machine where they seem to differ by more than the limit is unfit."""
    found = Ratio(1.0, 0.0, np.inf)
    for timed in looks({NEW: new, AGAIN: new}, plan):
        found = median_ratio(over(timed, AGAIN), confidence=plan.confidence)
        if fits(found, limit):
            return Check("machine", "pass", now=interval(found), limit=f"{1 / limit:.3f} to {limit:.3f}")
    return Check(
        "machine",
        "inconclusive",
        now=interval(found),
        limit=f"{1 / limit:.3f} to {limit:.3f}",
        detail=f"unfit for timing: the file seems {interval(found)} times as slow as itself, so a limit of {limit:g} "
        "cannot be judged; use a quiet machine, raise the limit or leave latency out",
    )


def compare(
    new: Opener, other: Opener, plan: Plan, limit: float, *, then: Ratio = ALONE
) -> tuple[Ratio, dict[str, Timing]]:
    """Time `new` and `other` until the ratio, over the earlier ratio `then`, is certainly within or beyond the limit."""
    found, timed = Ratio(1.0, 0.0, np.inf), dict[str, Timing]()
    for look, timed in enumerate(looks({NEW: new, OTHER: other}, plan), 1):
        found = change(median_ratio(over(timed, OTHER), confidence=plan.confidence), then)
        is_within = 1 / limit <= found.high <= limit
        is_beyond = found.low > limit or found.high < 1 / limit
        if is_within or (is_beyond and look >= LOOKS_FOR_ALARM):
            break
    return found, timed


def judge(found: Ratio, limit: float, *, was: str, now: str, explained: str | None) -> Check:
    """Return the check of the ratio new over old; `explained` is why the new file may be faster, None if nothing is."""

    def row(status: Status, detail: str) -> Check:
        return Check("latency", status, was, now, f"{limit:.3f}", f"{interval(found)} times the baseline's: {detail}")

    if found.low > limit:
        return row("fail", "slower than the limit allows")
    if found.high > limit:
        return row("inconclusive", "the interval straddles the limit: measure longer (--seconds, --blocks, --looks)")
    if found.high >= 1 / limit:
        return row("pass", "within the limit")
    if explained:
        return row("pass", f"faster: {explained}")
    return row(
        "unexplained",
        "faster, though the work and the operators are the same: find out why, then accept it with --update-baseline",
    )


def record(served: Opener, reference: Opener, plan: Plan, *, name: str) -> Recorded:
    """Time the served file and the float file in all looks."""
    *_, timed = looks({NEW: served, OTHER: reference}, plan)
    return Recorded(
        reference=name,
        threads=plan.threads,
        batch=plan.batch,
        ratios=[float(f"{ratio:.6g}") for ratio in over(timed, OTHER)],
        served_ms=timed[NEW].percentile(50),
        reference_ms=timed[OTHER].percentile(50),
    )


def interval(found: Ratio) -> str:
    """Return ratio and interval as text."""
    return f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
