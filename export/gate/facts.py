"""Facts of a file that no run changes: its size, its MACs, and the graph that ONNX Runtime optimizes it to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.onnx_file.macs import macs
from export.onnx_file.model_file import parse
from export.onnx_file.wiring import wire
from export.proof.audit import audit
from export.proof.saturation import modules, saturation_possible


@dataclass(frozen=True)
class Facts:
    """Facts of one file; operators and layers are from the optimized graph, layers named by module."""

    sha256: str
    bytes: int
    precision: str
    opset: int
    ir_version: int
    macs: int | None  # None if shapes are unknown
    operators: dict[str, int]
    integer_layers: list[str]
    float_layers: list[str]
    leftover_qdq: list[str]
    can_saturate: list[str]  # INT8 layers whose sums can saturate on a CPU without VNNI


def facts(path: Path, listed: Mapping[str, Any]) -> Facts:
    """Let ONNX Runtime optimize a file for the CPU; `listed` is bundle.json's entry, which the bundle's reader compared with the file.

    Raises BundleError for a file that cannot be used.
    """
    found, wiring = audit(path), wire(parse(path))
    counts = macs(wiring)
    return Facts(
        **{key: listed[key] for key in ("sha256", "bytes", "precision", "opset", "ir_version")},
        macs=None if counts is None else sum(counts.values()),
        operators=found["operators"],
        integer_layers=list(found["integer_layers"]),
        float_layers=list(found["float_layers"]),
        leftover_qdq=list(found["leftover_qdq"]),
        can_saturate=list(modules(saturation_possible(wiring))) if listed["precision"] == "int8" else [],
    )


def same_work(was: Facts, now: Facts, *, operators: bool) -> bool:
    """Tell whether two files should take the same time: equal MACs, equal precision and, if `operators`, equal operators."""
    return (was.macs, was.precision) == (now.macs, now.precision) and not (operators and was.operators != now.operators)
