"""The report as one self-contained page: inline styles and drawings, no script, nothing loaded."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from compress.report import charts, gain, int8, numbers, proof, series, summary, tables
from compress.report.parity import mismatches
from compress.report.shape import DeployedRow, Report
from compress.report.verdict import deployed_name, guesses, headline_row
from export.onnx_file.targets import CPU

WIDTH = 440  # of a chart in its own pixels; close to a phone's, so that its text stays readable there
FRAME = charts.Box(56, 8, WIDTH - 6, 236)  # of a cloud's points
CURVES = {"loss": "Loss", "score": "Validation score", "lr": "Learning rate"}
WATERFALLS = {  # stage metric: title, unit, whether the track starts at zero
    "score": ("Score", "", False),
    "params_m": ("Parameters", "M", True),
    "macs_m": ("Multiply-accumulates", "M", True),
    "size_mb": ("Size", "MB", True),
}


class Waterfall(NamedTuple):
    """One metric over the stages that measured it."""

    title: str
    rows: list[tuple[str, charts.Step, str, str]]  # stage, step, value, change
    from_zero: bool


class Cloud(NamedTuple):
    """Accuracy against latency of the files timed under one provider's headline conditions."""

    conditions: str
    x: charts.Axis
    y: charts.Axis
    points: list[charts.Point]
    x_title: str = "median latency, ms (log scale)"


class Spread(NamedTuple):
    """One file's latencies: its blocks' medians and its percentiles, in pixels, and the percentiles in words."""

    name: str
    title: str
    blocks: list[float]
    p50: float
    p90: float | None
    p99: float | None
    text: str


class Distribution(NamedTuple):
    """Latencies of the files timed under one provider's headline conditions."""

    conditions: str
    x: charts.Axis
    rows: list[Spread]


class Curve(NamedTuple):
    """One measurement of one training."""

    title: str
    lines: list[str]
    x: charts.Axis
    y: charts.Axis
    last: tuple[float, float]
    text: str
    unit: str


def render(report: Report, root: Path) -> str:
    """Return the page; curves, widths and blocks are read from the run's folder `root`.

    Every text of the report is escaped: class names and paths come from strangers.
    """
    digits = summary.decimals(report)
    parities = proof.parities(report)
    headline_rows = _headline_rows(report)
    # A file for another target is timed here too, but this machine's picture of it would mislead.
    drawn = [own for rows in headline_rows if (own := [row for row in rows if row["name"] in summary.TITLES])]
    return template("page.html.j2").render(
        report=report,
        metric=numbers.heading(report["metric"]["title"]),
        digits=digits,
        cards=summary.headline(report),
        judged=deployed_name(report),
        targets=summary.target_rows(report),
        gains=gain.sentences(report, digits),
        int8=int8.sections(report, digits),
        parities=parities,
        warnings=list(
            dict.fromkeys(
                (
                    *mismatches(report),
                    *guesses(report).values(),
                    *report["warnings"],
                    *(f"{file.name}: {file.alarm}" for file in parities if file.alarm),
                )
            )
        ),
        class_tables=[*tables.accuracy(report), *tables.recalls(report), *tables.confusion(report)],
        graphs=proof.graphs(report),
        waterfalls=_waterfalls(report),
        clouds=[cloud for rows in drawn if (cloud := _cloud(rows))],
        distributions=[_distribution(report, root, rows) for rows in drawn],
        layers=series.layers(root, report),
        trainings=[
            (training.title, training.epochs[-1], _curves(training)) for training in series.trainings(root, report)
        ],
        files=[(summary.conditions(rows[0]), rows) for rows in headline_rows],
        timings=[
            (title, list(rows)) for title, rows in groupby(summary.ordered(report["deployed"]), summary.conditions)
        ],
        environment_rows=list(_flat(report["environment"])),
        recipe_yaml=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
    )


