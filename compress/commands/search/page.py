"""The page of a search: the front with every trial, the gain over time, and which axes matter. No script, nothing loaded."""

import json
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compress.commands.search.board import Board, Row, best, progress
from compress.commands.search.hopeless import LEAST
from compress.commands.search.measures import MEASURES, measure
from compress.commands.search.space import Axis, Search, axes
from compress.commands.search.trial import Setup
from compress.report import numbers
from compress.report.page import charts
from compress.report.page.drawings import FRAME, template
from export.names import PAGE, REPORT_JSON

WIDE = 900  # of the parallel coordinates, in the page's pixels
TOP, BOTTOM = 30.0, 240.0  # of their axes
ACROSS, UP = (FRAME.left + 8, FRAME.right - 8), (FRAME.bottom - 14, FRAME.top + 14)  # of a scatter plot's points


Points = list[tuple[float, float]]


class Dot(NamedTuple):
    """One trial on the page: text, link to its run's page, and kind: front, inside or outside of the constraints, or its state."""

    row: Row
    text: str
    link: str
    kind: str


class Scatter(NamedTuple):
    """A scatter plot: the points that lead to each trial's dot, and a line through some dots; the template places them."""

    title: str
    x: charts.ChartAxis
    y: charts.ChartAxis
    x_title: str
    y_title: str
    ways: Sequence[tuple[Points, Dot]]
    line: Points


def pick_name(search: Search, number: str) -> str:
    """Return the run name of a picked trial."""
    return f"{search.name[:48]}-pick-{number}"


def write_page(setup: Setup, boards: Sequence[Board]) -> Path:
    """Write the page, in one step, and return its path."""
    page = setup.folder / "index.html"
    picks = {
        path.parent.name[-3:]: measure(json.loads(path.read_text()), boards[-1].clocks)
        for path in sorted(setup.folder.glob(f"{pick_name(setup.search, '*')}/{REPORT_JSON}"))
    }
    text = template("search.html.j2").render(
        search=setup.search,
        measures=MEASURES,
        shown=[_shown(setup, board) for board in reversed(boards) if board.rows()],
        picks=picks,
        recommended=next(iter(best(boards[-1].rows(), setup.search)), None),
        early=LEAST if setup.may_end_early else None,
    )
    aside = page.with_name(f".page-{os.getpid()}")  # other workers write the page too
    aside.write_text(text, encoding="utf-8")
    return aside.rename(page)


def _shown(setup: Setup, board: Board) -> dict[str, object]:
    """Return one board's content for the page."""
    rows = board.rows()
    place = {row.number: n for n, row in enumerate(best(rows, setup.search))}  # the best in the first objective first
    dots = [_dot(setup, board, row, is_best=row.number in place) for row in rows]
    done = [dot for dot in dots if dot.row.state == "done"]
    columns = _columns([dot.row for dot in done], setup.search) if done else []
    ways = [(" ".join(f"{at},{ys[n]}" for at, _, _, ys in columns), dot) for n, dot in enumerate(done)]
    return {
        "name": board.name,
        "scatters": [_front(done, setup.search), _covered(done, setup.search), *_courses(dots)] if done else [],
        "importance": board.importance(),
        "columns": columns,
        "ways": sorted(ways, key=lambda way: way[1].kind == "front"),  # drawn last, above the others
        "trials": sorted(dots, key=lambda dot: (place.get(dot.row.number, len(place)), dot.row.number)),
    }


def _dot(setup: Setup, board: Board, row: Row, *, is_best: bool) -> Dot:
    page = setup.place(board.name, row.number, setup.search.seeds[0]) / PAGE
    link = urllib.parse.quote(os.path.relpath(page, setup.folder)) if page.exists() else ""
    names = [name for name in MEASURES if row.mean(name) is not None]
    measured = ", ".join(f"{name} {text}" for name, text in zip(names, row.shown(names), strict=True))
    kind = "front" if is_best else "inside" if row.is_allowed else "outside"
    return Dot(row, f"{row.number:03d}: {row.where}\n{measured}", link, kind if row.state == "done" else row.state)


