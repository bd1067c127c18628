"""The report as one self-contained page: inline styles and drawings, no scripts, nothing loaded."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from compress.report import numbers
from compress.report.judge.parity import mismatches
from compress.report.judge.verdict import deployed_name, guesses
from compress.report.page import charts, series, summary
from compress.report.page.pictures import examples
from compress.report.page.table import Section, Strong, Table, bar, count
from compress.report.page.tables import sections
from compress.report.shape import DeployedRow, Report

WIDTH = 440  # of a chart in its own pixels; near a phone's, so that text stays readable there
FRAME = charts.Box(56, 8, WIDTH - 6, 236)  # of a scatter plot's points
CURVES = {"loss": "loss", "score": "{}", "lr": "learning rate"}
WATERFALLS = {"score": ("", ""), "params_m": ("Parameters", "M"), "macs_m": ("MACs", "M"), "size_mb": ("Size", "MB")}
LATENCY = "median latency, ms (log scale)"


class Page(NamedTuple):
    """Content of a page; a cell or heading that is a key of `colours` gets a dot, one of `links` a link.

    Texts are untrusted: the template escapes all but the drawings.
    """

    kind: str
    title: str
    lead: str
    cards: Sequence[Sequence[str]]  # title, value, the value compared with, note
    warnings: Sequence[str]
    sections: Sequence[tuple[Section, Sequence[Markup]]]
    colours: Mapping[str, str]
    links: Mapping[str, str] = MappingProxyType({})
    verdict: tuple[str, str] = ("", "")
    serve: str = ""
    targets: Sequence[Sequence[str]] = ()
    command: str = ""
    recipe_yaml: str = ""


def render(report: Report, root: Path) -> str:
    """Return the report's HTML; curves and widths are read from the run's folder `root`."""
    recipe, judged = report["recipe"], deployed_name(report)
    # Leave out files for other targets: their times on this machine would mislead.
    drawn = [[row for row in rows if row["name"] in summary.TITLES] for rows in summary.headline_rows(report)]
    drawings = {
        "Stage by stage": list(_waterfalls(report)),
        "Deployed files": [drawing for rows in drawn if rows for drawing in (_cloud(rows), _distribution(rows))],
    }
    wrong = [*summary.saturations(report), *mismatches(report), *report["limits"], *guesses(report).values()]
    environment = Table("", ("", ""), list(_flat(report["environment"])), text=(0, 1))
    return render_page(
        Page(
            kind="compression report",
            title=summary.run_title(report),
            lead=f"{summary.network(report)} on {recipe['data']['dataset']}, from the teacher in FP32 to "
            + (f"{judged}, the file that the targets judge" if judged else "the last stage"),
            cards=summary.headline(report).rows,
            warnings=list(dict.fromkeys([*wrong, *report["warnings"]])),
            sections=[
                *((section, drawings.get(section.title, ())) for section in sections(report)),
                (Section("Examples", ()), [draw("example", pictures) for pictures in examples(root, report)]),
                (Section("Channel widths", _widths(root, report)), ()),
                (Section("Where the time goes", _layer_times(root, report)), ()),
                (Section("Training", ()), list(_curves(root, report))),
                (Section("Environment", (environment,)), ()),
            ],
            colours={row["name"]: summary.colour(row["name"]) for row in report["deployed"]},
            verdict=(report["verdict"], summary.verdict_text(report)),
            serve=report["recommendation"]["sentence"] if report["recommendation"] else "",
            targets=summary.targets(report).rows,
            command=report["command"],
            recipe_yaml=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        )
    )


def render_page(page: Page) -> str:
    """Return a page's HTML, without empty sections."""
    shown = [(section, drawn) for section, drawn in page.sections if section.tables or drawn]
    return template("page.html.j2").render(page=page._replace(sections=shown))


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


def _cloud(rows: Sequence[DeployedRow]) -> Markup:
    points = [(row["name"], summary.title(row["name"]), row["p50_ms"], row["score"]) for row in rows]
    return cloud(summary.conditions(rows[0]), LATENCY, points)


