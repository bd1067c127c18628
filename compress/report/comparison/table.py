"""The comparison's lines in words, for the terminal and for the page."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from compress.report import numbers
from compress.report.comparison.candidate import Candidate
from compress.report.comparison.compare import Comparison
from compress.report.numbers import UNKNOWN
from compress.report.shape import Speedup


class Line(NamedTuple):
    """One measurement of all candidates: a title, a short one with its unit, the texts, and which of them lead."""

    title: str
    short: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()

    @property
    def is_shared(self) -> bool:
        """Whether all candidates have the same."""
        return len(set(self.cells)) == 1

    @property
    def is_known(self) -> bool:
        """Whether any candidate has it."""
        return any(cell != UNKNOWN for cell in self.cells)


def lines(comparison: Comparison) -> list[Line]:
    """Return every line that at least one candidate knows."""
    return [line for line in _lines(comparison) if line.is_known]


def no_differences(comparison: Comparison) -> str:
    """Return what to say where no setting differs."""
    known = sum(one.verdict is not None for one in comparison.candidates)
    return "The recipes do not differ." if known > 1 else "Fewer than two of the recipes are known."


def _lines(comparison: Comparison) -> Iterator[Line]:
    ranked = {best.title: best.names for best in comparison.best}
    digits = comparison.decimals

    def line(title: str, short: str, text: Callable[[Candidate], str], best: str = "") -> Line:
        names = ranked.get(best, ())
        indexes = (index for index, one in enumerate(comparison.candidates) if one.name in names)
        return Line(title, short, tuple(text(one) for one in comparison.candidates), frozenset(indexes))

    fastest = {"latency": ("Fastest", ""), "speedup": ("", "Fastest"), None: ("", "")}[comparison.speed_by]
    yield line("Verdict", "Verdict", _verdict)
    yield line("Deployed file", "File", lambda one: one.file or UNKNOWN)
    yield line("Recommended file", "To serve", lambda one: one.recommended or UNKNOWN)
    yield line("Made for", "Target", lambda one: one.target)
    yield line("Score", "Score", lambda one: numbers.percent(one.score, digits), "Most accurate")
    yield line("Its 95 % interval", "95 %", lambda one: _percents(one.score_ci95, digits))
    yield line(
        "Score of the teacher",
        "Teacher",
        lambda one: numbers.percent(one.teacher.score if one.teacher else None, digits),
    )
    yield line("Agreement with own FP32", "Agree", lambda one: numbers.percent(one.agreement, digits))
    yield line("Size", "Size", lambda one: numbers.significant(one.size_mb, "MB"), "Smallest")
    yield line("Multiply-accumulates", "MACs", lambda one: numbers.significant(one.macs_m, "M"))
    yield line("Parameters", "Params", lambda one: numbers.significant(one.params_m, "M"))
    yield line("Latency, median", "p50", lambda one: numbers.significant(one.p50_ms, "ms"), fastest[0])
    yield line("Speed-up over teacher", "vs teacher", lambda one: _ratio(one.speedup), fastest[1])
    yield line("Its 95 % interval", "95 %", lambda one: _interval(one.speedup))
    yield line("Speed-up over own FP32", "vs FP32", lambda one: _ratio(one.speedup_vs_student_fp32))
    yield line("Best trade-off", "Trade-off", _efficient)
    yield line("Layers in integers", "Int", lambda one: _count(one.integer_layers))
    yield line("Layers in float", "Float", lambda one: _count(one.float_layers))
    yield line("Training", "Training", lambda one: numbers.duration(one.training_seconds))
    yield line("ONNX opset", "Opset", lambda one: _count(one.opset))


def _verdict(one: Candidate) -> str:
    if one.verdict is None:
        return UNKNOWN
    return f"fail ({one.failures})" if one.verdict == "fail" else one.verdict


def _efficient(one: Candidate) -> str:
    return UNKNOWN if one.is_efficient is None else "yes" if one.is_efficient else "no"


def _ratio(speedup: Speedup | None) -> str:
    return numbers.times(speedup and speedup["ratio"])


def _interval(speedup: Speedup | None) -> str:
    return "{:.2f}–{:.2f}".format(*speedup["ci95"]) if speedup else UNKNOWN


def _percents(interval: tuple[float, float] | None, digits: int) -> str:
    return UNKNOWN if interval is None else "–".join(f"{100 * end:.{digits}f}" for end in interval)


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"