def template(name: str) -> Template:
    """Return a page's template: it escapes every text, and a name it does not know is an error."""
    environment = Environment(
        loader=PackageLoader("compress.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"numbers": numbers, "summary": summary}
    return environment.get_template(name)


def _headline_rows(report: Report) -> list[list[DeployedRow]]:
    """Return for each provider the files' rows under its headline conditions, the CPU first."""
    providers = sorted(
        {row["provider"] for row in report["deployed"]}, key=lambda provider: (provider != CPU, provider)
    )
    names = sorted({row["name"] for row in report["deployed"]}, key=summary.order)
    rows = [[headline_row(report, name, provider) for name in names] for provider in providers]
    timed = [[row for row in group if row and row["p50_ms"]] for group in rows]
    return [group for group in timed if group]


def _waterfalls(report: Report) -> list[Waterfall]:
    found = []
    digits = summary.decimals(report)
    for metric, (title, unit, from_zero) in WATERFALLS.items():
        pairs = [(stage["stage"], stage["metrics"].get(metric)) for stage in report["stages"]]
        measured = [(stage, value) for stage, value in pairs if value is not None]
        if len(measured) < 2:
            continue
        steps = charts.waterfall([value for _, value in measured], from_zero=from_zero)
        rows = []
        for (stage, value), step in zip(measured, steps, strict=True):
            if metric == "score":
                shown = numbers.percent(value, digits)
                change = "" if not step.change else numbers.points(step.change)
            else:
                shown = numbers.significant(value, unit)
                change = "" if step.change is None else numbers.change(value - step.change, value)
            rows.append((stage, step, shown, change))
        found.append(Waterfall(title, rows, from_zero))
    return found


def _cloud(rows: Sequence[DeployedRow]) -> Cloud | None:
    measured = [(row["name"], row["p50_ms"], row["score"]) for row in rows]
    known = [(name, p50_ms, score) for name, p50_ms, score in measured if p50_ms is not None and score is not None]
    if not known:
        return None
    x = charts.log_axis([p50_ms for _, p50_ms, _ in known], FRAME.left, FRAME.right)
    y = charts.linear_axis([100 * score for _, _, score in known], FRAME.bottom - 14, FRAME.top + 14)
    places = [(name, summary.title(name), x.at(p50_ms), y.at(100 * score)) for name, p50_ms, score in known]
    return Cloud(summary.conditions(rows[0]), x, y, charts.place_labels(places, FRAME))


def _distribution(report: Report, root: Path, rows: Sequence[DeployedRow]) -> Distribution:
    blocks = [series.block_medians(root, report, row) for row in rows]
    percentiles = [row[key] for row in rows for key in ("p50_ms", "p90_ms", "p99_ms")]
    x = charts.log_axis([ms for ms in (*percentiles, *(ms for block in blocks for ms in block)) if ms], 8, WIDTH - 8)
    spreads = []
    for row, medians in zip(rows, blocks, strict=True):
        p50, p90, p99 = row["p50_ms"], row["p90_ms"], row["p99_ms"]
        text = " · ".join(numbers.significant(ms) for ms in (p50, p90, p99)) + " ms"
        spreads.append(
            Spread(
                row["name"],
                summary.title(row["name"]),
                [x.at(ms) for ms in medians],
                x.at(p50 or 0),
                x.at(p90) if p90 else None,
                x.at(p99) if p99 else None,
                text,
            )
        )
    return Distribution(summary.conditions(rows[0]), x, spreads)


def _curves(training: series.Training) -> list[Curve]:
    found = []
    for name, title in CURVES.items():
        scale, unit = (100, " %") if name == "score" else (1, "")
        values = [None if value is None else scale * value for value in training.values.get(name, [])]
        known = [(epoch, value) for epoch, value in zip(training.epochs, values, strict=False) if value is not None]
        if not known:
            continue
        x = charts.Axis(training.epochs[0], max(training.epochs[-1], training.epochs[0] + 1), 4, 276, ())
        y = charts.linear_axis([value for _, value in known], 94, 20)
        first, last = known[0][1], known[-1][1]
        text = " → ".join(numbers.significant(value) for value in dict.fromkeys((first, last))) + unit
        lines = charts.polylines(training.epochs, values, x, y)
        found.append(Curve(title, lines, x, y, (x.at(known[-1][0]), y.at(last)), text, unit))
    return found


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield nested JSON as dotted names and texts."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        yield prefix, " ".join(map(str, values)) or numbers.UNKNOWN
    else:
        yield prefix, numbers.UNKNOWN if values is None or values == {} else str(values)
