"""The latency table: each layer's time at reduced widths as a fraction of its full-width time, for one machine, runtime and setting.

All runs below an `out` folder share one SQLite file. Rows are written as they are measured, so a killed run can resume; two runs
alternate, group by group, and each uses the other's rows.
"""

import fcntl
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime

from compress.errors import CompressError
from compress.pruning.costs import Layer
from compress.pruning.latency.nodes import Node, Piece, alone, read_nodes, signature
from export.errors import BundleError
from export.onnx_file.targets import host_instruction_sets
from export.runtime.conditions import Conditions
from export.runtime.environment import environment, fingerprint, runtime
from export.runtime.latency import time_sessions
from export.runtime.native import RUNTIME_ERRORS
from export.runtime.providers import Provider
from export.runtime.session import DTYPES, Run

SECONDS, BLOCKS = 0.024, 6  # timing of each width, interleaved with the others of its group
GROUP_BYTES = 256 * 2**20  # weights of the models that are interleaved
PATIENCE_S = 10.0  # between two progress messages
SCHEMA = """CREATE TABLE IF NOT EXISTS times (setting TEXT, block TEXT, inputs INTEGER, outputs INTEGER, fraction REAL,
            PRIMARY KEY (setting, block, inputs, outputs))"""

FAILURES: tuple[type[Exception], ...] = (BundleError, *RUNTIME_ERRORS)
Widths = tuple[int, int]  # inputs and outputs
Timer = Callable[[dict[Widths, bytes], Conditions], dict[Widths, float]]


@dataclass(frozen=True)
class Wanted:
    """A layer's piece of the file, or None if it cannot be cut out, and the widths at which to time it."""

    piece: Piece | None
    layer: Layer
    widths: tuple[Widths, ...]


def time_models(models: dict[Widths, bytes], conditions: Conditions) -> dict[Widths, float]:
    """Return each model's time over the last model's: the median of the ratios within interleaved blocks."""
    runs = {str(widths): _bound(model, conditions) for widths, model in models.items()}
    last = str(next(reversed(models)))
    timed = time_sessions(runs, seconds=SECONDS, blocks=BLOCKS, clock=conditions.clock(runs[last]))
    whole = timed[last].block_ms
    return {widths: float(np.median(timed[str(widths)].block_ms / whole)) for widths in models}


