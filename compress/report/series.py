"""Read what the page draws and `report.json` does not hold: training curves, channel widths and layers' times."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.report.shape import Report


def trainings(root: Path, report: Report) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each training's title and its epochs as the log has them; a stage that trains in phases gives one for each."""
    for stage in report["stages"]:
        log = root / stage["directory"] / "log.jsonl"
        phases: dict[str, list[dict[str, Any]]] = {}
        for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else ()):
            if "epoch" in entry:
                phases.setdefault(entry.get("phase", ""), []).append(entry)
        for phase, epochs in phases.items():
            yield " · ".join(filter(None, (stage["stage"], phase))), epochs


def widths(root: Path, report: Report) -> dict[str, tuple[int, int]]:
    """Return the channels of each convolution and linear layer before and after all cuts, by the pruning plans."""
    found: dict[str, tuple[int, int]] = {}
    for stage in report["stages"]:
        path = root / stage["directory"] / "plan.json"
        for layer in json.loads(path.read_text(encoding="utf-8"))["layers"] if path.exists() else ():
            if layer["kind"].startswith(("Conv", "Linear")):
                before, _ = found.get(layer["name"], (layer["out_before"], 0))
                found[layer["name"]] = (before, layer["out_after"])
    return found


def layer_times(root: Path, report: Report) -> list[dict[str, Any]]:
    """Return each layer's milliseconds before and after the last cut to a latency, slowest first; none where no cut was held to one."""
    paths = [root / stage["directory"] / "latency.json" for stage in reversed(report["stages"])]
    path = next((path for path in paths if path.exists()), None)
    layers = json.loads(path.read_text(encoding="utf-8"))["layers"] if path else []
    return sorted(layers, key=lambda layer: -float(layer["before_ms"]))
