"""Where each node of a file runs and for how long, by ONNX Runtime's profiler."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

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


def node_times(model: bytes, *, provider: str = CPU, threads: int = 1, runs: int = 1) -> list[NodeTime]:
    """Run `model` on one black image `runs` times and return its nodes' times; of several runs the first is a warm-up.

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
    found: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = ADDED.sub("", event["name"].removesuffix("_kernel_time"))
            key = (name, event["args"]["op_name"], event["args"]["provider"])
            found.setdefault(key, []).append(event["dur"] / 1e3)
    return [NodeTime(*key, float(np.median(times[1:] or times))) for key, times in found.items()]
