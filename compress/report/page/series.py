"""Read what the page shows beyond `report.json`: training curves, channel widths and layer times."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.report.shape import Report
from export.names import LATENCY_JSON, LOG_JSONL, PLAN_JSON


def trainings(root: Path, report: Report) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the title and the logged epochs of each training; a stage that trains in phases yields one per phase."""
    for stage in report["stages"]:
        log = root / stage["directory"] / LOG_JSONL
        phases: dict[str, list[dict[str, Any]]] = {}
        for entry in map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else ()):
            if "epoch" in entry:
                phases.setdefault(entry.get("phase", ""), []).append(entry)
        for phase, epochs in phases.items():
            yield " · ".join(filter(None, (stage["stage"], phase))), epochs


def widths(root: Path, report: Report) -> dict[str, tuple[int, int]]:
    """Return the output channels of each convolution and linear layer before and after all pruning, from the plans."""
    found: dict[str, tuple[int, int]] = {}
    for stage in report["stages"]:
        path = root / stage["directory"] / PLAN_JSON
        for layer in json.loads(path.read_text(encoding="utf-8"))["layers"] if path.exists() else ():
            if layer["kind"].startswith(("Conv", "Linear")):
                before, _ = found.get(layer["name"], (layer["out_before"], 0))
                found[layer["name"]] = (before, layer["out_after"])
    return found


def layer_times(root: Path, report: Report) -> list[dict[str, Any]]:
    """Return each layer's milliseconds before and after the last pruning to a latency, slowest first; empty if there was none."""
    paths = [root / stage["directory"] / LATENCY_JSON for stage in reversed(report["stages"])]
    path = next((path for path in paths if path.exists()), None)
    layers = json.loads(path.read_text(encoding="utf-8"))["layers"] if path else []
    return sorted(layers, key=lambda layer: -float(layer["before_ms"]))
