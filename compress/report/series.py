"""Read what the page draws and `report.json` does not hold: training curves, channel widths, block medians."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from compress.report.shape import DeployedRow, Report


class Training(NamedTuple):
    """One training: a measurement's values by epoch, None where an epoch's was not finite or not measured."""

    title: str
    epochs: list[int]
    values: dict[str, list[float | None]]


class Layer(NamedTuple):
    """One layer's output channels in the teacher and in the student."""

    name: str
    before: int
    after: int


def trainings(root: Path, report: Report) -> list[Training]:
    """Return each stage's trainings, in order; a stage that trains in phases gives one for each."""
    found = []
    for stage in report["stages"]:
        phases: dict[str, list[dict[str, Any]]] = {}
        for entry in _lines(root / stage["directory"] / "log.jsonl"):
            if "epoch" in entry:
                phases.setdefault(entry.get("phase", ""), []).append(entry)
        for phase, epochs in phases.items():
            names = dict.fromkeys(name for entry in epochs for name in entry)
            values = {name: [entry.get(name) for entry in epochs] for name in names}
            title = " · ".join(part for part in (stage["stage"], phase) if part)
            found.append(Training(title, [entry["epoch"] for entry in epochs], values))
    return found


def layers(root: Path, report: Report) -> list[Layer]:
    """Return the convolutions and linear layers of the pruning plans; several cuts count as one."""
    merged: dict[str, Layer] = {}
    for stage in report["stages"]:
        path = root / stage["directory"] / "plan.json"
        for layer in json.loads(path.read_text(encoding="utf-8"))["layers"] if path.exists() else ():
            if layer["kind"].startswith(("Conv", "Linear")):
                first = merged.get(layer["name"])
                before = first.before if first else layer["out_before"]
                merged[layer["name"]] = Layer(layer["name"], before, layer["out_after"])
    return list(merged.values())


def block_medians(root: Path, report: Report, row: DeployedRow) -> list[float]:
    """Return the medians in ms of the blocks behind a row of the last bench stage."""
    benches = [path for stage in report["stages"] if (path := root / stage["directory"] / "bench.json").exists()]
    timings = json.loads(benches[-1].read_text(encoding="utf-8"))["timings"] if benches else []
    keys = ("name", "provider", "threads", "batch", "image_size")
    same = (timing for timing in timings if all(timing[key] == row[key] for key in keys))  # type: ignore[literal-required]
    return next((timing["block_ms"] for timing in same), None) or []


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Yield a log's objects."""
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
