"""A table as plain data, which the terminal, the page and the model card draw."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compress.report.numbers import UNKNOWN

BAR = 16  # characters


class Strong(str):
    """A cell that stands out."""

    __slots__ = ()


class Table(NamedTuple):
    """Cells in words under their columns; the columns at the indexes `text` are words, the others numbers.

    A cell that begins with ✓ or ✗ says whether a limit is met. The page alone shows the last `more` columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)
    note: str = ""
    more: int = 0


class Section(NamedTuple):
    """Tables under one heading: `lead` stands above them, `after` below, and the page opens `folded` ones on a click."""

    title: str
    tables: Sequence[Table]
    lead: str = ""
    after: Sequence[str] = ()
    folded: Sequence[Table] = ()


def strong(cells: Iterable[str]) -> list[str]:
    """Return a row that stands out."""
    return [Strong(cell) for cell in cells]


def mark(is_met: bool | None, text: str = "") -> str:
    """Return the sign of a limit that is met or missed before a text; None is no limit."""
    return text if is_met is None else f"{'✓' if is_met else '✗'} {text}".rstrip()


def bar(fraction: float) -> str:
    """Return a bar of blocks; nothing for zero."""
    return "█" * max(1, round(BAR * fraction)) if fraction > 0 else ""


def count(number: int | None) -> str:
    """Return a count as 1,204."""
    return UNKNOWN if number is None else f"{number:,}"


def markdown(table: Table, few: int | None = None) -> str:
    """Return the first rows as a Markdown table, without the columns that no row knows anything of; texts come from strangers."""
    if not table.rows:
        return ""
    known = [index for index in range(len(table.columns)) if {row[index] for row in table.rows} - {UNKNOWN, ""}]
    rows = [[plain(row[index]) for index in known] for row in (table.columns, *table.rows[:few])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(known), *rows[1:]))


def plain(text: str) -> str:
    """Return a text that is nothing but text in a cell of Markdown."""
    return html.escape(" ".join(text.split()).replace("|", "\\|"), quote=False)