@dataclass(frozen=True)
class Grid:
    """The widths to time: how many of outputs, where time rises in steps, and of inputs, where it rises linearly."""

    outputs: int
    inputs: int
    opening_s: float  # a session; a plugin compiles the piece
    tile: int = 1  # channels that the provider computes at once; widths are multiples of it

    def widths(self, full: int, levels: int, round_to: int) -> list[int]:
        """Return about `levels` evenly spaced multiples of `round_to`, of the tile too where two or more fit, and the full width."""
        unit = math.lcm(round_to, self.tile) if full >= 2 * self.tile else round_to
        step = -(-full // (levels * unit)) * unit
        return [*range(step, full, step), full]


BUILT_IN = Grid(outputs=16, inputs=5, opening_s=0.008)


def grid_for(provider: Provider) -> Grid:
    """Return the widths to time in a provider.

    AMX's tiles have 16 rows of 64 bytes: a ResNet-50 cut to half of its MACs took 8.5 ms in OpenVINO in widths of eights, 7.1 in 32s,
    6.2 in 64s.
    """
    if provider.plugin is None:
        return BUILT_IN
    return Grid(outputs=8, inputs=3, opening_s=0.2, tile=32 if "amx_int8" in host_instruction_sets() else 1)


class Table:
    """The latency table for this machine, ONNX Runtime and conditions, filled by `timer`; creates its folder."""

    def __init__(self, folder: Path, conditions: Conditions, timer: Timer = time_models) -> None:
        self.folder, self.conditions, self.timer, self.path = folder, conditions, timer, folder / "times.sqlite"
        facts = [fingerprint(environment()), runtime()["onnxruntime"], conditions.provider, conditions.threads]
        facts += [conditions.arithmetic] if conditions.arithmetic != "f32" else []
        self.grid = grid_for(conditions.runs_in.provider)
        self.setting = json.dumps(facts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()):
                pass
        except OSError as error:
            raise CompressError(f"{folder}: cannot be written ({error.strerror}): choose another OUT=") from error

    def read(self, block: str) -> dict[Widths, float]:
        """Return the measured fractions of a node, named by its signature."""
        query = "SELECT inputs, outputs, fraction FROM times WHERE setting = ? AND block = ?"
        with closing(self._connect()) as file:
            return {(i, o): fraction for i, o, fraction in file.execute(query, (self.setting, block))}

    def write(self, block: str, fractions: dict[Widths, float]) -> None:
        """Store measured fractions of a node."""
        rows = [(self.setting, block, *widths, fraction) for widths, fraction in fractions.items()]
        with closing(self._connect()) as file, file:
            file.executemany("INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock for measuring, after waiting for other runs; a killed process releases it."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _connect(self) -> sqlite3.Connection:
        file = sqlite3.connect(self.path, timeout=60)
        try:
            file.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            file.close()
            raise CompressError(f"{self.path}: cannot be used as a table of times ({error}): remove it") from error
        return file


def widths_to_time(
    layer: Layer, grid: Grid, *, round_to: int, cut_inputs: bool, cut_outputs: bool
) -> tuple[Widths, ...]:
    """Return the widths at which to time a layer, varying only the sides that can be cut."""
    outputs = grid.widths(layer.outputs, grid.outputs, round_to) if cut_outputs else [layer.outputs]
    if layer.depthwise:
        return tuple((width, width) for width in outputs)
    inputs = grid.widths(layer.inputs, grid.inputs, round_to) if cut_inputs else [layer.inputs]
    return tuple((i, o) for i in inputs for o in outputs)


def fill(
    table: Table, wanted: Sequence[Wanted], *, tell: Callable[[str], None]
) -> tuple[list[dict[Widths, float]], int]:
    """Return each node's fractions of its full-width time at the wanted widths, and how many of them were timed now."""
    keys = [_key(one, table.conditions.batch) for one in wanted]
    groups = dict(zip(keys, wanted, strict=True))  # layers of one shape are timed once
    missing = {key: len(set(one.widths) - table.read(key).keys()) for key, one in groups.items()}
    left, done, started = sum(missing.values()), 0, time.monotonic()
    if left:
        expected_s = left * (1.1 * SECONDS + table.grid.opening_s)
        total = sum(len(one.widths) for one in groups.values())
        tell(f"latency table {table.path}: {left:,} of {total:,} layer widths to time, about {expected_s:,.0f} s")
    told = started
    for key, one in groups.items():
        for part in _parts(one) if missing[key] else ():
            with table.turn():
                absent = [widths for widths in part if widths not in table.read(key)]
                table.write(key, _measure(one, absent, table) if absent else {})
            done += len(absent)
            if time.monotonic() - told > PATIENCE_S:
                told = time.monotonic()
                tell(f"latency table: {done:,} timed, about {(told - started) / done * (left - done):,.0f} s left")
    known = {key: table.read(key) for key in groups}
    return [{widths: known[key][widths] for widths in groups[key].widths} for key in keys], done


def _key(one: Wanted, batch: int) -> str:
    """Return the name of a piece's rows; of a layer that cannot be cut out they are fractions of MACs."""
    if one.piece is None:
        return f"macs {one.layer.kind} {one.layer.inputs} {one.layer.outputs}"
    return signature(one.piece, one.layer, batch)


def timed_nodes(path: Path, layers: Sequence[Layer], conditions: Conditions) -> list[Node]:
    """Return the nodes of a file that take time, and its layers.

    Of a layer that the provider compiled into something larger, the time is its piece's own; pieces of one shape are timed once.
    """
    nodes = read_nodes(path, layers, conditions)
    models: dict[str, bytes] = {}
    keys: dict[str, str] = {}
    for node in nodes:
        if math.isnan(node.ms) and node.piece is not None and node.layer is not None:
            layer, (inputs, outputs) = layers[node.layer], node.piece.widths
            keys[node.name] = signature(node.piece, layer, conditions.batch)
            models[keys[node.name]] = alone(node.piece, layer, inputs=inputs, outputs=outputs, batch=conditions.batch)
    times = {}
    for key, model in models.items():
        run = _bound(model, conditions)
        timed = time_sessions({key: run}, seconds=SECONDS, blocks=BLOCKS, clock=conditions.clock(run))
        times[key] = float(np.median(timed[key].block_ms))
    return [replace(one, ms=times.get(keys.get(one.name, ""), 0.0)) if math.isnan(one.ms) else one for one in nodes]


def _measure(one: Wanted, widths: Sequence[Widths], table: Table) -> dict[Widths, float]:
    """Return the fractions at some widths, timed interleaved with the full one; fractions of MACs if the node cannot run alone."""
    layer, full = one.layer, (one.layer.inputs, one.layer.outputs)
    models: dict[Widths, bytes] = {}
    for i, o in (*(other for other in widths if other != full), full):
        if one.piece is not None:
            models[i, o] = alone(one.piece, layer, inputs=i, outputs=o, batch=table.conditions.batch)
    if full in models:
        try:
            timed = table.timer(models, table.conditions)
        except FAILURES:
            timed = {}
        if timed:
            return {other: timed[other] for other in widths}
    return {(i, o): o / full[1] * (1 if layer.depthwise else i / full[0]) for i, o in widths}


def _parts(one: Wanted) -> Iterator[list[Widths]]:
    """Yield the widths in groups of about GROUP_BYTES of weights."""
    whole = 0 if one.piece is None else len(one.piece.weights.raw_data)
    part: list[Widths] = []
    size = 0.0
    for i, o in one.widths:
        part.append((i, o))
        size += whole * i / one.layer.inputs * o / one.layer.outputs
        if size > GROUP_BYTES:
            yield part
            part, size = [], 0.0
    if part:
        yield part


def _bound(model: bytes, conditions: Conditions) -> Run:
    """Return a function that runs a model once, with its buffers on the device."""
    session = conditions.open(model)
    device, rng = conditions.runs_in.provider.device, np.random.default_rng(0)
    binding = session.io_binding()
    for given in session.get_inputs():
        values = rng.integers(0, 100, given.shape).astype(DTYPES[given.type])
        binding.bind_ortvalue_input(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run()
    return run
