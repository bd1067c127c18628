"""What a search found, in the terminal and in tables of every stage and file."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from compress.commands.search.board import Board, Row, best
from compress.commands.search.measures import MEASURES
from compress.commands.search.space import Search
from compress.commands.search.trial import Setup, trial_name
from compress.report.screen import screen, show
from export.onnx_file.roles import ORDER


def line(row: Row, rows: Sequence[Row], search: Search) -> str:
    """Return what to say of a trial that has ended; a star is for the front."""
    star = "★" if row.number in [one.number for one in best(rows, search)] else " "
    return f"{star} {row.number:03d}  {row.error or ', '.join(means(row, search.objectives))}  ({where(row)})"


def where(row: Row) -> str:
    """Return in what a trial differs from others."""
    return ", ".join(f"{name} {value}" for name, value in row.point.items())


def means(row: Row, names: Sequence[str]) -> list[str]:
    """Return a trial's measures, as means over its seeds, with their range where there are several."""
    return [_mean(name, row.measured.get(name, ())) for name in names]


def print_front(setup: Setup, board: Board) -> None:
    """Print the front of the board."""
    search, rows = setup.search, board.rows()
    found = best(rows, search)
    title = f"{board.name}: {len(found)} of {len(rows)} trials on the front"
    if not found:
        screen().print(Text(f"{title}: none is within {', '.join(search.constraints)}"))
        return
    table = Table(box=None, padding=(0, 2), title=title, title_justify="left")
    for name in ("Trial", *(MEASURES[name].title for name in search.objectives), "What"):
        table.add_column(name)
    for row in found:
        table.add_row(*map(Text, (f"{row.number:03d}", *means(row, search.objectives), where(row))))
    show(screen(), table)


def write_tables(setup: Setup, board: Board) -> None:
    """Write every score of every trial's stages and files, mean and range over its seeds, as Markdown."""
    done = [row for row in board.rows() if row.state == "done"]
    scores = {where(row): [_scores(report) for report in reports(setup, board, row)] for row in done}
    text = "\n".join(_table(scores))
    (setup.folder / f"{board.name}.md").write_text(f"{text}\n", encoding="utf-8")


def reports(setup: Setup, board: Board, row: Row) -> list[Any]:
    """Return the reports of a trial's runs, by seed; those that are there."""
    places = [place(setup, board, row, seed) / "report.json" for seed in setup.search.seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in places if path.exists()]


def place(setup: Setup, board: Board, row: Row, seed: int) -> Path:
    """Return the folder of a trial's run."""
    return setup.folder / "trials" / trial_name(setup.search, board.name, row.number, seed)


def _scores(report: Mapping[str, Any]) -> dict[str, float]:
    """Return every score of a run by name: float stages in PyTorch, files and methods where they were scored."""
    found = {
        f"{row['stage']} (PyTorch)": row["metrics"]["score"]
        for row in report["stages"]
        if row["stage"] in ("source", "prune", "distill", "qat")
    }
    files = {row["name"]: row["score"] for row in report["deployed"]}
    found |= {name: files[name] for name in (*ORDER, *files) if name in files}
    for target, ptq in ((report.get("ptq") or {}).get("targets") or {}).items():
        found |= {
            f"PTQ {row['engine']} {row['method']}, {target}"
            + (" (PyTorch)" if row["scored_in"] == "pytorch" else ""): row["score"]
            for row in ptq["methods"]
        }
    return {name: float(value) for name, value in found.items() if value is not None}


def _table(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    """Yield a Markdown table; what all trials share stands once."""
    yield "| what | score, mean | range over seeds | seeds |\n|---|---|---|---|"
    for name in dict.fromkeys(name for trial in scores.values() for one in trial for name in one):
        values = {point: [one[name] for one in trial if name in one] for point, trial in scores.items()}
        shared = len({tuple(numbers) for numbers in values.values()}) == 1
        for point, numbers in list(values.items())[: 1 if shared else None]:
            if numbers:
                low, high = 100 * min(numbers), 100 * max(numbers)
                mean = f"{100 * statistics.mean(numbers):.2f} %"
                yield f"| {name}{'' if shared else f', {point}'} | {mean} | {low:.2f} to {high:.2f} | {len(numbers)} |"


def _mean(name: str, values: Sequence[float]) -> str:
    shown = MEASURES[name].show(statistics.mean(values) if values else None)
    if len(values) < 2:
        return shown
    return f"{shown} ({MEASURES[name].show(min(values))} to {MEASURES[name].show(max(values))})"
