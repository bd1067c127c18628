"""The page of a search: the front with every trial, the gain over time, and which axes matter. No script, nothing loaded."""

import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from compress.commands.search.board import Board, Row, best, progress
from compress.commands.search.hopeless import LEAST
from compress.commands.search.measures import MEASURES, measure
from compress.commands.search.show import folder, means, where
from compress.commands.search.space import Axis, Search, axes
from compress.commands.search.trial import Setup
from compress.report import numbers
from compress.report.page import charts
from compress.report.page.html import FRAME, template
from export.names import PAGE, REPORT_JSON

WIDE, TALL = 900, 260  # of the parallel coordinates, in the page's pixels
TOP, BOTTOM = 30.0, 240.0  # of their axes


class Trial(NamedTuple):
    """One trial on the page: text, link to its run's page, and kind: front, inside or outside of the constraints, or its state."""

    row: Row
    text: str
    link: str
    kind: str


class Scatter(NamedTuple):
    """A scatter plot: a dot for each trial, a line through some of them, and optionally a curve that leads to each dot."""

    title: str
    x: charts.Axis
    y: charts.Axis
    x_title: str
    y_title: str
    dots: list[tuple[float, float, Trial]]
    line: str
    ways: Sequence[tuple[str, Trial]] = ()


class Scale(NamedTuple):
    """One vertical axis of the parallel coordinates, with its labels and their places."""

    title: str
    at: float
    texts: list[tuple[float, str]]


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
        where=where,
        means=means,
    )
    aside = page.with_name(f".page-{os.getpid()}")  # other workers write the page too
    aside.write_text(text, encoding="utf-8")
    return aside.rename(page)


def _shown(setup: Setup, board: Board) -> dict[str, object]:
    """Return one board's content for the page."""
    rows = board.rows()
    place = {row.number: n for n, row in enumerate(best(rows, setup.search))}  # the best in the first objective first
    trials = [_trial(setup, board, row, is_best=row.number in place) for row in rows]
    done = [trial for trial in trials if trial.row.state == "done"]
    scales, ways = _parallel(done, setup) if done else ([], [])
    return {
        "name": board.name,
        "scatters": [_front(done, setup), _covered(done, setup), *_courses(trials)] if done else [],
        "importance": board.importance(),
        "scales": scales,
        "ways": sorted(ways, key=lambda way: way[1].kind == "front"),  # drawn last, above the others
        "trials": sorted(trials, key=lambda trial: (place.get(trial.row.number, len(place)), trial.row.number)),
    }


def _trial(setup: Setup, board: Board, row: Row, *, is_best: bool) -> Trial:
    page = folder(setup, board, row, setup.search.seeds[0]) / PAGE
    link = urllib.parse.quote(os.path.relpath(page, setup.folder)) if page.exists() else ""
    names = [name for name in MEASURES if row.mean(name) is not None]
    measured = ", ".join(f"{name} {text}" for name, text in zip(names, means(row, names), strict=True))
    kind = "front" if is_best else "inside" if row.is_allowed else "outside"
    return Trial(row, f"{row.number:03d}: {where(row)}\n{measured}", link, kind if row.state == "done" else row.state)


def _front(done: Sequence[Trial], setup: Setup) -> Scatter:
    """Return the trials by the first objective against the second, or against trial numbers if there is only one."""
    first, second = (*setup.search.objectives, None)[:2]
    xs = [_number(trial.row, second) if second else float(trial.row.number) for trial in done]
    ys = [_number(trial.row, str(first)) for trial in done]
    x, y = _axis(xs, FRAME.left + 8, FRAME.right - 8), _axis(ys, FRAME.bottom - 14, FRAME.top + 14)
    dots = [(x.at(a), y.at(b), trial) for a, b, trial in zip(xs, ys, done, strict=True)]
    line = [f"{a},{b}" for a, b, trial in sorted(dots, key=lambda dot: dot[:2]) if trial.kind == "front" and second]
    titles = _title(second) if second else "Trial", _title(str(first))
    return Scatter("Every trial; the line is the front", x, y, *titles, dots, " ".join(line))


