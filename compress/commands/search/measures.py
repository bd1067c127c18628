"""Measures of a finished run, read from its report, as a search's objectives and constraints."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from compress.recipe.explain import unknown
from compress.report import numbers
from compress.report.judge.verdict import any_row, deployed_name, first_and_last, headline_provider, headline_row
from compress.report.page.summary import network
from compress.report.shape import DeployedRow, Report
from export.images.size import said
from export.onnx_file.roles import TEACHER


class Measure(NamedTuple):
    """One measure: title, unit (fractions are shown in percent), whether more is better, how to read it, the stage it needs."""

    title: str
    unit: str
    is_gain: bool
    read: Callable[[Report], float | None]
    stage: str | None = None

    def show(self, value: float | None) -> str:
        """Return a value with its unit."""
        return numbers.percent(value) if self.unit == "%" else numbers.significant(value, self.unit)

    def show_all(self, values: Sequence[float]) -> str:
        """Return the mean of a value for each seed, with the range if there are several."""
        shown = self.show(statistics.fmean(values) if values else None)
        return shown if len(values) < 2 else f"{shown} ({self.show(min(values))} to {self.show(max(values))})"


class Limit(NamedTuple):
    """A limit on one measure, such as `latency < 5`."""

    measure: str
    sign: str
    bound: float

    def excess(self, value: float) -> float:
        """Return by how much a value exceeds the limit: > 0 if it does; on a strict limit's bound, a tiny positive number."""
        over = value - self.bound if self.sign[0] == "<" else self.bound - value
        return over if over or self.sign.endswith("=") else 1e-12

    def is_met(self, value: float | None) -> bool:
        """Tell whether a value meets the limit; one that was not measured does not."""
        return value is not None and self.excess(value) <= 0


def limits(text: str) -> list[Limit]:
    """Return the limits in a text such as `latency < 5, score > 0.97`; raise ValueError if it has another form."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", part)
        if match is None or match[3].count(".") > 1:
            raise ValueError(f"constraints: {part.strip()!r} is not a limit; write it as `latency < 5`")
        if match[1] not in MEASURES:
            raise ValueError(f"constraints: nothing measures {match[1]}; {unknown(match[1], MEASURES)}")
        found.append(Limit(match[1], match[2], float(match[3])))
    return found


def measure(report: Report, clocks: Mapping[str, float]) -> dict[str, float]:
    """Return all of a run's measures by name.

    Latencies are scaled so that each teacher takes its reference time in `clocks` (ms): every bench times teacher and student
    interleaved, so this makes runs of different hours comparable.
    """
    found = {name: value for name, one in MEASURES.items() if (value := one.read(report)) is not None}
    if "latency" in found and (own := teacher_ms(report)):
        found["latency"] *= clocks.get(teacher_of(report), own) / own
    return found


def teacher_of(report: Report) -> str:
    """Return a key for the teacher: its network and image size."""
    row = _timed(report, TEACHER)
    return f"{network(report)}, {row and said(row['image_size'])} px"


def teacher_ms(report: Report) -> float | None:
    """Return the teacher's median latency, or None if it was not timed."""
    row = _timed(report, TEACHER)
    return row and row["p50_ms"]


def _timed(report: Report, name: str | None) -> DeployedRow | None:
    return headline_row(report, name, headline_provider(report))


def _student(report: Report) -> DeployedRow | None:
    return _timed(report, deployed_name(report))


def _score(report: Report, index: int = 1) -> float | None:
    row = any_row(report, (TEACHER, deployed_name(report))[index])
    return row["score"] if row else first_and_last(report, "score")[index]


def _drop(report: Report) -> float | None:
    teacher, student = _score(report, 0), _score(report)
    return None if teacher is None or student is None else teacher - student


def _speedup(report: Report) -> float | None:
    row = _student(report)
    return row["speedup"]["ratio"] if row and row["speedup"] else None


def _latency(report: Report) -> float | None:
    row = _student(report)
    return row and row["p50_ms"]


def _size(report: Report) -> float | None:
    row = any_row(report, deployed_name(report))
    return row["size_mb"] if row else first_and_last(report, "size_mb")[1]


def _training(report: Report) -> float:
    return sum(row["seconds"] or 0.0 for row in report["stages"] if row["stage"] in ("prune", "distill", "qat"))


MEASURES: dict[str, Measure] = {
    "score": Measure("Score", "%", True, _score),
    "drop": Measure("Drop from the teacher", "%", False, _drop),
    "latency": Measure("Latency", "ms", False, _latency, stage="bench"),
    "speedup": Measure("Speed-up over the teacher", "×", True, _speedup, stage="bench"),
    "size": Measure("Size", "MB", False, _size),
    "macs": Measure("Multiply-accumulates", "M", False, lambda report: first_and_last(report, "macs_m")[1]),
    "params": Measure("Parameters", "M", False, lambda report: first_and_last(report, "params_m")[1]),
    "training": Measure("Pruning and training", "s", False, _training),
}
