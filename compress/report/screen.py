"""Print tables so that nothing of them is lost: in a narrow terminal lines run over, in a pipe or a file nothing is folded."""

import os

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

UNBOUNDED = 10_000  # columns
FOLDED = 12  # columns that a text may be folded to


def screen() -> Console:
    """Return the console of standard output: as wide as its terminal, or as COLUMNS says; a pipe has no width."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNBOUNDED
    return console


def show(console: Console, renderable: Table | Text) -> None:
    """Print a table at least as wide as its numbers need, which would be cut off otherwise; a text is wrapped."""
    width = console.width
    if isinstance(renderable, Table):
        between = renderable.padding[1] * (len(renderable.columns) - 1)
        console.width = max(width, between + sum(_least(column, console) for column in renderable.columns))
    console.print(renderable)
    console.width = width


def _least(column: Column, console: Console) -> int:
    """Return how narrow a column may become."""
    unbounded = console.options.update(max_width=UNBOUNDED)
    natural = max(Measurement.get(console, unbounded, cell).maximum for cell in (column.header, *column.cells))
    return natural if column.no_wrap else column.min_width or min(natural, FOLDED)
