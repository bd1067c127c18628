"""The page of a search: the front with every trial, what was gained over time, and which axis mattered. No script, nothing loaded."""

import json
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compress.commands.search.board import Board, Row, best, progress
from compress.commands.search.measures import MEASURES
from compress.commands.search.show import means, place, where
from compress.commands.search.space import axes
from compress.commands.search.trial import Setup
from compress.report import charts, numbers
from compress.report.html import FRAME, template

PICKED = "picked.json"
WIDE, TALL = 900, 260  # of the parallel coordinates, in the page's pixels


class Dot(NamedTuple):
    """One trial in a drawing: its place, its words, its run's page."""

    x: float
    y: float
    text: str
    link: str
    kind: str  # front, inside, outside (of the constraints)


class Scatter(NamedTuple):
    """Trials by two measures."""

    x: charts.Axis
    y: charts.Axis
    titles: tuple[str, str]
    dots: list[Dot]
    front: str


class Scale(NamedTuple):
    """One upright axis of the parallel coordinates, with the texts at its places."""

    title: str
    at: float
    texts: list[tuple[float, str]]


class Shown(NamedTuple):
    """What the page shows of one board."""

    name: str
    front: Scatter | None
    covered: Scatter | None
    importance: dict[str, dict[str, float]]
    scales: list[Scale]
    lines: list[Dot]  # their place is the text of an SVG polyline
    rows: list[tuple[Row, str, str]]  # each with its kind and its link


def write_page(setup: Setup, boards: Sequence[Board]) -> Path:
    """Write the page, in one step, and return its path."""
    page, search = setup.folder / "index.html", setup.search
    picked = setup.folder / PICKED
    rows = boards[-1].rows() or boards[0].rows()
    text = template("search.html.j2").render(
        search=search,
        measures=MEASURES,
        shown=[_shown(setup, board) for board in reversed(boards) if board.rows()],
        picked=json.loads(picked.read_text()) if picked.exists() else None,
        recommended=next(iter(best(rows, search)), None),
        where=where,
        means=means,
    )
    aside = page.with_name(f".page-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    return aside.rename(page)


def _shown(setup: Setup, board: Board) -> Shown:
    search, rows = setup.search, board.rows()
    front = [row.number for row in best(rows, search)]
    links = {
        row.number: urllib.parse.quote(os.path.relpath(found, setup.folder))
        for row in rows
        if (found := place(setup, board, row, search.seeds[0]) / "report" / "index.html").exists()
    }
    kinds = {
        row.number: row.state if row.state != "done" else "front" if row.number in front else "inside" if row.is_allowed else "outside"
        for row in rows
    }  # fmt: skip
    done = [row for row in rows if row.state == "done"]
    dots = {row.number: Dot(0, 0, _text(row), links.get(row.number, ""), kinds[row.number]) for row in done}
    scales, lines = _parallel(done, dots, setup)
    return Shown(
        name=board.name,
        front=_front(done, front, dots, setup),
        covered=_covered(done, dots, setup),
        importance=board.importance(),
        scales=scales,
        lines=lines,
        rows=[(row, kinds[row.number], links.get(row.number, "")) for row in sorted(rows, key=lambda row: row.number not in front)],
    )  # fmt: skip


def _front(done: Sequence[Row], front: Sequence[int], dots: dict[int, Dot], setup: Setup) -> Scatter | None:
    """Return the trials by the first objective against the second, or against their numbers where there is none."""
    y_name, *others = setup.search.objectives
    if not done:
        return None
    xs = {row.number: _number(row, others[0]) if others else float(row.number) for row in done}
    ys = {row.number: _number(row, y_name) for row in done}
    x = _axis(list(xs.values()), FRAME.left + 8, FRAME.right - 8)
    y = _axis(list(ys.values()), FRAME.bottom - 14, FRAME.top + 14)
    placed = {number: dots[number]._replace(x=x.at(xs[number]), y=y.at(ys[number])) for number in xs}
    steps = sorted((placed[number].x, placed[number].y) for number in front)
    line = " ".join(f"{a},{b}" for a, b in steps) if others else ""
    return Scatter(x, y, (_title(others[0]) if others else "Trial", _title(y_name)), list(placed.values()), line)


def _covered(done: Sequence[Row], dots: dict[int, Dot], setup: Setup) -> Scatter | None:
    """Return the hypervolume after each trial."""
    values = [100 * value for value in progress(done, setup.search)]
    if len(values) < 2:
        return None
    x = charts.linear_axis([1, len(values)], FRAME.left + 8, FRAME.right - 8)
    y = charts.linear_axis([0, *values], FRAME.bottom - 14, FRAME.top + 14)
    placed = [
        dots[row.number]._replace(x=x.at(n), y=y.at(value))
        for n, (row, value) in enumerate(zip(done, values, strict=True), start=1)
    ]
    line = " ".join(f"{dot.x},{dot.y}" for dot in placed)
    return Scatter(x, y, ("Trials finished", "Hypervolume, % of the box around all trials"), placed, line)


def _parallel(done: Sequence[Row], dots: dict[int, Dot], setup: Setup) -> tuple[list[Scale], list[Dot]]:
    """Return one upright axis for each axis of the space and each objective, and a line through them for each trial."""
    search = setup.search
    columns = [(axis.name, axis) for axis in axes(search)] + [(name, None) for name in search.objectives]
    gap = (WIDE - 160) / max(len(columns) - 1, 1)
    scales: list[Scale] = []
    ways: dict[int, list[str]] = {row.number: [] for row in done}
    for index, (name, axis) in enumerate(columns if done else ()):
        at = round(80 + index * gap, 1)
        if axis is not None and axis.span is None:
            step = (TALL - 50) / max(len(axis.choices) - 1, 1)
            places = {label: round(TALL - 20 - number * step, 1) for number, label in enumerate(axis.choices)}
            scales.append(Scale(name, at, [(y, label) for label, y in places.items()]))
            ys = {row.number: places[str(row.point[name])] for row in done}
        else:
            values = {row.number: float(row.point[name]) if axis else _number(row, name) for row in done}
            ends = [axis.span.low, axis.span.high] if axis and axis.span else values.values()
            own = _axis([*values.values(), *ends], TALL - 20, 30)
            title = name if axis else _title(name)
            scales.append(Scale(title, at, [(own.at(tick), numbers.tick(tick)) for tick in own.ticks]))
            ys = {number: own.at(value) for number, value in values.items()}
        for number, y in ys.items():
            ways[number].append(f"{at},{y}")
    drawn = [dots[number]._replace(text=f"{' '.join(way)}|{dots[number].text}") for number, way in ways.items()]
    return scales, sorted(drawn, key=lambda dot: dot.kind == "front")


def _axis(values: Sequence[float], start: float, end: float) -> charts.Axis:
    """Return a logarithmic axis where the values span more than a factor of three."""
    is_wide = min(values) > 0 and max(values) / min(values) > 3
    return (charts.log_axis if is_wide else charts.linear_axis)(values, start, end)


def _number(row: Row, name: str) -> float:
    value = row.mean(name) or 0.0
    return 100 * value if MEASURES[name].unit == "%" else value


def _title(name: str) -> str:
    return f"{MEASURES[name].title}, {MEASURES[name].unit}"


def _text(row: Row) -> str:
    names = [name for name in MEASURES if row.mean(name) is not None]
    measured = ", ".join(f"{name} {text}" for name, text in zip(names, means(row, names), strict=True))
    return f"{row.number:03d}: {where(row)}\n{measured}"
