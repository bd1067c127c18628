"""Show a comparison as tables in the terminal and on a page: up to four runs are columns, more are rows."""

import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from compress.report import numbers
from compress.report.comparison.candidate import Candidate
from compress.report.comparison.compare import Comparison
from compress.report.comparison.recipes import by_value
from compress.report.numbers import UNKNOWN
from compress.report.page.html import LATENCY, Page, cloud, render_page
from compress.report.page.screen import print_what_fits, say, show
from compress.report.page.table import Section, Strong, Table, count
from export.onnx_file.roles import TEACHER
from export.runtime.rows import Speedup

COLOURS = 8  # --series-1 to --series-8 in the style sheet, then repeated
MOST_COLUMNS = 4
LABEL_LENGTH = 26
FAILURES = 6  # at most, for each run
NOTE = (
    "The scores' intervals are exact (Clopper and Pearson) or by resampling images, for each run by itself. "
    "Best trade-off: no other run is at least as accurate and as fast, and better in one."
)


class Line(NamedTuple):
    """One measurement of all candidates: a title, a short title, and the cells, with leaders in bold."""

    title: str
    short: str
    cells: Sequence[str]


def lines(comparison: Comparison) -> list[Line]:
    """Return every line that has a value for at least one candidate."""
    leads = {best.title: best.names for best in comparison.best}
    digits = comparison.decimals
    ranked = {"latency": ("Fastest", ""), "speedup": ("", "Fastest"), None: ("", "")}[comparison.speed_by]

    def line(title: str, short: str, text: Callable[[Candidate], str], best: str = "") -> Line:
        texts = [(text(one), one.name in leads.get(best, ())) for one in comparison.candidates]
        return Line(title, short, [Strong(cell) if is_best else cell for cell, is_best in texts])

    metric = comparison.metric
    found = [
        line("Verdict", "Verdict", lambda one: f"fail ({one.failures})" if one.verdict == "fail" else one.verdict),
        line("Deployed file", "File", lambda one: one.file or UNKNOWN),
        line("Recommended file", "To serve", lambda one: one.recommended or UNKNOWN),
        line("Made for", "Target", lambda one: one.target),
        line(metric, metric, lambda one: numbers.percent(one.score, digits), "Most accurate"),
        line("Its 95 % interval", "95 %", lambda one: _percents(one.score_ci95, digits)),
        line(f"{metric} of the teacher", "Teacher", lambda one: numbers.percent(one.teacher.score, digits)),
        line("Agreement with own FP32", "Agree", lambda one: numbers.percent(one.agreement, digits)),
        line("Size", "Size", lambda one: numbers.significant(one.size_mb, "MB"), "Smallest"),
        line("Multiply-accumulates", "MACs", lambda one: numbers.significant(one.macs_m, "M")),
        line("Parameters", "Params", lambda one: numbers.significant(one.params_m, "M")),
        line("Latency, median", "p50", lambda one: numbers.significant(one.p50_ms, "ms"), ranked[0]),
        line("Speed-up over teacher", "vs teacher", lambda one: _ratio(one.speedup), ranked[1]),
        line("Interval of the speed-up", "95 % of it", lambda one: _interval(one.speedup)),
        line("Speed-up over own FP32", "vs FP32", lambda one: _ratio(one.speedup_vs_student_fp32)),
        line("Best trade-off", "Trade-off", lambda one: {None: UNKNOWN, True: "yes", False: "no"}[one.is_efficient]),
        line("Layers in integers", "Int", lambda one: count(one.integer_layers)),
        line("Layers in float", "Float", lambda one: count(one.float_layers)),
        line("Training", "Training", lambda one: numbers.duration(one.training_seconds)),
        line("ONNX opset", "Opset", lambda one: count(one.opset)),
    ]
    return [line for line in found if set(line.cells) != {UNKNOWN}]


DECIDING = ("Verdict", "To serve", "Size", "MACs", "p50", "vs teacher", "Trade-off")  # and the score


def measured(comparison: Comparison, *, is_short: bool = False) -> Table:
    """Return the candidates as columns, or as rows with a note of what all have in common."""
    names, found = [one.name for one in comparison.candidates], lines(comparison)
    if is_short:
        found = [line for line in found if line.short in (*DECIDING, comparison.metric)]
    if len(names) <= MOST_COLUMNS:
        return Table("Measured", ("", *names), [(line.title, *line.cells) for line in found])
    own = [line for line in found if len(set(line.cells)) > 1]
    shared = " · ".join(f"{line.title} {line.cells[0]}" for line in found if line not in own)
    rows = [(name, f"{index + 1}", *(line.cells[index] for line in own)) for index, name in enumerate(names)]
    return Table("Measured", ("", "No", *(line.short for line in own)), rows, note=f"All: {shared}" if shared else "")


