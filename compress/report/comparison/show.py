"""Show a comparison as tables in the terminal, on a page and as JSON: up to four runs are columns, more are rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from compress.report.comparison.candidate import Candidate
from compress.report.comparison.compare import RunComparison, compare
from compress.report.comparison.read import read_runs
from compress.report.comparison.recipes import by_value
from compress.report.numbers import UNKNOWN, duration, interval, percent, significant, times
from compress.report.page.drawings import LATENCY, cloud
from compress.report.page.html import Page, render_page
from compress.report.page.screen import print_screen, say, screen, show
from compress.report.page.table import PageSection, ReportTable, Strong, count
from export.command.files import write_json, write_text
from export.onnx_file.roles import TEACHER

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


def lines(comparison: RunComparison) -> list[Line]:
    """Return every line that has a value for at least one candidate."""
    metric, score = comparison.metric, partial(percent, decimals=comparison.decimals)
    texts: tuple[tuple[str, str, Callable[[Candidate], str]], ...] = (
        ("Verdict", "Verdict", lambda one: f"fail ({one.failures})" if one.verdict == "fail" else one.verdict),
        ("Deployed file", "File", lambda one: one.file or UNKNOWN),
        ("Recommended file", "To serve", lambda one: one.recommended or UNKNOWN),
        ("Made for", "Target", lambda one: one.target),
        (metric, metric, lambda one: score(one.score)),
        ("Its 95 % interval", "95 %", lambda one: interval(one.score_ci95, comparison.decimals, 100)),
        (f"{metric} of the teacher", "Teacher", lambda one: score(one.teacher.score)),
        ("Agreement with own FP32", "Agree", lambda one: score(one.agreement)),
        ("Size", "Size", lambda one: significant(one.size_mb, "MB")),
        ("Multiply-accumulates", "MACs", lambda one: significant(one.macs_m, "M")),
        ("Parameters", "Params", lambda one: significant(one.params_m, "M")),
        ("Latency, median", "p50", lambda one: significant(one.p50_ms, "ms")),
        ("Speed-up over teacher", "vs teacher", lambda one: times(one.speedup and one.speedup["ratio"])),
        ("Interval of the speed-up", "95 % of it", lambda one: interval(one.speedup and one.speedup["ci95"])),
        (
            "Speed-up over own FP32",
            "vs FP32",
            lambda one: times(one.speedup_vs_student_fp32 and one.speedup_vs_student_fp32["ratio"]),
        ),
        ("Best trade-off", "Trade-off", lambda one: {None: UNKNOWN, True: "yes", False: "no"}[one.is_efficient]),
        ("Layers in integers", "Int", lambda one: count(one.integer_layers)),
        ("Layers in float", "Float", lambda one: count(one.float_layers)),
        ("Training", "Training", lambda one: duration(one.training_seconds)),
        ("ONNX opset", "Opset", lambda one: count(one.opset)),
    )
    fastest = "p50" if comparison.speed_by == "latency" else "vs teacher"
    bold = {metric: "Most accurate", fastest: "Fastest", "Size": "Smallest"}
    leads = {best.title: best.names for best in comparison.best}
    found = []
    for title, short, text in texts:
        cells = [(text(one), one.name in leads.get(bold.get(short, ""), ())) for one in comparison.candidates]
        found.append(Line(title, short, [Strong(cell) if is_best else cell for cell, is_best in cells]))
    return [line for line in found if set(line.cells) != {UNKNOWN}]


DECIDING = ("Verdict", "To serve", "Size", "MACs", "p50", "vs teacher", "Trade-off")  # and the score


def measured(comparison: RunComparison, *, is_short: bool = False) -> ReportTable:
    """Return the candidates as columns, or as rows with a note of what all have in common."""
    names, found = [one.name for one in comparison.candidates], lines(comparison)
    if is_short:
        found = [line for line in found if line.short in (*DECIDING, comparison.metric)]
    if len(names) <= MOST_COLUMNS:
        return ReportTable("Measured", ("", *names), [(line.title, *line.cells) for line in found])
    own = [line for line in found if len(set(line.cells)) > 1]
    shared = " · ".join(f"{line.title} {line.cells[0]}" for line in found if line not in own)
    rows = [(name, f"{index + 1}", *(line.cells[index] for line in own)) for index, name in enumerate(names)]
    columns = ("", "No", *(line.short for line in own))
    return ReportTable("Measured", columns, rows, note=f"All: {shared}" if shared else "")


def differences(comparison: RunComparison) -> ReportTable:
    """Return the settings that differ, with a column per candidate or, for many candidates, a row per value."""
    names, found = [one.name for one in comparison.candidates], comparison.differences
    if not found:
        return ReportTable("Recipes", ("",), [("The recipes do not differ.",)])
    if len(names) <= MOST_COLUMNS:
        columns = ("Setting", *names)
        return ReportTable("Recipes", columns, [(one.path, *one.values) for one in found], tuple(range(len(columns))))
    rows = [(one.path, value, of) for one in found for value, of in by_value(names, one.values)]
    return ReportTable("Recipes", ("Setting", "Value", "Of"), rows, (0, 1, 2))


def compare_folders(
    folders: Sequence[Path],
    *,
    page: Path | None,
    document: Path | None,
    verbose: bool,
    ends: Sequence[Callable[[Console, int], None]] = (),
) -> None:
    """Compare runs and bundles: write the page, which links to each run's own, and JSON; print it, and call `ends`."""
    comparison = compare(read_runs(folders, page=page))
    if page:
        write_text(page, render_comparison(comparison))
    if document:
        document.parent.mkdir(parents=True, exist_ok=True)
        write_json(document, asdict(comparison))
    print_comparison(comparison, screen(), verbose=verbose, ends=ends)


