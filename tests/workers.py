"""Small searches, and a worker of one as a process of its own; imports no torch, so that a worker starts at once."""

import time
from pathlib import Path
from typing import Any

from compress.artifact import turn
from compress.commands.search.board import Board, Taken
from compress.commands.search.run import work
from compress.commands.search.space import Search, grid

SEARCH: dict[str, Any] = {
    "name": "two",
    "recipes": ["a.yaml"],
    "space": {"prune.keep_macs": {"low": 0.1, "high": 0.9}, "prune.criterion": ["l1", "l2"]},
    "objectives": ["score", "macs"],
    "budget": {"trials": 6},
}


def a_search(**changes: Any) -> Search:
    return Search.model_validate({**SEARCH, **changes})


def a_board(folder: Path, search: Search, storage: str | None = None) -> Board:
    board = Board(search, folder, name=search.name, storage=storage)
    board.points = grid(search) if search.sampler == "grid" else None
    return board


def measured(taken: Taken) -> dict[str, list[float]]:
    """A trade-off whose front is `l2`: its score is a point higher at any size."""
    keep = float(taken.point["prune.keep_macs"])
    return {"score": [keep + 0.01 * (taken.point["prune.criterion"] == "l2")], "macs": [100 * keep]}


def many() -> Search:
    return a_search(
        space={"prune.keep_macs": [n / 40 for n in range(1, 13)], "prune.criterion": ["l1", "l2"]}, sampler="grid"
    )


def worker(folder: Path, storage: str | None) -> None:
    """Run a grid's trials, each of three stages that trials share in part; a stage that is made twice is an error."""

    def stage(name: str) -> None:
        with turn(folder / "stages" / name):
            if not (folder / "stages" / name).exists():
                time.sleep(0.02)
                (folder / "stages" / name).open("x").close()

    def run(taken: Taken) -> dict[str, list[float]]:
        for name in ("source", f"cut-{taken.point['prune.keep_macs']}", f"trial-{sorted(taken.point.items())}"):
            stage(name.replace("/", ""))
        return measured(taken)

    if storage is not None:
        from elsewhere.postgresql import use_driver  # imports torch

        use_driver()
    work(a_board(folder, many(), storage), run, poll_s=0.05)
