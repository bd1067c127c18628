import math
from collections.abc import Callable

import numpy as np
import pytest

from export.runtime.latency import (
    MIN_BLOCKS,
    Floats,
    Ratio,
    Timing,
    change,
    median_ratio,
    orders,
    speedup,
    time_sessions,
)


class Clock:
    """A clock that only the fake sessions move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def session(self, duration: Callable[[float], float]) -> Callable[[], None]:
        """Return a call that takes `duration(now)` seconds."""

        def run() -> None:
            self.now += duration(self.now)

        return run


def constant(seconds: float) -> Callable[[float], float]:
    return lambda now: seconds


def timing(block_ms: list[float]) -> Timing:
    return Timing(tuple(np.array([value]) for value in block_ms))


def test_planted_durations_come_back_as_percentiles_and_ratio() -> None:
    clock = Clock()
    sessions = {"slow": clock.session(constant(0.010)), "fast": clock.session(constant(0.004))}
    timed = time_sessions(sessions, seconds=1.0, blocks=10, clock=clock)
    assert timed["slow"].percentile(50) == pytest.approx(10.0)
    assert timed["fast"].percentile(99) == pytest.approx(4.0)
    found = speedup(timed["slow"], timed["fast"])
    assert (found.ratio, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))


def test_percentiles_are_over_all_runs() -> None:
    runs = Timing((np.arange(1.0, 51.0), np.arange(51.0, 101.0)))
    assert runs.runs == 100
    assert runs.percentile(50) == pytest.approx(50.5)
    assert runs.percentile(90) == pytest.approx(np.quantile(np.arange(1, 101), 0.9))
    assert runs.block_ms.tolist() == [25.5, 75.5]


def test_each_session_gets_about_its_seconds_whatever_its_speed() -> None:
    clock = Clock()
    sessions = {"slow": clock.session(constant(0.05)), "fast": clock.session(constant(0.001))}
    timed = time_sessions(sessions, seconds=2.0, blocks=10, clock=clock)
    totals = {name: sum(block.sum() for block in found.blocks) / 1e3 for name, found in timed.items()}
    assert totals == pytest.approx({"slow": 2.0, "fast": 2.0}, rel=0.05)


def test_a_session_slower_than_its_share_still_runs_once_in_each_block() -> None:
    clock = Clock()
    timed = time_sessions({"slow": clock.session(constant(5.0))}, seconds=1.0, blocks=4, clock=clock)
    assert [len(block) for block in timed["slow"].blocks] == [1, 1, 1, 1]


def test_the_warm_up_is_not_timed() -> None:
    clock = Clock()
    timed = time_sessions(
        {"a": clock.session(lambda now: 9.0 if now == 0 else 0.01)}, seconds=1.0, blocks=5, clock=clock
    )
    assert timed["a"].percentile(100) == pytest.approx(10.0)


def test_a_machine_that_slows_down_block_by_block_does_not_bias_the_ratio() -> None:
    clock = Clock()

    def drifting(seconds: float) -> Callable[[float], float]:
        return lambda now: seconds * (1 + now / 10)  # twice as slow after ten seconds

    sessions = {"a": clock.session(drifting(0.010)), "b": clock.session(drifting(0.010))}
    timed = time_sessions(sessions, seconds=3.0, blocks=20, clock=clock)
    assert speedup(timed["a"], timed["b"]).ratio == pytest.approx(1.0, abs=0.01)


def test_every_name_comes_early_as_often_as_late() -> None:
    places: dict[str, list[int]] = {name: [] for name in "abcde"}
    for order in orders(list("abcde"), 10, seed=3):
        for place, name in enumerate(order):
            places[name].append(place)
    assert {name: sum(where) for name, where in places.items()} == dict.fromkeys("abcde", 20)


def test_orders_follow_the_seed() -> None:
    names = list("abcdefgh")
    assert list(orders(names, 6, seed=1)) == list(orders(names, 6, seed=1)) != list(orders(names, 6, seed=2))


def test_speedup_is_paired_by_block() -> None:
    # Blocks differ tenfold, yet within each the ratio is 2: only pairing sees a point interval.
    reference = [10.0, 100.0, 20.0, 50.0, 70.0, 30.0]
    found = speedup(timing(reference), timing([value / 2 for value in reference]))
    assert (found.low, found.high) == (2.0, 2.0)


def test_the_interval_of_six_blocks_is_the_exact_one_of_their_order() -> None:
    """By hand: [least, greatest] holds the median in 1 - 2 / 64 of the cases, the next pair in 1 - 14 / 64."""
    found = speedup(timing([2.0, 3.0, 5.0, 8.0, 13.0, 21.0]), timing([1.0] * 6))
    excess = (62 / 64 - 0.95) / (62 / 64 - 50 / 64)
    inwards = 5 * excess / (1 + 4 * excess)
    low = math.exp((1 - inwards) * math.log(2) + inwards * math.log(3))
    high = math.exp((1 - inwards) * math.log(21) + inwards * math.log(13))
    assert (found.ratio, found.low, found.high) == pytest.approx((6.5, low, high))


def test_fewer_than_six_blocks_have_no_interval() -> None:
    found = speedup(timing([2.0] * (MIN_BLOCKS - 1)), timing([1.0] * (MIN_BLOCKS - 1)))
    assert (found.low, found.high) == (0.0, math.inf)
    assert speedup(timing([2.0] * MIN_BLOCKS), timing([1.0] * MIN_BLOCKS)) == Ratio(2.0, 2.0, 2.0)


NOISE: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": lambda rng, n: rng.normal(0, 0.02, n),
    "heavy tails": lambda rng, n: 0.02 * rng.standard_t(2, n),
    "one side": lambda rng, n: rng.normal(0, 0.01, n) + np.where(rng.random(n) < 0.5, rng.exponential(0.1, n), 0),
}


@pytest.mark.parametrize("noise", sorted(NOISE))
@pytest.mark.parametrize(("confidence", "blocks"), [(0.95, 6), (0.95, 7), (0.95, 10), (0.9875, 8), (0.9875, 20)])
def test_intervals_hold_the_truth_as_often_as_they_claim(noise: str, confidence: float, blocks: int) -> None:
    """3,000 simulated benches each: the standard error is 0.4 points."""
    rng = np.random.default_rng(0)
    true = math.exp(float(np.median(NOISE[noise](rng, 1_000_000))))
    found = [median_ratio(np.exp(NOISE[noise](rng, blocks)), confidence=confidence) for _ in range(3000)]
    held = np.mean([one.low <= true <= one.high for one in found])
    assert held == pytest.approx(confidence, abs=0.02)


@pytest.mark.parametrize("noise", sorted(NOISE))
def test_a_change_over_a_recorded_ratio_holds_the_truth_at_least_as_often(noise: str) -> None:
    rng = np.random.default_rng(1)
    pairs = [[median_ratio(np.exp(NOISE[noise](rng, blocks))) for blocks in (10, 30)] for _ in range(2000)]
    found = [change(now, then) for now, then in pairs]
    assert 0.94 < np.mean([one.low <= 1 <= one.high for one in found]) < 0.99


def test_a_change_over_an_exact_ratio_keeps_the_intervals_form() -> None:
    found = change(Ratio(6.0, 4.0, 10.0), Ratio(2.0, 2.0, 2.0))
    assert (found.ratio, found.low, found.high) == pytest.approx((3.0, 2.0, 5.0))
    found = change(Ratio(6.0, 6.0, 6.0), Ratio(2.0, 1.0, 3.0))
    assert (found.ratio, found.low, found.high) == pytest.approx((3.0, 2.0, 6.0))
    assert change(Ratio(6.0, 0.0, math.inf), Ratio(2.0, 1.0, 3.0)) == Ratio(3.0, 0.0, math.inf)
