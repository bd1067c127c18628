"""Print tables without losing anything: in a narrow terminal, columns fold or move below; in a pipe, nothing is folded."""

import math
import os
from collections.abc import Callable
from io import StringIO

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from compress.report.page.table import Strong, Table

LINES = 40  # of one screen
UNBOUNDED = 10_000  # columns
FOLDED, NAME = 12, 16  # narrowest widths of a text column and of the row names
MARKS = {"✓": "green", "✗": "red"}


def screen() -> Console:
    """Return the console of standard output: as wide as the terminal or COLUMNS; unbounded in a pipe."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNBOUNDED
    return console


def say(console: Console, text: str, style: str = "", first: str = "") -> None:
    """Print `first` in the style, then the text; without `first`, the text is styled. Brackets are text, never markup."""
    console.print(Text.assemble((first, style), text) if first else Text(text, style), soft_wrap=True)


def print_what_fits(console: Console, draw: Callable[[Console, int], None], notes: int) -> None:
    """Call `draw` with the largest number of `notes` that still fits one screen."""

    def lines(kept: int) -> int:
        trial = Console(file=StringIO(), width=console.width)
        draw(trial, kept)
        assert isinstance(trial.file, StringIO)
        return sum(max(1, math.ceil(len(line.rstrip()) / console.width)) for line in trial.file.getvalue().splitlines())

    draw(console, next((kept for kept in range(notes, 0, -1) if lines(kept) <= LINES), 0))


def show(console: Console, table: Table, *, few: int | None = None) -> None:
    """Print the first `few` rows; columns that do not fit are printed below, with the row names repeated."""
    columns = list(range(len(table.columns) - table.more))
    if table.title:
        cut = f" · {few} of {len(table.rows):,}" if few and few < len(table.rows) else ""
        console.print(Text(f"\n{table.title}{cut}", "bold"))
    while columns:
        taken = _fitting(table, columns, console.width)
        _print(console, table, taken, few)
        columns = [columns[0], *columns[len(taken) :]] if len(taken) < len(columns) else []
    if table.note:
        console.print(Text(table.note, "dim"))


def _print(console: Console, table: Table, columns: list[int], few: int | None) -> None:
    gap = 1 if sum(_natural(table, column) + 2 for column in columns) > console.width + 2 else 2
    grid = Grid(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", show_header=any(table.columns))
    room = console.width - gap * (len(columns) - 1)
    widths = {column: _natural(table, column) for column in columns}
    least = {column: _least(table, column) for column in columns}
    while sum(widths.values()) > room and (wide := [column for column in columns if widths[column] > least[column]]):
        widths[max(wide[1:] or wide, key=widths.__getitem__)] -= 1  # narrow the row names last
    for column in columns:
        justify = "left" if column in table.text else "right"
        grid.add_column(Text(table.columns[column]), justify=justify, overflow="fold", width=max(widths[column], 1))  # type: ignore[arg-type]
    for row in table.rows[:few]:
        grid.add_row(*(Text(row[column], _style(row[column])) for column in columns))
    width, console.width = console.width, max(console.width, sum(widths.values()) + gap * len(columns))
    console.print(grid)
    console.width = width


def _fitting(table: Table, columns: list[int], width: int) -> list[int]:
    """Return the first columns that fit at their narrowest; at least the names and one more."""
    taken, room = 0, width
    for column in columns:
        room -= _least(table, column) + (1 if taken else 0)
        if room < 0 and taken > 1:
            break
        taken += 1
    return columns[:taken]


def _natural(table: Table, column: int) -> int:
    return max(map(len, (table.columns[column], *(row[column] for row in table.rows))), default=0)


def _least(table: Table, column: int) -> int:
    """Return a column's narrowest width: texts and headings fold, numbers never do."""
    if column in table.text:
        return min(_natural(table, column), NAME if column == 0 else FOLDED)
    words = max(map(len, table.columns[column].split()), default=0)
    return max(min(words, FOLDED), max((len(row[column]) for row in table.rows), default=0))


def _style(cell: str) -> str:
    colour = MARKS.get(cell[:1], "")
    return f"bold {colour}".strip() if isinstance(cell, Strong) else colour
