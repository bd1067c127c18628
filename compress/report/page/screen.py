"""Print tables without losing anything: in a narrow terminal, columns fold or move below; in a pipe, nothing is folded."""

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.report.page.table import ReportTable, Strong

LINES = 40  # of one screen
UNBOUNDED = 10_000  # columns
FOLDED = 16  # narrowest width of a text column
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


def print_screen(
    console: Console,
    start: Callable[[Console], None],
    warnings: Sequence[str],
    ends: Sequence[Callable[[Console, int], None]],
    *,
    verbose: bool,
    failures: int = 0,
    least: int = 0,
) -> None:
    """Call `start`, print warnings, and call `ends` with the number of notes that each may print, at first `least` or more.

    Failures, which an end prints, and warnings are notes. Unless verbose, the largest number of them is kept that fits one screen.
    """
    total = max(failures + len(warnings), least)

    def draw(console: Console, notes: int) -> None:
        start(console)
        for index, warning in enumerate(warnings[: max(0, notes - failures)]):
            say(console, warning, "yellow", "warning " if index else "\nwarning ")
        if (hidden := failures + len(warnings) - notes) > 0:
            say(console, f"\n{hidden} more on the page and with -v", "yellow")
        for end in ends:
            end(console, notes)

    def fits(dropped: int) -> bool:
        trial = Console(file=(file := StringIO()), width=console.width)
        draw(trial, total - dropped)
        return (
            sum(max(1, math.ceil(len(line.rstrip()) / console.width)) for line in file.getvalue().splitlines()) <= LINES
        )

    draw(console, total - (0 if verbose else bisect_left(range(total), True, key=fits)))


def show(console: Console, table: ReportTable) -> None:
    """Print a table; columns that do not fit are printed below, with the row names repeated."""
    left = list(range(len(table.columns) - table.more))
    if table.title:
        console.print(Text(f"\n{table.title}", "bold"))
    while left:
        taken = _fitting(table, left, console.width)
        width, least = console.width, sum(_least(table, column) + 1 for column in taken)
        console.width = max(width, least)  # where even two columns are too wide, lines are longer than the terminal
        console.print(_grid(table, taken, console.width))
        console.width = width
        left = [left[0], *left[len(taken) :]] if len(taken) < len(left) else []
    if table.note:
        console.print(Text(table.note, "dim"))


def _grid(table: ReportTable, columns: Sequence[int], width: int) -> Table:
    """Return these columns; if they do not fit as they are, texts and the headings of numbers fold."""
    is_tight = sum(_natural(table, column) + 2 for column in columns) > width + 2
    padding = (0, 1 if is_tight else 2, 0, 0)
    grid = Table(box=None, padding=padding, pad_edge=False, header_style="dim", show_header=any(table.columns))
    for column in columns:
        is_text = column in table.text
        fixed = _least(table, column) if is_tight and not is_text else None
        heading = Text(table.columns[column])
        grid.add_column(heading, justify="left" if is_text else "right", overflow="fold", width=fixed)
    for row in table.rows:
        grid.add_row(*(Text(row[column], _style(row[column])) for column in columns))
    return grid


def _fitting(table: ReportTable, columns: list[int], width: int) -> list[int]:
    """Return the first columns that fit at their narrowest; at least the names and one more."""
    fits = [sum(_least(table, column) + 1 for column in columns[:end]) <= width + 1 for end in range(len(columns) + 1)]
    return columns[: max(2, sum(fits) - 1)]


def _natural(table: ReportTable, column: int) -> int:
    return max(map(len, (table.columns[column], *(row[column] for row in table.rows))), default=0)


def _least(table: ReportTable, column: int) -> int:
    """Return a column's narrowest width: texts and headings fold, numbers never do."""
    if column in table.text:
        return min(_natural(table, column), FOLDED)
    words = max(map(len, table.columns[column].split()), default=0)
    return max(1, min(words, FOLDED), max((len(row[column]) for row in table.rows), default=0))


def _style(cell: str) -> str:
    colour = MARKS.get(cell[:1], "")
    return f"bold {colour}".strip() if isinstance(cell, Strong) else colour
