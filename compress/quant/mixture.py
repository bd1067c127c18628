"""Which layers are faster in float: a minimum cut between each layer's float and integer time, where crossing over costs time too.

A segment is a layer with all that follows it up to the next layers. Its times come from ONNX Runtime's profiles of the float file and of
the file all in integers; both name a layer by its module path.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto
from onnx_ir.passes.common import ShapeInferencePass
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from compress.quant.rows import SpeedRow, TrialRow
from compress.quant.tuning import Trial, file_of
from export.onnx_file.names import module_of
from export.onnx_file.operators import DQ, LAYERS, Q
from export.onnx_file.targets import CPU
from export.onnx_file.wiring import Wiring, weights, wire
from export.runtime.latency import Ratio
from export.runtime.node_times import NodeTime, node_times

RUNS = 40
INPUT = ""  # the segment of what comes before every layer; it is float, as the images are
# Passes over a tensor at a border, in units of a Q or DQ: that node, the layout of the other side's convolutions, and from integers to
# float the guard that keeps ONNX Runtime from quantizing the float layer. Profiles of MobileNetV3-L in 1.32 have all three alike.
TO_INTEGERS, TO_FLOAT = 2, 3
WORTH = 0.95  # of the time all in integers: a file is built if the cut promises less
LEAST_MS = 0.5  # a profile counts whole microseconds, too coarse for the nodes of faster files
FAST = 2.0  # times as fast as FP32: no network that was measured gained from layers in float above 1.4
LEAST_INTEGER = 0.25  # of the layers; with fewer in integers, the float file itself is the better one


@dataclass(frozen=True)
class Border:
    """A tensor of `elements` numbers for one image that one segment reads from another."""

    source: str
    reader: str
    elements: int


def may_gain(row: TrialRow) -> bool:
    """Tell whether a trial's INT8 file is slow enough for layers in float to make it faster."""
    interval = row.get("latency_ci95")
    return interval is None or interval[0] < FAST


def repaired(
    base: Trial, float_file: Path, work: Path, judge: Callable[[Trial], TrialRow]
) -> tuple[list[SpeedRow], TrialRow | None]:
    """Return each layer's times, and the trial with `base`'s layers in float that are faster so; None where that promises too little."""
    rows, between, pass_ns = times_of_layers(
        onnx.load(float_file), onnx.load(file_of(base, work)), provider=CPU, threads=1
    )
    whole = sum(row["integer_ms"] for row in rows)
    floats = minimum_cut(rows, between, pass_ns) if whole > LEAST_MS else frozenset()
    crossing = sum(
        border.elements * pass_ns * (TO_FLOAT if border.reader in floats else TO_INTEGERS)
        for border in between
        if (border.source in floats or border.source == INPUT) != (border.reader in floats)
    )
    expected = sum(row["float_ms" if row["layer"] in floats else "integer_ms"] for row in rows) + crossing / 1e6
    if not floats or expected > WORTH * whole or len(floats) > (1 - LEAST_INTEGER) * len(rows):
        return rows, None
    rows = [{**row, "in_float": row["layer"] in floats} for row in rows]
    return rows, judge(replace(base, keep_float=tuple(sorted({*base.keep_float, *floats}))))


def said_faster(rows: Sequence[SpeedRow], gain: Ratio | None, *, won: bool) -> str:
    """Return what keeping layers in float for speed gave, in one line."""
    slower = sum(row["float_ms"] < row["integer_ms"] for row in rows)
    told = f"{slower} of {len(rows)} layers are faster in float"
    if gain is None:
        return f"{told}; no file with them in float promises enough"
    count, what = sum(row["in_float"] for row in rows), "kept" if won else "not kept"
    return f"{told}; with {count} in float the file is {gain.ratio:.2f} times as fast [{gain.low:.2f}, {gain.high:.2f}]: {what}"