def _front(done: Sequence[Dot], search: Search) -> Scatter:
    """Return the trials by the first objective against the second, or against trial numbers if there is only one."""
    first, second = (*search.objectives, None)[:2]
    xs = [_number(dot.row, second) if second else float(dot.row.number) for dot in done]
    ys = [_number(dot.row, str(first)) for dot in done]
    line = sorted((x, y) for x, y, dot in zip(xs, ys, done, strict=True) if dot.kind == "front" and second)
    titles = _title(second) if second else "Trial", _title(str(first))
    ways = [([(x, y)], dot) for x, y, dot in zip(xs, ys, done, strict=True)]
    return Scatter("Every trial; the line is the front", _axis(xs, *ACROSS), _axis(ys, *UP), *titles, ways, line)


def _covered(done: Sequence[Dot], search: Search) -> Scatter:
    """Return the hypervolume after each trial."""
    line = [(float(n), 100 * share) for n, share in enumerate(progress([dot.row for dot in done], search), start=1)]
    x = charts.linear_axis([1, len(line) + 1], *ACROSS)
    y = charts.linear_axis([0, *(share for _, share in line)], *UP)
    ways = [([point], dot) for point, dot in zip(line, done, strict=True)]
    return Scatter("What the trials gained", x, y, "Trials", "Hypervolume, % of the box around all trials", ways, line)


def _courses(dots: Sequence[Dot]) -> list[Scatter]:
    """Return the distillation scores of all trials, if any distilled."""
    courses = [(dot.row.course.scores, dot) for dot in dots if dot.row.course]
    if not courses:
        return []
    ways = [([(float(n), 100 * score) for n, score in enumerate(scores, 1)], dot) for scores, dot in courses]
    points = [point for way, _ in ways for point in way]
    x = charts.linear_axis([1, 2, *(n for n, _ in points)], *ACROSS)
    y = charts.linear_axis([score for _, score in points], *UP)
    return [Scatter("Scores while distilling", x, y, "Epoch", _title("score"), ways, [])]


def _columns(done: Sequence[Row], search: Search) -> list[tuple[float, str, list[tuple[float, str]], list[float]]]:
    """Return the vertical axes of the parallel coordinates, one for each axis of the space and each objective.

    Each has its place, its title, its labels with their places, and the place of each trial's value.
    """
    columns = [_upright(axis, [row.point[axis.name] for row in done]) for axis in axes(search)]
    columns += [_upright(Axis(_title(name), {}), [_number(row, name) for row in done]) for name in search.objectives]
    step = (WIDE - 160) / max(len(columns) - 1, 1)
    return [(round(80 + index * step, 1), *column) for index, column in enumerate(columns)]


def _upright(axis: Axis, values: Sequence[str | float]) -> tuple[str, list[tuple[float, str]], list[float]]:
    """Return a vertical axis's title, its labels with their places, and the place of each value."""
    if axis.choices:
        labels = list(axis.choices)
        drawn = charts.ChartAxis(0, max(len(labels) - 1, 1), BOTTOM, TOP, tuple(range(len(labels))))
        known = [float(labels.index(str(value))) for value in values]
    else:
        known = [float(value) for value in values]
        drawn = _axis([*known, *(axis.span.values() if axis.span else ())], BOTTOM, TOP)
        labels = [numbers.tick(tick) for tick in drawn.ticks]
    places = [drawn.at(tick) for tick in drawn.ticks]
    return axis.name, list(zip(places, labels, strict=True)), [drawn.at(value) for value in known]


def _axis(values: Sequence[float], start: float, end: float) -> charts.ChartAxis:
    """Return an axis, logarithmic if the values span more than a factor of three."""
    is_wide = min(values) > 0 and max(values) / min(values) > 3
    return (charts.log_axis if is_wide else charts.linear_axis)(values, start, end)


def _number(row: Row, name: str) -> float:
    return (row.mean(name) or 0.0) * (100 if MEASURES[name].unit == "%" else 1)


def _title(name: str) -> str:
    return f"{MEASURES[name].title}, {MEASURES[name].unit}"