def _distribution(rows: Sequence[DeployedRow]) -> Markup:
    """Return a drawing of the files' latencies: percentiles, and the medians of blocks."""
    percentiles = [(row["p50_ms"], row["p90_ms"], row["p99_ms"]) for row in rows]
    blocks = [row.get("block_ms", []) for row in rows]
    x = charts.log_axis([ms for found in (*percentiles, *blocks) for ms in found], 8, WIDTH - 8)
    drawn = [
        (
            summary.title(row["name"]),
            row["name"],
            " · ".join(map(numbers.significant, found)) + " ms",
            *map(x.at, found),
            [x.at(ms) for ms in medians],
        )
        for row, found, medians in zip(rows, percentiles, blocks, strict=True)
    ]
    return draw("distribution", summary.conditions(rows[0]), x, drawn)


def _waterfalls(report: Report) -> Iterator[Markup]:
    """Yield a drawing of each metric over the stages that measured it."""
    digits = summary.decimals(report)
    for metric, (title, unit) in WATERFALLS.items():
        pairs = [(stage["stage"], stage["metrics"].get(metric)) for stage in report["stages"]]
        measured = [(stage, value) for stage, value in pairs if value is not None]
        if len(measured) < 2:
            continue
        is_score = metric == "score"
        steps = charts.waterfall([value for _, value in measured], from_zero=not is_score)
        rows = []
        for (stage, value), step in zip(measured, steps, strict=True):
            if is_score:
                shown, change = numbers.percent(value, digits), numbers.points(step.change) if step.change else ""
            else:
                shown = numbers.significant(value, unit)
                change = "" if step.change is None else numbers.change(value - step.change, value)
            rows.append((stage, step, shown, change))
        yield draw("waterfall", title or numbers.heading(report["metric"]["title"]), rows, not is_score)


def _widths(root: Path, report: Report) -> list[Table]:
    """Return each layer's output channels in the teacher and in the student."""
    rows = [(name, count(was), count(now), bar(now / was)) for name, (was, now) in series.widths(root, report).items()]
    note = "Output channels of each layer in the teacher and in the student; the bar is the fraction kept."
    return [Table("", ("Layer", "Teacher", "Student", ""), rows, text=(0, 3), note=note)] if rows else []


def _layer_times(root: Path, report: Report) -> list[Table]:
    """Return each layer's time before and after pruning."""
    layers = series.layer_times(root, report)
    most = max((max(layer["before_ms"], layer["after_ms"]) for layer in layers), default=0.0)
    rows = []
    for layer in layers:
        cells = [(numbers.significant(ms), bar(ms / most)) for ms in (layer["before_ms"], layer["after_ms"])]
        rows.append((layer["name"] or "all else", *cells[0], *cells[1]))
    note = "Milliseconds of each layer in ONNX Runtime, with its activation and additions, before and after pruning."
    return [Table("", ("Layer", "Before", "", "After", ""), rows, text=(0, 2, 4), note=note)] if rows else []


def _curves(root: Path, report: Report) -> Iterator[Markup]:
    """Yield a drawing of each training's loss, score and learning rate."""
    for title, epochs in series.trainings(root, report):
        xs = [entry["epoch"] for entry in epochs]
        for name, words in CURVES.items():
            scale, unit = (100, " %") if name == "score" else (1, "")
            values = [None if entry.get(name) is None else scale * entry[name] for entry in epochs]
            known = [(epoch, value) for epoch, value in zip(xs, values, strict=True) if value is not None]
            if not known:
                continue
            x = charts.Axis(xs[0], max(xs[-1], xs[0] + 1), 4, 276, ())
            y = charts.linear_axis([value for _, value in known], 94, 20)
            text = " → ".join(map(numbers.significant, dict.fromkeys((known[0][1], known[-1][1])))) + unit
            last, lines = (x.at(known[-1][0]), y.at(known[-1][1])), charts.polylines(xs, values, x, y)
            yield draw(
                "curve", f"{title}: {words.format(report['metric']['title'])}", text, unit, xs[-1], lines, y, last
            )


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested JSON as (dotted name, text)."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        yield prefix, " ".join(map(str, values)) or numbers.UNKNOWN
    else:
        yield prefix, numbers.UNKNOWN if values is None or values == {} else str(values)
