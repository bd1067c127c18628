"""The comparison as tables in the terminal, readable at 80 columns: up to four runs are columns, more are rows."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.report.comparison.compare import Comparison
from compress.report.comparison.table import Line, lines, no_differences
from compress.report.screen import show

MOST_COLUMNS = 4
NAME_WIDTH = 20
LEAST_COLUMN = 8
GAP = 2


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print who leads, every measurement, what differs in the recipes, and what stands against the comparison."""
    names = [one.name for one in comparison.candidates]
    console.print(Text(f"\n{' · '.join(names)}", "bold"))
    if comparison.conditions:
        console.print(Text(f"times: {comparison.conditions}", "dim"))
    for best in comparison.best:
        note = f"  {best.note}" if best.note else ""
        console.print(
            Text.assemble(
                (f"\n{best.title:14}", "dim"), (f"{', '.join(best.names)} ", "bold"), best.value, (note, "dim")
            ),
            end="",
        )
    console.print()
    measured = lines(comparison)
    if len(names) <= MOST_COLUMNS:
        rows = [(line.title, [_cell(line, index) for index in range(len(names))]) for line in measured]
        show(console, _columns("Measured", "", names, rows, console.width))
    else:
        shared = " · ".join(f"{line.title} {line.cells[0]}" for line in measured if line.is_shared)
        for table in _rows(names, [line for line in measured if not line.is_shared], console.width):
            show(console, table)
        if shared:
            console.print(Text(f"\nall: {shared}", "dim"))
    show(console, _differences(comparison, names, console.width))
    for warning in comparison.warnings:
        console.print(Text.assemble(("\nwarning ", "yellow"), warning))


def _columns(
    title: str, first: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[Text]]], width: int
) -> Table:
    """Return the candidates side by side; what does not fit is broken, titles last."""
    table, longest = _table(title, first), max(len(row) for row, _ in rows)
    room = (width - longest) // len(names) - GAP
    table.columns[0].no_wrap = room >= LEAST_COLUMN
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold", max_width=max(room, LEAST_COLUMN))
    for row, cells in rows:
        table.add_row(Text(row), *cells)
    return table


def _rows(names: Sequence[str], measured: Sequence[Line], width: int) -> Iterator[Table]:
    """Yield tables with a candidate in each row, as many measurements in each as the width takes."""
    first, title = min(max(map(len, names)), NAME_WIDTH), "Measured"
    while measured:
        taken, room = 0, width - first
        for line in measured:
            room -= GAP + max(len(line.short), *map(len, line.cells))
            if room < 0 and taken:
                break
            taken += 1
        table, title = _table(title, ""), ""
        table.columns[0].width = first
        for line in measured[:taken]:
            table.add_column(line.short, justify="right", no_wrap=True)
        for index, name in enumerate(names):
            table.add_row(Text(name), *(_cell(line, index) for line in measured[:taken]))
        yield table
        measured = measured[taken:]


def _differences(comparison: Comparison, names: Sequence[str], width: int) -> Table | Text:
    """Return the settings that differ, with a column for each candidate or, of many, a row for each value."""
    if not comparison.differences:
        return Text(f"\n{no_differences(comparison)}", "dim")
    if len(names) <= MOST_COLUMNS:
        rows = [
            (difference.path, [Text(value) for value in difference.values]) for difference in comparison.differences
        ]
        return _columns("Recipes", "Setting", names, rows, width)
    table = _table("Recipes", "Setting")
    table.add_column("Value", overflow="fold", ratio=1)
    table.add_column("Of", overflow="fold", ratio=1)
    for difference in comparison.differences:
        for place, (value, of) in enumerate(difference.groups(names)):
            table.add_row(Text("" if place else difference.path), Text(value), Text(of))
    return table


def _cell(line: Line, index: int) -> Text:
    return Text(line.cells[index], "bold green" if index in line.best else "")


def _table(title: str, first: str) -> Table:
    """Return an empty table whose first column folds."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    table.title, table.title_justify, table.title_style = Text(f"\n{title}" if title else "", "bold"), "left", ""
    table.add_column(first, overflow="fold")
    return table
