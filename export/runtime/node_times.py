"""Where each node of a file runs and for how long, by ONNX Runtime's profiler."""

import json
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import BundleError
from export.onnx_file.names import ADDED
from export.onnx_file.targets import CPU
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.providers import runtime_named
from export.runtime.session import DTYPES, open_session


@dataclass(frozen=True)
class NodeTime:
    """One node of the optimized graph."""

    name: str
    operator: str
    provider: str
    milliseconds: float  # the median over the runs
    elements: int = 0  # of its output; 0 if unknown


def node_times(
    model: bytes, *, provider: str = CPU, threads: int = 1, runs: int = 1, each: bool = False
) -> list[NodeTime]:
    """Run `model` on one black image `runs` times and return its nodes' times; of several runs the first is a warm-up.

    `each`: nodes that the optimizer named alike are not put together, and their times are the least, which other processes disturb least.
    Raises BundleError if the network cannot run.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(
            model, runs_in=runtime_named(provider), threads=threads, profile_prefix=Path(folder, "profile")
        )
        (given,) = session.get_inputs()
        shape = [size if isinstance(size, int) else 1 for size in given.shape]
        image = np.zeros(shape, DTYPES[given.type])
        try:
            for _ in range(runs):
                session.run(None, {given.name: image})
        except RUNTIME_ERRORS as error:
            raise BundleError(f"input {shape}: the network cannot run on it ({first_line(error)})") from error
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name, args = ADDED.sub("", event["name"].removesuffix("_kernel_time")), event["args"]
            key = (name, args["op_name"], args["provider"], int(args["node_index"]) if each else 0)
            found.setdefault(key, []).append(event)
    times = []
    for (name, operator, where, _), ran in found.items():
        took = [event["dur"] / 1e3 for event in ran]
        shapes = [shape for given in ran[0]["args"].get("output_type_shape", [])[:1] for shape in given.values()]
        milliseconds = min(took) if each else float(np.median(took[1:] or took))
        times.append(NodeTime(name, operator, where, milliseconds, prod(shapes[0]) if shapes else 0))
    return times
