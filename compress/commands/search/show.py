"""Show a search's front in the terminal, and write a table of all scores."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from compress.commands.search.board import Board, best
from compress.commands.search.measures import MEASURES
from compress.commands.search.trial import Setup
from export.names import REPORT_JSON
from export.onnx_file.roles import ORDER

SEEN = 12  # most trials of the front in the terminal while the search runs


def front_table(board: Board, *, is_over: bool) -> Table | Text:
    """Return the board's current front."""
    search, rows = board.search, board.rows()
    found, ended = best(rows, search), sum(row.state != "running" for row in rows)
    title = f"{board.name}: {len(found)} on the front of {ended} trials" + ("" if is_over else ", going on")
    if not found and search.constraints and ended:
        return Text(f"{title}; none is within {', '.join(search.constraints)}")
    table = Table(box=None, padding=(0, 2), title=title, title_justify="left", show_header=bool(found))
    for name in ("Trial", *(MEASURES[name].title for name in search.objectives), "What"):
        table.add_column(name)
    for row in found if is_over else found[:SEEN]:
        table.add_row(*map(Text, (f"{row.number:03d}", *row.shown(search.objectives), row.where)))
    return table


def write_scores(setup: Setup, board: Board) -> None:
    """Write the scores of every trial's stages and files, as mean and range over its seeds, as Markdown."""
    done = [row for row in board.rows() if row.state == "done"]
    scores = {}
    for row in done:
        files = [setup.place(board.name, row.number, seed) / REPORT_JSON for seed in setup.search.seeds]
        scores[row.where] = [_scores(json.loads(file.read_text())) for file in files if file.exists()]
    (setup.folder / f"{board.name}.md").write_text("\n".join(_table(scores)) + "\n", encoding="utf-8")


def _scores(report: Mapping[str, Any]) -> dict[str, float]:
    """Return every score of a run by name: stages in PyTorch, files, and calibration methods."""
    found = {
        f"{row['stage']} (PyTorch)": row["metrics"].get("score")
        for row in report["stages"]
        if row["stage"] in ("source", "prune", "distill", "qat")
    }
    files = {row["name"]: row["score"] for row in report["deployed"]}
    found |= {name: files[name] for name in (*ORDER, *files) if name in files}
    for target, ptq in ((report.get("ptq") or {}).get("targets") or {}).items():
        for row in ptq["methods"]:
            place = " (PyTorch)" if row["scored_in"] == "pytorch" else ""
            found[f"PTQ {row['engine']} {row['method']}, {target}{place}"] = row["score"]
    return {name: value for name, value in found.items() if value is not None}


def _table(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    """Yield a Markdown table; a score that all trials share has one row."""
    yield "| what | score, mean | range over seeds | seeds |\n|---|---|---|---|"
    for name in dict.fromkeys(name for trial in scores.values() for one in trial for name in one):
        values = {point: [one[name] for one in trial if name in one] for point, trial in scores.items()}
        is_shared = len({tuple(own) for own in values.values()}) == 1
        for point, own in list(values.items())[: 1 if is_shared else None]:
            if own:
                what = name if is_shared else f"{name}, {point}"
                low, high = 100 * min(own), 100 * max(own)
                yield f"| {what} | {100 * statistics.mean(own):.2f} % | {low:.2f} to {high:.2f} | {len(own)} |"