def print_comparison(
    comparison: RunComparison,
    console: Console,
    *,
    verbose: bool = False,
    ends: Sequence[Callable[[Console, int], None]] = (),
) -> None:
    """Print the leaders, the deciding measurements and the warnings; everything if verbose.

    `ends` are called last, each with the number of notes that it may print.
    """

    def start(console: Console) -> None:
        console.print(Text(f"\n{' · '.join(one.name for one in comparison.candidates)}", "bold"))
        if comparison.conditions:
            say(console, f"times: {comparison.conditions}", "dim")
        show(console, ReportTable("", ("",) * 4, list(_leaders(comparison)), (0, 1, 3)))
        show(console, measured(comparison, is_short=not verbose))
        if verbose:
            show(console, differences(comparison))
        elif comparison.differences:
            say(console, f"\nsettings that differ: {len(comparison.differences)} (-v shows them)", "dim")

    print_screen(console, start, comparison.warnings, ends, verbose=verbose, least=FAILURES)


def _leaders(comparison: RunComparison) -> Iterator[tuple[str, str, str, str]]:
    for best in comparison.best:
        yield best.title, Strong(", ".join(best.names)), best.value, best.note


def render_comparison(comparison: RunComparison) -> str:
    """Return the page; every text is escaped."""
    names = [one.name for one in comparison.candidates]
    conditions = f". Times: {comparison.conditions}" if comparison.conditions else ""
    values = PageSection("Measured", [measured(comparison)._replace(title="")], after=[NOTE])
    recipes = PageSection("What differs in the recipes", [differences(comparison)._replace(title="")])
    return render_page(
        Page(
            kind="comparison",
            title=" · ".join(names),
            lead=f"{len(names)} runs side by side; each is measured by the file that it deploys{conditions}",
            cards=list(_leaders(comparison)),
            warnings=comparison.warnings,
            sections=[(values, list(_cloud(comparison))), (recipes, ())],
            colours={name: f"var(--{_series(index)})" for index, name in enumerate(names)},
            links={one.name: one.link for one in comparison.candidates if one.link},
        )
    )


def _cloud(comparison: RunComparison) -> Iterator[Markup]:
    """Yield a scatter plot of accuracy against speed with the teachers, if speed may be ranked."""
    by_ratio, teachers, runs = comparison.speed_by == "speedup", comparison.teachers, comparison.candidates
    found: list[tuple[str, str, float | None, float | None]] = []
    for teacher in teachers:
        label = "Teacher" if len(teachers) == 1 else f"Teacher of {', '.join(teacher.of)}"
        found.append((TEACHER, label, 1.0 if by_ratio else teacher.p50_ms, teacher.score))
    for index, run in enumerate(runs):
        x = (run.speedup["ratio"] if run.speedup else None) if by_ratio else run.p50_ms
        found.append((_series(index), run.name if len(runs) <= MOST_COLUMNS else str(index + 1), x, run.score))
    points = [(series, _short(label), x, y) for series, label, x, y in found if x and x > 0 and y is not None]
    if comparison.speed_by and any(series != TEACHER for series, *_ in points):
        title = "speed-up over the teacher (log scale)" if by_ratio else LATENCY
        yield cloud(comparison.conditions or "", title, points)


def _series(index: int) -> str:
    return f"series-{index % COLOURS + 1}"


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"
