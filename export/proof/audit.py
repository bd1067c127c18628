"""Audit what really runs: the graph after ONNX Runtime's optimizer, not the one in the file."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx_ir as ir
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from export.errors import BundleError, first
from export.onnx_file.macs import macs
from export.onnx_file.model_file import parse
from export.onnx_file.names import ADDED, module_of
from export.onnx_file.operators import DQ, FLOAT, INTEGER, LAYERS, Q
from export.onnx_file.targets import CPU, CUDA
from export.onnx_file.wiring import Wiring, is_quantized, maker, origin, wire
from export.proof.optimized import FLOATS, MOVES, float_operators, leftover_qdq, optimize
from export.runtime.node_times import NodeTime, node_times

RUNS = 10  # of the profile that times what is left in float
AUDITED = {"cpu": CPU, "cuda": CUDA}  # other providers compile the graph, and ONNX Runtime cannot write it then


class Audit(TypedDict):
    """The optimized graph of one file on one provider; layers are convolutions and matrix products, named by module."""

    provider: str
    operators: dict[str, int]
    providers: dict[str, dict[str, int]]
    integer_layers: list[str]
    float_layers: list[str]
    float_fraction: float | None  # of the MACs; None if shapes are unknown
    leftover_qdq: list[str]  # except the Q at the input and the DQ at the output
    float_biases: list[str]  # of layers with integer weights
    quantized_by_runtime: list[str]  # float in the file, quantized with one scale for all channels on the full range
    float_initializer_mb: float
    copies: list[str]  # between the memories of two providers
    float_operators: dict[str, str]  # float operators that are not layers, by module
    reasons: dict[str, str]


class FloatTimes(TypedDict):
    """Milliseconds of one image in ONNX Runtime's CPU provider on one thread, by its profile: the whole file, and what runs in float by module."""

    whole: float
    modules: dict[str, float]


def audit(path: Path, provider: str = "cpu") -> Audit:
    """Optimize the file for `provider` (a key of AUDITED), and describe the result.

    Raises BundleError if the file is not an ONNX model or the provider is not available.
    """
    if provider not in AUDITED:
        raise BundleError(f"provider: must be one of {', '.join(AUDITED)}, got {provider!r}")
    file = wire(parse(path))
    try:
        runs = optimize(file.to_bytes(), AUDITED[provider])
        times = node_times(file.to_bytes(), provider=AUDITED[provider])
    except BundleError as error:
        raise BundleError(str(error).replace("the model", path.name, 1)) from error
    layers = {name: origin(node, file) for name, node in runs.nodes.items() if node.op_type in (*INTEGER, *FLOAT)}
    integer = [name for name in layers if runs.nodes[name].op_type in INTEGER]
    in_float = [name for name in layers if name not in integer]
    leftover = leftover_qdq(runs)
    floats = float_operators(runs)
    in_integers = {str(found.name): found for name in integer if (found := layers[name])}
    by_module: dict[str, str] = {}
    for node in floats:
        name = _label(origin(node, file), node.name)
        by_module[name] = f"{by_module[name]}, {node.op_type}" if name in by_module else node.op_type
    reasons: dict[str, str] = {}
    if any(node.op_type == Q for node in file.nodes.values()):
        for name, reason in why(file, [layers[name] for name in in_float], floats, leftover):
            reasons.setdefault(name, reason)  # in a module with several operators, the first is the cause
    return Audit(
        provider=provider,
        operators=dict(sorted(Counter(node.op_type for node in runs.nodes.values()).items())),
        providers=by_provider(times),
        integer_layers=[_label(layers[name], name) for name in integer],
        float_layers=[_label(layers[name], name) for name in in_float],
        float_fraction=float_fraction(macs(file), set(in_integers)),
        leftover_qdq=[_plain(node) for node in leftover],
        float_biases=[module_of(layer.name) for layer in file.layers() if has_float_bias(layer)],
        quantized_by_runtime=[module_of(name) for name, found in in_integers.items() if not is_quantized(found)],
        float_initializer_mb=sum(map(_float_bytes, runs.values.values())) / 1e6,
        copies=[name for name, node in runs.nodes.items() if node.op_type.startswith("Memcpy")],
        float_operators=by_module,
        reasons=reasons,
    )


def float_times(path: Path) -> FloatTimes:
    """Return what the float layers and operators of a file cost: each node's median over nine runs after a warm-up."""
    file = wire(parse(path))
    model = file.to_bytes()
    runs = optimize(model, CPU)
    floats = [*(node for node in runs.nodes.values() if node.op_type in FLOAT), *float_operators(runs)]
    names = {_plain(node): _label(origin(node, file), node.name) for node in floats}
    times = node_times(model, runs=RUNS)
    modules = dict.fromkeys(names.values(), 0.0)
    for node in times:
        if node.name in names and node.operator not in (Q, DQ):
            modules[names[node.name]] += node.milliseconds
    return FloatTimes(whole=sum(node.milliseconds for node in times), modules=modules)


def float_fraction(counts: dict[str, int] | None, in_integers: set[str]) -> float | None:
    """Return the fraction of the MACs that does not run in integers."""
    if not counts or not sum(counts.values()):
        return None
    return 1 - sum(counts[name] for name in in_integers) / sum(counts.values())