def differences(comparison: Comparison) -> Table:
    """Return the settings that differ, with a column per candidate or, for many candidates, a row per value."""
    names, found = [one.name for one in comparison.candidates], comparison.differences
    if not found:
        return Table("Recipes", ("",), [("The recipes do not differ.",)])
    if len(names) <= MOST_COLUMNS:
        columns = ("Setting", *names)
        return Table("Recipes", columns, [(one.path, *one.values) for one in found], tuple(range(len(columns))))
    rows = [(one.path, value, of) for one in found for value, of in by_value(names, one.values)]
    return Table("Recipes", ("Setting", "Value", "Of"), rows, (0, 1, 2))


def print_comparison(
    comparison: Comparison,
    console: Console,
    *,
    verbose: bool = False,
    ends: Sequence[Callable[[Console, int], None]] = (),
) -> None:
    """Print the leaders, the deciding measurements and the warnings; everything if verbose.

    `ends` are called last, each with the number of notes that it may print.
    """
    total = max(len(comparison.warnings), FAILURES)

    def draw(console: Console, notes: int) -> None:
        console.print(Text(f"\n{' · '.join(one.name for one in comparison.candidates)}", "bold"))
        if comparison.conditions:
            say(console, f"times: {comparison.conditions}", "dim")
        show(console, Table("", ("",) * 4, [tuple(row) for row in _leaders(comparison)], (0, 1, 3)))
        show(console, measured(comparison, is_short=not verbose))
        if verbose:
            show(console, differences(comparison))
        elif comparison.differences:
            say(console, f"\nsettings that differ: {len(comparison.differences)} (-v shows them)", "dim")
        for warning in comparison.warnings[:notes]:
            say(console, warning, "yellow", "\nwarning ")
        if hidden := len(comparison.warnings[notes:]):
            say(console, f"\n{hidden} more on the page and with -v", "yellow")
        for end in ends:
            end(console, notes)

    draw(console, total) if verbose else print_what_fits(console, draw, total)


def _leaders(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    for best in comparison.best:
        yield best.title, Strong(", ".join(best.names)), best.value, best.note


def render_comparison(comparison: Comparison) -> str:
    """Return the page; every text is escaped."""
    names = [one.name for one in comparison.candidates]
    times = f". Times: {comparison.conditions}" if comparison.conditions else ""
    drawing = _cloud(comparison)
    return render_page(
        Page(
            kind="comparison",
            title=" · ".join(names),
            lead=f"{len(names)} runs side by side; each is measured by the file that it deploys{times}",
            cards=[(best, who, value, note) for best, who, value, note in _leaders(comparison)],
            warnings=comparison.warnings,
            sections=[
                (
                    Section("Measured", [measured(comparison)._replace(title="")], after=[NOTE]),
                    [drawing] if drawing else [],
                ),
                (Section("What differs in the recipes", [differences(comparison)._replace(title="")]), ()),
            ],
            colours={name: f"var(--{_series(index)})" for index, name in enumerate(names)},
            links={one.name: one.link for one in comparison.candidates if one.link},
        )
    )


def link_to(target: Path, page: Path) -> str:
    """Return the relative link from a page to a file."""
    return urllib.parse.quote(Path(os.path.relpath(target, page.parent)).as_posix())


def _cloud(comparison: Comparison) -> Markup | None:
    """Return a scatter plot of accuracy against speed with the teachers; None if speed may not be ranked."""
    by_ratio = comparison.speed_by == "speedup"
    points: list[tuple[str, str, float, float]] = []
    for teacher in comparison.teachers:
        x = 1.0 if by_ratio else teacher.p50_ms
        whose = "Teacher" if len(comparison.teachers) == 1 else f"Teacher of {', '.join(teacher.of)}"
        points += [(TEACHER, whose, x, teacher.score)] if x and teacher.score is not None else []
    teachers = len(points)
    for index, one in enumerate(comparison.candidates):
        x = (one.speedup["ratio"] if one.speedup else None) if by_ratio else one.p50_ms
        label = one.name if len(comparison.candidates) <= MOST_COLUMNS else str(index + 1)
        points += [(_series(index), label, x, one.score)] if x and x > 0 and one.score is not None else []
    if comparison.speed_by is None or len(points) == teachers:
        return None
    title = "speed-up over the teacher (log scale)" if by_ratio else LATENCY
    return cloud(comparison.conditions or "", title, [(name, _short(label), x, y) for name, label, x, y in points])


def _series(index: int) -> str:
    return f"series-{index % COLOURS + 1}"


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"


def _ratio(speedup: Speedup | None) -> str:
    return numbers.times(speedup and speedup["ratio"])


def _interval(speedup: Speedup | None) -> str:
    return "{:.2f}–{:.2f}".format(*speedup["ci95"]) if speedup else UNKNOWN


def _percents(interval: tuple[float, float] | None, digits: int) -> str:
    return UNKNOWN if interval is None else "–".join(f"{100 * end:.{digits}f}" for end in interval)
