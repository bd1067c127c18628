"""The tables of what lies beside `report.json`: channel widths and layer times."""

import json
from pathlib import Path

from compress.report.numbers import significant
from compress.report.page.table import ReportTable, bar, count
from compress.report.shape import Json, Report
from export.names import LATENCY_JSON, PLAN_JSON


def widths(root: Path, report: Report) -> list[ReportTable]:
    """Return the output channels of each convolution and linear layer before and after all pruning."""
    found: dict[str, tuple[int, int]] = {}
    for layer in (layer for plan in _layers(root, report, PLAN_JSON) for layer in plan):
        if layer["kind"].startswith(("Conv", "Linear")):
            before, _ = found.get(layer["name"], (layer["out_before"], 0))
            found[layer["name"]] = (before, layer["out_after"])
    rows = [(name, count(was), count(now), bar(now / was)) for name, (was, now) in found.items()]
    note = "Output channels of each layer in the teacher and in the student; the bar is the fraction kept."
    return [ReportTable("", ("Layer", "Teacher", "Student", ""), rows, text=(0, 3), note=note)] if rows else []


def layer_times(root: Path, report: Report) -> list[ReportTable]:
    """Return each layer's time before and after the last pruning to a latency, slowest first; empty if there was none."""
    layers = next(reversed(_layers(root, report, LATENCY_JSON)), [])
    most = max((max(layer["before_ms"], layer["after_ms"]) for layer in layers), default=0.0)
    rows = []
    for layer in sorted(layers, key=lambda layer: -float(layer["before_ms"])):
        before, after = ((significant(ms), bar(ms / most)) for ms in (layer["before_ms"], layer["after_ms"]))
        rows.append((layer["name"] or "all else", *before, *after))
    note = "Milliseconds of each layer in ONNX Runtime, with its activation and additions, before and after pruning."
    columns = ("Layer", "Before", "", "After", "")
    return [ReportTable("", columns, rows, text=(0, 2, 4), note=note)] if rows else []


def _layers(root: Path, report: Report, name: str) -> list[list[Json]]:
    """Return the layers in every stage's JSON file of this name."""
    paths = [root / stage["directory"] / name for stage in report["stages"]]
    return [json.loads(path.read_text(encoding="utf-8"))["layers"] for path in paths if path.exists()]
