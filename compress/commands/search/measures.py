"""What a search can look for: measures of a finished run, read from its report, and limits on them."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from compress.recipe.explain import unknown
from compress.report import numbers
from compress.report.shape import DeployedRow, Report
from compress.report.verdict import any_row, deployed_name, first_and_last, headline_provider, headline_row
from export.onnx_file.roles import TEACHER

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
TRAININGS = ("prune", "distill", "qat")


class Measure(NamedTuple):
    """One measure: its title and unit (a fraction is shown in percent), whether more is better, the stage that it needs, how it is read."""

    title: str
    unit: str
    is_gain: bool
    stage: str | None
    read: Callable[[Report], float | None]

    def show(self, value: float | None) -> str:
        """Return a value with its unit."""
        return numbers.percent(value) if self.unit == "%" else numbers.significant(value, self.unit)


class Limit(NamedTuple):
    """A limit on one measure, such as `latency < 5`."""

    text: str
    measure: str
    is_met: Callable[[float], bool]
    excess: Callable[[float], float]  # > 0 where it is missed


def limits(text: str) -> list[Limit]:
    """Return the limits of a text such as `latency < 5, score > 0.97`; raise ValueError for what is none."""
    return [_limit(part) for part in text.split(",")]


def _limit(text: str) -> Limit:
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
    if found is None:
        raise ValueError(f"constraints: {text.strip()!r} is no limit; write one as `latency < 5`")
    name, sign, number = found.groups()
    if name not in MEASURES:
        raise ValueError(f"constraints: nothing measures {name}; {unknown(name, MEASURES)}")
    try:
        bound = float(number)
    except ValueError as error:
        raise ValueError(f"constraints: {number} is no number in {text.strip()!r}") from error
    direction = 1 if sign.startswith("<") else -1

    def is_met(value: float) -> bool:
        return bool(OPERATORS[sign](value, bound))

    def excess(value: float) -> float:
        return min(0.0, direction * (value - bound)) if is_met(value) else max(1e-9, direction * (value - bound))

    return Limit(f"{name} {sign} {bound:g}", name, is_met, excess)


def measure(report: Report, clocks: Mapping[str, float]) -> dict[str, float]:
    """Return all that a run measured, by the measures' names.

    Latencies of different hours are compared through the teacher, which every bench times in turns with the student: `clocks` has
    the time, in ms, that stands for each teacher.
    """
    found = {name: value for name, one in MEASURES.items() if (value := one.read(report)) is not None}
    teacher = _timed(report, TEACHER)
    if "latency" in found and teacher is not None and teacher["p50_ms"]:
        found["latency"] *= clocks.get(clock_of(report), teacher["p50_ms"]) / teacher["p50_ms"]
    return found


def clock_of(report: Report) -> str:
    """Return what tells teachers of equal speed."""
    return f"{report['recipe']['model']['arch']}, {_deployed(report, 'image_size')} px"


def teacher_ms(report: Report) -> float | None:
    """Return the teacher's median latency where it was timed."""
    row = _timed(report, TEACHER)
    return row and row["p50_ms"]


def _timed(report: Report, name: str | None) -> DeployedRow | None:
    return headline_row(report, name, headline_provider(report))


def _deployed(report: Report, key: str) -> float | None:
    row = _timed(report, deployed_name(report))
    return row and row[key]  # type: ignore[literal-required]


def _score(report: Report) -> float | None:
    row = any_row(report, deployed_name(report))
    return row["score"] if row else first_and_last(report, "score")[1]


def _drop(report: Report) -> float | None:
    row, student = any_row(report, TEACHER), _score(report)
    teacher = row["score"] if row else first_and_last(report, "score")[0]
    return None if teacher is None or student is None else teacher - student


def _speedup(report: Report) -> float | None:
    row = _timed(report, deployed_name(report))
    return row["speedup"]["ratio"] if row and row["speedup"] else None


def _size(report: Report) -> float | None:
    row = any_row(report, deployed_name(report))
    return row["size_mb"] if row else first_and_last(report, "size_mb")[1]


def _training(report: Report) -> float:
    return sum(row["seconds"] or 0.0 for row in report["stages"] if row["stage"] in TRAININGS)


MEASURES: dict[str, Measure] = {
    "score": Measure("Score", "%", True, None, _score),
    "drop": Measure("Drop from the teacher", "%", False, None, _drop),
    "latency": Measure("Latency", "ms", False, "bench", lambda report: _deployed(report, "p50_ms")),
    "speedup": Measure("Speed-up over the teacher", "×", True, "bench", _speedup),
    "size": Measure("Size", "MB", False, None, _size),
    "macs": Measure("Multiply-accumulates", "M", False, None, lambda report: first_and_last(report, "macs_m")[1]),
    "params": Measure("Parameters", "M", False, None, lambda report: first_and_last(report, "params_m")[1]),
    "training": Measure("Time of pruning and training", "s", False, None, _training),
}
