"""The comparison as one self-contained page in the report's style: no script, nothing loaded."""

import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from compress.report import charts
from compress.report.comparison.candidate import Subject
from compress.report.comparison.compare import Comparison, compare
from compress.report.comparison.table import lines, no_differences
from compress.report.html import FRAME, Cloud, template

COLOURS = 8  # of the style's --series-1 and so on; then they start again
LABEL_LENGTH = 26
MOST_COLUMNS = 4  # more candidates are rows, and numbers in the drawing


def write_comparison(subjects: Mapping[str, Subject], page: Path, *, title: str | None = None) -> Comparison:
    """Compare the subjects, write the page, and return the comparison; links are relative to the page's folder."""
    comparison = compare(subjects)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_comparison(comparison, title=title), encoding="utf-8")
    return comparison


def render_comparison(comparison: Comparison, *, title: str | None = None) -> str:
    """Return the page; every text is escaped."""
    names, measured = [one.name for one in comparison.candidates], lines(comparison)
    return template("compare.html.j2").render(
        title=title or " · ".join(names),
        comparison=comparison,
        names=names,
        colours={name: f"series-{index % COLOURS + 1}" for index, name in enumerate(names)},
        links={one.name: one.link for one in comparison.candidates},
        lines=measured,
        shared=[line for line in measured if line.is_shared],
        as_columns=len(names) <= MOST_COLUMNS,
        no_differences=no_differences(comparison),
        cloud=_cloud(comparison),
    )


def link_to(target: Path, page: Path) -> str:
    """Return the relative link from a page to a file."""
    return urllib.parse.quote(Path(os.path.relpath(target, page.parent)).as_posix())


def _cloud(comparison: Comparison) -> Cloud | None:
    """Return accuracy against speed of all candidates and their teachers; none where no speed may be ranked."""
    by_ratio = comparison.speed_by == "speedup"
    known: list[tuple[str, str, float, float]] = []
    for teacher in comparison.teachers:
        x = 1.0 if by_ratio else teacher.p50_ms
        whose = "Teacher" if len(comparison.teachers) == 1 else f"Teacher of {', '.join(teacher.of)}"
        if x and teacher.score is not None:
            known.append(("teacher_fp32", whose, x, 100 * teacher.score))
    for index, one in enumerate(comparison.candidates):
        x = one.speedup["ratio"] if by_ratio and one.speedup else None if by_ratio else one.p50_ms
        if x and x > 0 and one.score is not None:
            label = one.name if len(comparison.candidates) <= MOST_COLUMNS else str(index + 1)
            known.append((f"series-{index % COLOURS + 1}", label, x, 100 * one.score))
    if comparison.speed_by is None or not any(name.startswith("series") for name, *_ in known):
        return None
    x_axis = charts.log_axis([x for _, _, x, _ in known], FRAME.left, FRAME.right)
    y_axis = charts.linear_axis([y for *_, y in known], FRAME.bottom - 14, FRAME.top + 14)
    places = [(name, _short(label), x_axis.at(x), y_axis.at(y)) for name, label, x, y in known]
    words = "speed-up over the teacher (log scale)" if by_ratio else "median latency, ms (log scale)"
    return Cloud(comparison.conditions or "", x_axis, y_axis, charts.place_labels(places, FRAME), words)


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"
