"""Aligned plain text for terminals and logs."""

import sys
from collections.abc import Sequence
from shutil import get_terminal_size


def table(header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Return rows under a header: text left-aligned, numbers right-aligned, a dash for None."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_text = [all(isinstance(row[index], str) for row in rows) for index in range(len(header))]
    lines = (
        "  ".join(
            word.ljust(width) if left else word.rjust(width)
            for word, width, left in zip(line, widths, is_text, strict=True)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def cell(value: str | float | None) -> str:
    """Return one value as text."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def print_live(line: str) -> None:
    """Show a line of progress in place, only on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line[: get_terminal_size().columns - 1]}")
        sys.stderr.flush()