def in_float(found: Audit) -> float:
    """Return the fraction of the MACs that run in float, or of the layers if shapes are unknown."""
    if found["float_fraction"] is not None:
        return found["float_fraction"]
    return len(found["float_layers"]) / max(len(found["float_layers"]) + len(found["integer_layers"]), 1)


def has_float_bias(layer: ir.Node) -> bool:
    """Tell whether a layer with integer weights has a float bias."""
    bias = layer.inputs[2] if len(layer.inputs) > 2 and is_quantized(layer) else None
    return bias is not None and bias.is_initializer() and bias.dtype in FLOATS


def by_provider(times: list[NodeTime]) -> dict[str, dict[str, int]]:
    """Return the number of nodes of each operator that each provider ran."""
    counts = Counter((node.provider, node.operator) for node in times)
    found: dict[str, dict[str, int]] = {}
    for (provider, operator), count in sorted(counts.items()):
        found.setdefault(provider, {})[operator] = count
    return found


def why(
    file: Wiring, layers: list[ir.Node | None], operators: list[ir.Node], leftover: list[ir.Node]
) -> Iterator[tuple[str, str]]:
    """Yield the reason why each float layer, float operator and leftover Q/DQ node does not run in integers."""
    for node in [*layers, *(origin(node, file) for node in operators)]:
        if node is not None:
            yield module_of(node.name), _why_float(node)
    neighbours: dict[str, dict[str, None]] = {}  # the optimizer duplicates a node with two readers
    for node in leftover:
        around = _past_moves(node, ir.Node.successors if node.op_type == DQ else ir.Node.predecessors)
        labels = [f"{_label(origin(other, file), other.name)} ({other.op_type})" for other in around]
        neighbours.setdefault(_plain(node), {}).update(dict.fromkeys(labels))
    for node in leftover:
        names = " and ".join(neighbours[_plain(node)]) or "the end of the graph"
        yield _plain(node), f"{'feeds' if node.op_type == DQ else 'takes'} {names}, not in integers"


def _past_moves(node: ir.Node, neighbours: Callable[[ir.Node], Iterable[ir.Node]]) -> list[ir.Node]:
    """Return the nearest nodes in one direction that do more than move values."""
    found: list[ir.Node] = []
    for other in neighbours(node):
        found.extend(_past_moves(other, neighbours) if other.op_type in MOVES else [other])
    return found


def _why_float(node: ir.Node) -> str:
    if node.op_type in LAYERS and (weight := node.inputs[1]) is not None and weight.is_initializer():
        return "its weights are float in the file: it was not quantized"
    for value in filter(None, node.inputs):
        if not value.is_initializer() and maker(value) not in (DQ, "Constant"):
            made_by = value.producer()
            return f"its input comes in float from {made_by.name if made_by else value.name}"
    below, clip = node.successors(), ""
    while len(below) == 1 and below[0].op_type in ("Relu", "Clip"):
        below, clip = below[0].successors(), str(below[0].name)
    other = next((reader for reader in below if reader.op_type != Q), None)
    if other is not None or not below:
        return f"its output goes in float to {other.name if other else 'the end of the graph'}"
    if clip:
        return f"{clip} comes before its quantizer, whose grid is wider than {clip}'s range, so it is not dropped"
    return f"ONNX Runtime has no integer kernel for this {node.op_type}"


def over_limits(
    found: Audit, *, max_float_layers: int | None, max_float_fraction: float | None, max_leftover_qdq: int | None
) -> list[str]:
    """Return a sentence for each limit (None is no limit) that the file exceeds, with names and repair."""
    over: list[str] = []
    if max_float_layers is not None and len(found["float_layers"]) > max_float_layers:
        over.append(
            f"max_float_layers: at most {max_float_layers} may run in float, got {len(found['float_layers'])}: "
            f"{_named(found, found['float_layers'])}; quantize them or raise the limit"
        )
    if max_float_fraction is not None and in_float(found) > max_float_fraction:
        what = (
            "layers (their multiply-accumulates are not known)"
            if found["float_fraction"] is None
            else "multiply-accumulates"
        )
        over.append(
            f"max_float_fraction: at most {max_float_fraction:.2%} of the {what} may run in float, got {in_float(found):.2%}, "
            f"{len(found['float_layers'])} of {len(found['float_layers']) + len(found['integer_layers'])} layers: "
            f"{_named(found, found['float_layers'])}; quantize them or raise the limit"
        )
    if max_leftover_qdq is not None and len(found["leftover_qdq"]) > max_leftover_qdq:
        over.append(
            f"max_leftover_qdq: at most {max_leftover_qdq} Q/DQ nodes may stay between the ends, got {len(found['leftover_qdq'])}: "
            f"{_named(found, found['leftover_qdq'])}; quantize their neighbours, remove the pair, or raise the limit"
        )
    return over


def _named(found: Audit, names: list[str]) -> str:
    """Return the first names with their reasons."""
    return first([f"{name} ({found['reasons'][name]})" if name in found["reasons"] else name for name in names])


def _label(node: ir.Node | None, name: str | None) -> str:
    return module_of(node.name if node else name)


def _plain(node: ir.Node) -> str:
    return ADDED.sub("", str(node.name))


def _float_bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value and value.dtype == ir.DataType.FLOAT else 0