def _covered(done: Sequence[Trial], setup: Setup) -> Scatter:
    """Return the hypervolume after each trial."""
    ys = [100 * value for value in progress([trial.row for trial in done], setup.search)]
    x = charts.linear_axis([1, len(ys) + 1], FRAME.left + 8, FRAME.right - 8)
    y = charts.linear_axis([0, *ys], FRAME.bottom - 14, FRAME.top + 14)
    dots = [(x.at(n), y.at(value), trial) for n, (value, trial) in enumerate(zip(ys, done, strict=True), start=1)]
    words = "Hypervolume, % of the box around all trials"
    return Scatter("What the trials gained", x, y, "Trials", words, dots, " ".join(f"{a},{b}" for a, b, _ in dots))


def _courses(trials: Sequence[Trial]) -> list[Scatter]:
    """Return the distillation scores of all trials, if any distilled."""
    ways = [(trial, trial.row.course.scores) for trial in trials if trial.row.course]
    if not ways:
        return []
    x = charts.linear_axis([1, max(2, *(len(scores) for _, scores in ways))], FRAME.left + 8, FRAME.right - 8)
    y = charts.linear_axis([100 * score for _, scores in ways for score in scores], FRAME.bottom - 14, FRAME.top + 14)
    places = [(trial, [(x.at(n), y.at(100 * score)) for n, score in enumerate(scores, 1)]) for trial, scores in ways]
    lines = [(" ".join(f"{a},{b}" for a, b in way), trial) for trial, way in places]
    dots = [(*way[-1], trial) for trial, way in places]
    return [Scatter("Scores while distilling", x, y, "Epoch", _title("score"), dots, "", lines)]


def _parallel(done: Sequence[Trial], setup: Setup) -> tuple[list[Scale], list[tuple[str, Trial]]]:
    """Return parallel coordinates: a vertical axis for each axis of the space and each objective, a line for each trial."""
    own = axes(setup.search)
    columns = [_upright(axis, [trial.row.point[axis.name] for trial in done]) for axis in own]
    columns += [
        _upright(Axis(_title(name), {}), [_number(trial.row, name) for trial in done])
        for name in setup.search.objectives
    ]
    places = [round(80 + index * (WIDE - 160) / max(len(columns) - 1, 1), 1) for index in range(len(columns))]
    scales = [Scale(title, at, texts) for at, (title, texts, _) in zip(places, columns, strict=True)]
    ways = [
        (" ".join(f"{at},{ys[index]}" for at, (_, _, ys) in zip(places, columns, strict=True)), trial)
        for index, trial in enumerate(done)
    ]
    return scales, ways


def _upright(axis: Axis, values: Sequence[str | float]) -> tuple[str, list[tuple[float, str]], list[float]]:
    """Return a vertical axis's title, its labels with their places, and the place of each value."""
    if axis.choices:
        step = (BOTTOM - TOP) / max(len(axis.choices) - 1, 1)
        at: Mapping[str, float] = {label: round(BOTTOM - n * step, 1) for n, label in enumerate(axis.choices)}
        return axis.name, [(y, label) for label, y in at.items()], [at[str(value)] for value in values]
    known = [float(value) for value in values]
    drawn = _axis([*known, *(axis.span.values() if axis.span else ())], BOTTOM, TOP)
    return axis.name, [(drawn.at(tick), numbers.tick(tick)) for tick in drawn.ticks], [drawn.at(x) for x in known]


def _axis(values: Sequence[float], start: float, end: float) -> charts.Axis:
    """Return an axis, logarithmic if the values span more than a factor of three."""
    is_wide = min(values) > 0 and max(values) / min(values) > 3
    return (charts.log_axis if is_wide else charts.linear_axis)(values, start, end)


def _number(row: Row, name: str) -> float:
    return (row.mean(name) or 0.0) * (100 if MEASURES[name].unit == "%" else 1)


def _title(name: str) -> str:
    return f"{MEASURES[name].title}, {MEASURES[name].unit}"