def times_of_layers(
    float_file: ModelProto, integer_file: ModelProto, *, provider: str, threads: int
) -> tuple[list[SpeedRow], list[Border], float]:
    """Return the float and integer time of each segment, the tensors between them, and the nanoseconds a Q or DQ takes for a number."""
    files = [wire(model) for model in (float_file, integer_file)]
    profiles = [node_times(file.to_bytes(), provider=provider, threads=threads, runs=RUNS, each=True) for file in files]
    # Attention's products have no weights: they are no layers that could be named in keep_float.
    names = [{module_of(str(node.name)) for node in file.layers() if weights(node) is not None} for file in files]
    both = names[0] & names[1]
    owners = [segments(file, both) for file in files]
    in_float, in_integers = (_by_segment(profile, owner) for profile, owner in zip(profiles, owners, strict=True))
    rows = [
        SpeedRow(layer=name, float_ms=in_float.get(name, 0.0), integer_ms=in_integers.get(name, 0.0), in_float=False)
        for name in dict.fromkeys(owners[0].values())
        if name != INPUT
    ]
    pairs = [node for node in profiles[1] if node.operator in (Q, DQ) and node.elements]
    pass_ns = 1e6 * sum(node.milliseconds for node in pairs) / max(sum(node.elements for node in pairs), 1)
    return rows, list(borders(files[0], owners[0])), pass_ns


def segments(file: Wiring, layers: Collection[str]) -> dict[str, str]:
    """Return the layer, of the module paths `layers`, to whose segment each node of a file belongs."""
    found: dict[str, str] = {}
    for name, node in file.nodes.items():
        own = module_of(name)
        above = (value.producer() for value in node.inputs if value is not None)
        before = next(
            (found[str(maker.name)] for maker in above if maker is not None and str(maker.name) in found), None
        )
        if node.op_type in LAYERS and own in layers:
            found[name] = own
        elif before is not None or any(value is not None and value.is_graph_input() for value in node.inputs):
            found[name] = before or INPUT
    return found


def borders(file: Wiring, owner: Mapping[str, str]) -> Iterator[Border]:
    """Yield each tensor that a segment of the float file reads from another one, once for each reader."""
    single = file.model.clone()
    for given in single.graph.inputs:
        given.shape = ir.Shape([size if isinstance(size, int) else 1 for size in given.shape or ()])
    ShapeInferencePass(check_type=False, strict_mode=False)(single)
    seen: set[tuple[ir.Value, str]] = set()
    for node in single.graph:
        reader = owner.get(str(node.name))
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if value is None or reader is None or value.is_initializer() or (value, reader) in seen:
                continue
            source = INPUT if maker is None else owner.get(str(maker.name), reader)
            seen.add((value, reader))
            if source != reader and value.shape is not None and value.shape.is_static():
                yield Border(source, reader, prod(value.shape.numpy()))


def _by_segment(profile: Sequence[NodeTime], owner: Mapping[str, str]) -> dict[str, float]:
    """Return each segment's milliseconds; a node that the optimizer added counts to the one that ran before it."""
    found: dict[str, float] = {}
    here = INPUT
    for node in profile:
        here = owner.get(node.name, here)
        found[here] = found.get(here, 0.0) + node.milliseconds
    return found


def minimum_cut(rows: Sequence[SpeedRow], between: Sequence[Border], pass_ns: float) -> frozenset[str]:
    """Return the layers that are float where the sum of all layers' and borders' times is least (Greig et al. 1989)."""
    number = {row["layer"]: index for index, row in enumerate(rows)}
    floats, integers = len(rows), len(rows) + 1  # the two terminals
    number[INPUT] = floats
    arcs: dict[tuple[int, int], float] = {}

    def add(source: int, sink: int, nanoseconds: float) -> None:
        if source != sink:
            arcs[source, sink] = arcs.get((source, sink), 0.0) + nanoseconds

    for row in rows:  # an arc is cut where its start is float and its end in integers
        add(floats, number[row["layer"]], 1e6 * row["integer_ms"])
        add(number[row["layer"]], integers, 1e6 * row["float_ms"])
    for border in between:
        source, reader = number[border.source], number[border.reader]
        add(source, reader, TO_INTEGERS * pass_ns * border.elements)
        add(reader, source, TO_FLOAT * pass_ns * border.elements)
    size = len(rows) + 2
    capacity = coo_array(
        ([round(value) for value in arcs.values()], tuple(zip(*arcs, strict=True))), (size, size), dtype=np.int32
    ).tocsr()
    residual = capacity - maximum_flow(capacity, floats, integers).flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached = set(breadth_first_order(residual, floats, return_predecessors=False).tolist())
    return frozenset(row["layer"] for row in rows if number[row["layer"]] in reached)
