"""Compare runs: their numbers, the differences of their recipes, and how fair the comparison is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.report import numbers
from compress.report.comparison.candidate import Candidate, ComparedTeacher, candidate, common_conditions
from compress.report.comparison.fair import Fairness, SpeedBy, judge_fairness
from compress.report.comparison.read import FinishedRun
from compress.report.comparison.recipes import Difference, differences
from compress.report.page import summary


@dataclass(frozen=True)
class Leading:
    """The leader in one respect, or several that are equal. `note` tells how sure that is."""

    title: str
    names: tuple[str, ...]
    value: str
    note: str


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side; `conditions` hold for all times, None if the runs share none.

    `speed_by` tells what may be ranked: times, only speed-ups over each run's own teacher, or nothing.
    """

    candidates: tuple[Candidate, ...]
    teachers: tuple[ComparedTeacher, ...]
    conditions: str | None
    speed_by: SpeedBy | None
    best: tuple[Leading, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    metric: str
    decimals: int


def compare(runs: Mapping[str, FinishedRun]) -> RunComparison:
    """Compare runs, named by the keys of `runs`, in their order."""
    reports = {name: run.report for name, run in runs.items()}
    conditions = common_conditions(list(reports.values()))
    found = [candidate(name, run, conditions) for name, run in runs.items()]
    fairness = judge_fairness(found, reports, are_alike=conditions is not None)
    digits = min(summary.decimals(report) for report in reports.values())
    titles = {numbers.heading(report["metric"]["title"]) for report in reports.values()}
    scores = {one.name: one.score for one in found if fairness.same_images and one.score is not None}
    speeds = {one.name: fast for one in found if (fast := _speed(one, fairness.speed_by)) is not None}
    efficient = _efficient({name: (scores[name], speeds[name]) for name in scores if name in speeds})
    return RunComparison(
        candidates=tuple(replace(one, is_efficient=efficient.get(one.name)) for one in found),
        teachers=_teachers(found),
        conditions=conditions.text if conditions else None,
        speed_by=fairness.speed_by,
        best=tuple(_best({one.name: one for one in found}, scores, speeds, fairness, digits)),
        differences=tuple(differences([report["recipe"] for report in reports.values()])),
        warnings=fairness.warnings,
        metric=titles.pop() if len(titles) == 1 else "Score",
        decimals=digits,
    )


def _speed(one: Candidate, speed_by: SpeedBy | None) -> float | None:
    """Return the number that ranks a candidate's speed; more is faster."""
    if speed_by == "latency":
        return 1 / one.p50_ms if one.p50_ms else None
    return one.speedup["ratio"] if one.speedup and speed_by == "speedup" else None


def _efficient(places: Mapping[str, tuple[float, float]]) -> dict[str, bool]:
    """Tell of each (score, speed) whether no other is at least as good in both, and better in one (Pareto); empty for one alone."""
    return {
        name: not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in places.values())
        for name, own in places.items()
        if len(places) > 1
    }


def _teachers(found: Sequence[Candidate]) -> tuple[ComparedTeacher, ...]:
    """Return each teacher once, with the candidates that share its source stage."""
    taught: dict[str, list[Candidate]] = {}
    for one in found:
        taught.setdefault(one.teacher.key, []).append(one)
    return tuple(replace(ones[0].teacher, of=tuple(one.name for one in ones)) for ones in taught.values())


def _best(
    found: Mapping[str, Candidate],
    scores: Mapping[str, float],
    speeds: Mapping[str, float],
    fairness: Fairness,
    digits: int,
) -> Iterator[Leading]:
    """Yield the most accurate, the fastest and the smallest; a title is left out if no leader is known."""
    if names := _leaders(scores):
        sure = _apart(names, {name: found[name].score_ci95 for name in scores})
        yield Leading("Most accurate", names, numbers.percent(scores[names[0]], digits), sure)
    if names := _leaders(speeds):
        intervals = {name: one.speedup and one.speedup["ci95"] for name, one in found.items() if one.p50_ms}
        first, sure = found[names[0]], _apart(names, intervals) if fairness.same_teacher else ""
        facts = [numbers.significant(first.p50_ms, "ms")] if fairness.speed_by == "latency" else []
        facts += [f"{numbers.times(first.speedup['ratio'])} its teacher"] if first.speedup else []
        yield Leading("Fastest", names, facts[0], ", ".join(filter(None, (*facts[1:], sure))))
    if names := _leaders({name: -one.size_mb for name, one in found.items() if one.size_mb is not None}):
        yield Leading("Smallest", names, numbers.significant(found[names[0]].size_mb, "MB"), "")


def _leaders(values: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names with the largest value; none if fewer than two are known or all are equal."""
    are_equal = len(set(values.values())) < 2
    return () if are_equal else tuple(name for name, value in values.items() if value == max(values.values()))


def _apart(names: Sequence[str], intervals: Mapping[str, Sequence[float] | None]) -> str:
    """Return in words whether the leaders' intervals lie above all others."""
    ours = [intervals[name] for name in names]
    others = [interval for name, interval in intervals.items() if name not in names]
    if not others or not all(ours) or not all(others):
        return ""
    above = min(low for low, _ in filter(None, ours)) > max(high for _, high in filter(None, others))
    return "beyond all other intervals" if above else "but the 95 % intervals overlap"
