"""The gate on latency, with sessions that a fake clock times."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from export.gate.latency import Opener, Plan, compare, judge, record, self_test
from export.runtime.latency import Ratio, median_ratio


class Machine:
    """A clock, and sessions that move it by their time and the machine's noise."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.now, self.noise, self.rng, self.opened = 0.0, noise, np.random.default_rng(seed), 0

    def clock(self) -> float:
        return self.now

    def opener(self, seconds: float) -> Opener:
        def open_() -> Callable[[], None]:
            self.opened += 1

            def run() -> None:
                self.now += seconds * float(np.exp(self.noise * self.rng.standard_normal()))

            return run

        return open_

    @property
    def plan(self) -> Plan:
        return Plan(seconds=0.2, blocks=12, looks=3, clock=self.clock)


def slowdown(machine: Machine, factor: float, limit: float = 1.05) -> tuple[Ratio, str]:
    found, _ = compare(machine.opener(0.004 * factor), machine.opener(0.004), machine.plan, limit)
    return found, judge(found, limit, was="", now="", explained=None).status


def test_the_ratio_is_new_over_old() -> None:
    found, _ = slowdown(Machine(), 1.5)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


@pytest.mark.parametrize(
    ("factor", "status"), [(1.0, "pass"), (1.04, "pass"), (1.1, "fail"), (0.97, "pass"), (0.8, "unexplained")]
)
def test_the_verdict_follows_the_interval(factor: float, status: str) -> None:
    assert slowdown(Machine(noise=0.02), factor)[1] == status


def test_a_reason_explains_that_the_file_is_faster() -> None:
    found, _ = slowdown(Machine(), 0.8)
    check = judge(found, 1.05, was="", now="", explained="the file does other work")
    assert (check.status, check.detail) == (
        "pass",
        "0.800 [0.800, 0.800] times the baseline's: faster: the file does other work",
    )


def test_a_clear_pass_takes_one_look_an_alarm_two_and_an_open_answer_all() -> None:
    equal, slow, unclear = Machine(), Machine(), Machine(noise=0.2)
    verdicts = [slowdown(equal, 1.0)[1], slowdown(slow, 1.2)[1], slowdown(unclear, 1.05)[1]]
    assert verdicts == ["pass", "fail", "inconclusive"]
    assert (equal.opened, slow.opened, unclear.opened) == (2, 4, 6)


@pytest.mark.parametrize("luck", [1.2, 0.8])
def test_one_unlucky_opening_raises_no_alarm(luck: float) -> None:
    machine = Machine()
    speeds = iter([0.004 * luck, *[0.004] * 5])
    found, _ = compare(lambda: machine.opener(next(speeds))(), machine.opener(0.004), machine.plan, 1.05)
    assert judge(found, 1.05, was="", now="", explained=None).status in ("pass", "inconclusive")


def test_each_look_adds_blocks_of_sessions_opened_anew() -> None:
    machine = Machine(noise=0.2)
    _, timed = compare(machine.opener(0.0042), machine.opener(0.004), machine.plan, 1.05)
    assert [len(timing.blocks) for timing in timed.values()] == [36, 36]


def test_a_quiet_machine_is_fit() -> None:
    machine = Machine(noise=0.02)
    assert self_test(machine.opener(0.004), machine.plan, 1.05).status == "pass"


def test_a_machine_whose_noise_is_beyond_the_limit_is_unfit() -> None:
    machine = Machine(noise=1.0)
    check = self_test(machine.opener(0.02), machine.plan, 1.01)
    assert check.status == "inconclusive"
    assert check.detail.startswith("unfit for timing")


def test_a_machine_that_favours_one_of_two_equal_sessions_is_unfit() -> None:
    machine = Machine()
    speeds = iter([0.004, 0.005] * 3)
    assert self_test(lambda: machine.opener(next(speeds))(), machine.plan, 1.05).status == "inconclusive"


def test_the_recorded_ratio_stands_for_the_old_file() -> None:
    then, now = Machine(noise=0.02, seed=1), Machine(noise=0.02, seed=2)
    recorded = record(then.opener(0.002), then.opener(0.004), then.plan, name="student_fp32")
    assert len(recorded.ratios) == 36
    assert np.median(recorded.ratios) == pytest.approx(0.5, rel=0.02)
    # The whole machine is twice as slow on another day; only the served file is 20 % slower still.
    found, _ = compare(
        now.opener(0.0048), now.opener(0.008), now.plan, 1.05, then=median_ratio(np.array(recorded.ratios))
    )
    assert found.ratio == pytest.approx(1.2, rel=0.03)
    assert found.low > 1.05


def test_noise_of_the_recording_widens_the_interval() -> None:
    machine = Machine()
    exact, noisy = np.full(12, 0.5), 0.5 * np.exp(0.1 * np.random.default_rng(0).standard_normal(12))
    intervals = [
        compare(machine.opener(0.002), machine.opener(0.004), machine.plan, 1.05, then=median_ratio(recorded))[0]
        for recorded in (exact, noisy)
    ]
    assert intervals[0].high - intervals[0].low < 1e-9 < 0.02 < intervals[1].high - intervals[1].low


def test_gates_on_equal_files_raise_no_alarm_and_find_every_planted_slow_down() -> None:
    def verdicts(factor: float) -> set[str]:
        return {slowdown(Machine(noise=0.1, seed=seed), factor)[1] for seed in range(3)}

    assert "fail" not in verdicts(1.0)
    assert verdicts(1.15) == {"fail"}


def test_a_look_of_few_blocks_gives_no_verdict_that_its_confidence_does_not_bear() -> None:
    """Six blocks hold a median in 96.9 % at most, and each of four looks owes 98.75 %."""
    few = Machine(noise=0.02)
    compare(few.opener(0.004), few.opener(0.004), replace(few.plan, blocks=6, looks=4), 1.2)
    assert few.opened == 4  # two looks of both files


def test_more_looks_ask_for_more_confidence() -> None:
    plan = Plan()
    assert replace(plan, looks=1).confidence == pytest.approx(0.95)
    assert replace(plan, looks=4).confidence == pytest.approx(0.9875)
