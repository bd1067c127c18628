"""A table as plain data, drawn by the terminal, the page and the model card."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from compress.report.numbers import UNKNOWN

BAR = 16  # characters


class Strong(str):
    """A cell in bold."""

    __slots__ = ()


class ReportTable(NamedTuple):
    """Cells as strings; the columns at the indexes `text` are words, the others numbers.

    A cell that begins with ✓ or ✗ tells whether a limit is met. The last `more` columns are only on the page.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)
    note: str = ""
    more: int = 0


class PageSection(NamedTuple):
    """Tables under one heading: `lead` is above them, `after` below; the page hides `folded` tables behind a click."""

    title: str
    tables: Sequence[ReportTable]
    lead: str = ""
    after: Sequence[str] = ()
    folded: Sequence[ReportTable] = ()


def strong(cells: Iterable[str]) -> list[str]:
    """Return a row in bold."""
    return [Strong(cell) for cell in cells]


def mark(is_met: bool | None, text: str = "") -> str:
    """Return a text after ✓ or ✗ for a limit that is met or missed; None means no limit."""
    return text if is_met is None else f"{'✓' if is_met else '✗'} {text}".rstrip()


def bar(fraction: float) -> str:
    """Return a bar of block characters; empty for zero."""
    return "█" * max(1, round(BAR * fraction)) if fraction > 0 else ""


def count(number: int | None) -> str:
    """Return a count as 1,204."""
    return UNKNOWN if number is None else f"{number:,}"


def markdown(table: ReportTable, few: int | None = None) -> str:
    """Return the first `few` rows as a Markdown table without columns that are empty in all rows; cells are untrusted and escaped."""
    if not table.rows:
        return ""
    known = [index for index in range(len(table.columns)) if {row[index] for row in table.rows} - {UNKNOWN, ""}]
    rows = [[plain(row[index]) for index in known] for row in (table.columns, *table.rows[:few])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(known), *rows[1:]))


def plain(text: str) -> str:
    """Return a text escaped for a cell of a Markdown table."""
    return html.escape(" ".join(text.split()).replace("|", "\\|"), quote=False)
