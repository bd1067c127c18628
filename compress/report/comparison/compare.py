"""Compare runs: their numbers, the differences of their recipes, and how fair the comparison is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.report import numbers
from compress.report.comparison.candidate import Candidate, Subject, Teacher, candidate, common_conditions
from compress.report.comparison.fair import Fairness, SpeedBy, judge_fairness
from compress.report.comparison.recipes import Difference, differences
from compress.report.page import summary


@dataclass(frozen=True)
class Best:
    """The leader in one respect, or several that are equal. `note` tells how sure that is."""

    title: str
    names: tuple[str, ...]
    value: str
    note: str


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; `conditions` hold for all times, None if the runs share none.

    `speed_by` tells what may be ranked: times, only speed-ups over each run's own teacher, or nothing.
    """

    candidates: tuple[Candidate, ...]
    teachers: tuple[Teacher, ...]
    conditions: str | None
    speed_by: SpeedBy | None
    best: tuple[Best, ...]
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    metric: str
    decimals: int


def compare(subjects: Mapping[str, Subject]) -> Comparison:
    """Compare runs, named by the keys of `subjects`, in their order."""
    reports = {name: subject.report for name, subject in subjects.items()}
    conditions = common_conditions(list(reports.values()))
    found = [candidate(name, subject, conditions) for name, subject in subjects.items()]
    fairness = judge_fairness(found, reports, are_alike=conditions is not None)
    digits = min(summary.decimals(report) for report in reports.values())
    titles = {numbers.heading(report["metric"]["title"]) for report in reports.values()}
    found = [replace(one, is_efficient=_is_efficient(one, found, fairness)) for one in found]
    return Comparison(
        candidates=tuple(found),
        teachers=_teachers(found),
        conditions=conditions.text if conditions else None,
        speed_by=fairness.speed_by,
        best=tuple(_best(found, fairness, digits)),
        differences=tuple(differences([report["recipe"] for report in reports.values()])),
        warnings=fairness.warnings,
        metric=titles.pop() if len(titles) == 1 else "Score",
        decimals=digits,
    )


def leaders(candidates: Sequence[Candidate], value: Callable[[Candidate], float | None]) -> tuple[str, ...]:
    """Return the names with the largest value; none if fewer than two are known or all are equal."""
    known = {one.name: number for one in candidates if (number := value(one)) is not None}
    if len(known) < 2 or len(set(known.values())) == 1:
        return ()
    return tuple(name for name, number in known.items() if number == max(known.values()))


def speed(one: Candidate, speed_by: SpeedBy | None) -> float | None:
    """Return the number that ranks a candidate's speed; more is faster."""
    if speed_by == "latency":
        return None if not one.p50_ms else 1 / one.p50_ms
    return one.speedup["ratio"] if one.speedup and speed_by == "speedup" else None


def score(one: Candidate, fairness: Fairness) -> float | None:
    """Return the score that ranks a candidate's accuracy; None if the images differ."""
    return one.score if fairness.same_images else None


def _is_efficient(one: Candidate, everyone: Sequence[Candidate], fairness: Fairness) -> bool | None:
    """Tell whether no other candidate is at least as accurate and as fast, and better in one (Pareto); None if unknown."""
    places = {other.name: (score(other, fairness), speed(other, fairness.speed_by)) for other in everyone}
    known = {name: (right, fast) for name, (right, fast) in places.items() if right is not None and fast is not None}
    if one.name not in known or len(known) < 2:
        return None
    own = known[one.name]
    return not any(place != own and place[0] >= own[0] and place[1] >= own[1] for place in known.values())


def _teachers(found: Sequence[Candidate]) -> tuple[Teacher, ...]:
    """Return each teacher once, with the candidates that share its source stage."""
    unique = {one.teacher.key: one.teacher for one in reversed(found)}
    names = {key: tuple(one.name for one in found if one.teacher.key == key) for key in unique}
    return tuple(replace(teacher, of=names[key]) for key, teacher in reversed(unique.items()))


def _best(found: Sequence[Candidate], fairness: Fairness, digits: int) -> Iterator[Best]:
    """Yield the most accurate, the fastest and the smallest; a title is left out if no leader is known."""
    by_name = {one.name: one for one in found}
    if names := leaders(found, lambda one: score(one, fairness)):
        sure = _apart(names, {one.name: one.score_ci95 for one in found if one.score is not None})
        yield Best("Most accurate", names, numbers.percent(by_name[names[0]].score, digits), sure)
    if names := leaders(found, lambda one: speed(one, fairness.speed_by)):
        intervals = {one.name: one.speedup and one.speedup["ci95"] for one in found if one.p50_ms}
        first, sure = by_name[names[0]], _apart(names, intervals) if fairness.same_teacher else ""
        facts = [numbers.significant(first.p50_ms, "ms")] if fairness.speed_by == "latency" else []
        facts += [f"{numbers.times(first.speedup['ratio'])} its teacher"] if first.speedup else []
        yield Best("Fastest", names, facts[0], ", ".join(filter(None, (*facts[1:], sure))))
    if names := leaders(found, lambda one: None if one.size_mb is None else -one.size_mb):
        yield Best("Smallest", names, numbers.significant(by_name[names[0]].size_mb, "MB"), "")


def _apart(names: Sequence[str], intervals: Mapping[str, Sequence[float] | None]) -> str:
    """Return in words whether the leaders' intervals lie above all others."""
    ours = [intervals[name] for name in names]
    others = [interval for name, interval in intervals.items() if name not in names]
    if not others or not all(ours) or not all(others):
        return ""
    above = min(low for low, _ in filter(None, ours)) > max(high for _, high in filter(None, others))
    return "beyond all other intervals" if above else "but the 95 % intervals overlap"
