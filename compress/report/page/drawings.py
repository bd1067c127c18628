"""Draw the pages' charts: positions come from charts.py, the shapes are macros in templates/charts.html.j2."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from compress.report import numbers
from compress.report.page import charts, summary
from compress.report.page.table import Strong
from compress.report.shape import DeployedRow, Json, Report
from export.names import LOG_JSONL

WIDTH = 440  # of a chart in its own pixels; near a phone's, so that text stays readable there
FRAME = charts.Box(56, 8, WIDTH - 6, 236)  # of a scatter plot's points
CURVES = {"loss": "loss", "held_out_loss": "loss on held-out images", "score": "{}", "lr": "learning rate"}
WATERFALLS = {"score": ("", ""), "params_m": ("Parameters", "M"), "macs_m": ("MACs", "M"), "size_mb": ("Size", "MB")}
LATENCY = "median latency, ms (log scale)"


@cache
def template(name: str) -> Template:
    """Return a template that escapes every text; an unknown variable is an error."""
    environment = Environment(
        loader=PackageLoader("compress.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"numbers": numbers}
    environment.tests["strong"] = lambda cell: isinstance(cell, Strong)
    return environment.get_template(name)


def draw(chart: str, *values: object) -> Markup:
    """Return a drawing by a macro in charts.html.j2."""
    drawing: Markup = getattr(template("charts.html.j2").module, chart)(*values)
    return drawing


def cloud(conditions: str, x_title: str, points: Sequence[tuple[str, str, float, float]]) -> Markup:
    """Return a scatter plot of accuracy against time or speed; points are (colour, label, x, score)."""
    x = charts.log_axis([x for _, _, x, _ in points], FRAME.left, FRAME.right)
    y = charts.linear_axis([100 * score for *_, score in points], FRAME.bottom - 14, FRAME.top + 14)
    places = [(name, label, x.at(value), y.at(100 * score)) for name, label, value, score in points]
    return draw("cloud", conditions, x_title, x, y, charts.place_labels(places, FRAME))


def files(rows: Sequence[DeployedRow]) -> list[Markup]:
    """Return a scatter plot of the files, and their latencies' percentiles and medians of blocks."""
    conditions, found, every = summary.conditions(rows[0]), [], list[float]()
    for row in rows:
        found.append(([row["p50_ms"], row["p90_ms"], row["p99_ms"]], row.get("block_ms", [])))
        every += [*found[-1][0], *found[-1][1]]
    x = charts.log_axis(every, 8, WIDTH - 8)
    drawn = [
        (
            summary.title(row["name"]),
            row["name"],
            " · ".join(map(numbers.significant, percentiles)) + " ms",
            *map(x.at, percentiles),
            list(map(x.at, blocks)),
        )
        for row, (percentiles, blocks) in zip(rows, found, strict=True)
    ]
    points = [(row["name"], summary.title(row["name"]), row["p50_ms"], row["score"]) for row in rows]
    return [cloud(conditions, LATENCY, points), draw("distribution", conditions, x, drawn)]


def waterfalls(report: Report) -> Iterator[Markup]:
    """Yield a drawing of each metric over the stages that measured it: of scores from near the least, else from zero."""
    for metric, (title, unit) in WATERFALLS.items():
        pairs = [(stage["stage"], stage["metrics"].get(metric)) for stage in report["stages"]]
        measured = [(stage, value) for stage, value in pairs if value is not None]
        if len(measured) < 2:
            continue
        is_score, values = metric == "score", [value for _, value in measured]
        track = charts.track(values, from_zero=not is_score)
        rows = []
        for (stage, value), before in zip(measured, [values[0], *values[:-1]], strict=True):
            shown, change = numbers.significant(value, unit), numbers.change(before, value)
            if is_score:
                shown = numbers.percent(value, summary.decimals(report))
                change = numbers.points(value - before) if value != before else ""
            rows.append((stage, track.at(value), track.at(before), shown, change))
        yield draw("waterfall", title or summary.metric_title(report), rows, not is_score)


def curves(root: Path, report: Report) -> Iterator[Markup]:
    """Yield a drawing of each training's loss, score and learning rate; a stage that trains in phases has one of each per phase."""
    for stage in report["stages"]:
        log = root / stage["directory"] / LOG_JSONL
        phases: dict[str, list[Json]] = {}
        for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else ()):
            if "epoch" in entry:
                phases.setdefault(entry.get("phase", ""), []).append(entry)
        for phase, epochs in phases.items():
            title = " · ".join(filter(None, (stage["stage"], phase)))
            for name, words in CURVES.items():
                yield from _curve(f"{title}: {words.format(report['metric']['title'])}", name, epochs)


def _curve(title: str, name: str, entries: Sequence[Json]) -> Iterator[Markup]:
    """Yield the curve of one measurement, if an epoch has it."""
    scale, unit = (100, " %") if name == "score" else (1, "")
    epochs = [entry["epoch"] for entry in entries]
    values = [None if entry.get(name) is None else scale * entry[name] for entry in entries]
    known = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    if known:
        x = charts.ChartAxis(epochs[0], max(epochs[-1], epochs[0] + 1), 4, 276, ())
        y = charts.linear_axis([value for _, value in known], 94, 20)
        text = " → ".join(map(numbers.significant, dict.fromkeys((known[0][1], known[-1][1])))) + unit
        last, lines = (x.at(known[-1][0]), y.at(known[-1][1])), charts.polylines(epochs, values, x, y)
        yield draw("curve", title, text, unit, epochs[-1], lines, y, last)
