"""Turn a float network into one that trains for INT8 (`prepare`), steer its phases, and turn that into its deployed form (`deploy`)."""

import copy
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from compress.errors import ModelError
from compress.quant.deployed import DeployedQuantizer, DeployedSameRange, DeployedWeights, FloatGuard, depthwise, fold
from compress.quant.fake_quant import (
    ActivationQuantizer,
    HardSigmoidQuantizer,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    Ranges,
    SameRange,
)
from compress.quant.placement import (
    CLIPS,
    LAYERS,
    NORMS,
    is_kernel,
    is_quantized,
    is_quantizer,
    keeps_range,
    place_quantizers_,
    runs_in_integers,
)
from compress.quant.rewrite import traced
from compress.quant.trace import called
from export.targets import Target

PLAIN = (nn.Conv2d, nn.Linear)
# Shapes and sizes: they compute nothing from the tensors.
SILENT = (SameRange, getattr, "size", "dim", operator.floordiv)


def prepare(
    model: nn.Module, target: Target, *, ranges: Ranges = "moving_average", keep_float: Collection[str] = ()
) -> fx.GraphModule:
    """Return a copy of the float model with fake-quantized weights and activations; module paths stay as they are.

    `ranges` says how scales are found: measured, or learned with the weights (LSQ). `keep_float` holds shell patterns of the layers' paths
    that stay plain. Raises ModelError where the network cannot be traced, uses a layer twice, or has no layer that a pattern names.
    """
    graph = traced(model)
    _refuse_shared_layers(graph)
    kept = _matching(groups(graph), keep_float)
    for name, module in graph.named_modules():
        if type(module) in PLAIN and name not in kept:
            module.__class__ = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
            assert isinstance(module, QuantLayer)
            module.quantize_(target, ranges)
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False  # a residual may still read the unclipped tensor's quantized copy
    place_quantizers_(graph, target, ranges)
    return graph


def groups(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the layers that can be quantized, or are, in the order they run."""
    graph = model if isinstance(model, fx.GraphModule) else traced(model)
    return tuple(str(node.target) for node in graph.graph.nodes if called(graph, node) in (*PLAIN, *LAYERS))


def quantizers(model: nn.Module) -> Iterator[ActivationQuantizer]:
    """Yield every activation quantizer of a prepared model."""
    return (module for module in model.modules() if isinstance(module, ActivationQuantizer))


def set_phase_(model: nn.Module, *, observing: bool, quantizing: bool) -> None:
    """Switch a prepared model's quantizers: calibration observes only, training does both, then only quantizes."""
    for quantizer in quantizers(model):
        quantizer.observing, quantizer.quantizing = observing, quantizing


def quantize_only_(prepared: nn.Module, names: Collection[str] | None) -> None:
    """Let only the named layers round their weights, and the activations computed from them up to the next layer; None is all."""
    for name, module in prepared.named_modules():
        if isinstance(module, QuantLayer):
            module.quantizing = names is None or name in names
        elif isinstance(module, ActivationQuantizer):
            module.quantizing = names is None or module.group in names


def freeze_batchnorm_(model: nn.Module) -> None:
    """Let batch-norms use their running statistics from now on, also in training mode; scale and shift keep learning."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


@torch.no_grad()
def reestimate_batchnorm_(prepared: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure batch-norms' statistics anew, as the plain mean over `batches`, with the rounding that is deployed; leave eval mode."""
    prepared.eval()
    norms = [module for module in prepared.modules() if isinstance(module, NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for batch in batches:
        prepared(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    prepared.eval()


def deploy(prepared: fx.GraphModule) -> fx.GraphModule:
    """Return the prepared model with batch-norms folded, int8 weights, int32 biases and Q/DQ pairs, ready for export."""
    graph = copy.deepcopy(prepared).eval().cpu()
    integer = {node.name for node in prepared.graph.nodes if runs_in_integers(prepared, node)}
    source: dict[fx.Node, DeployedQuantizer] = {}
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        before = node.all_input_nodes[0] if node.all_input_nodes else None
        if isinstance(module, ActivationQuantizer):
            source[node] = DeployedQuantizer(module)
            graph.set_submodule(str(node.target), source[node])
        elif before in source and (isinstance(module, SameRange) or keeps_range(graph, node)):
            source[node] = source[before]
            if isinstance(module, SameRange):
                graph.set_submodule(str(node.target), DeployedSameRange(source[node]))
        elif isinstance(module, (QuantConv2d, QuantLinear)):
            assert before is not None
            folded = fold(module, _fold_norm(graph, node))
            deployed = DeployedWeights(module, folded, source[before], _output_scale(graph, node))
            graph.set_submodule(str(node.target), deployed)
        elif type(module) in PLAIN and before in source:
            graph.add_submodule(f"float_guard_{node.name}", FloatGuard(source[before]))
            with graph.graph.inserting_before(node):
                guard = graph.graph.call_module(f"float_guard_{node.name}", (before,))
            node.replace_input_with(before, guard)
        elif isinstance(module, nn.BatchNorm2d) and node.name in integer:
            assert before is not None
            folded = depthwise(module, source[before].target)
            deployed = DeployedWeights(None, folded, source[before], _output_scale(graph, node))
            graph.set_submodule(str(node.target), deployed)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def float_on_purpose(prepared: fx.GraphModule) -> dict[str, str]:
    """Return why each operation that runs in float does, by its module's path or its node's name."""
    reasons: dict[str, str] = {}
    for node in prepared.graph.nodes:
        what = called(prepared, node)
        if node.op in ("placeholder", "output", "get_attr") or what in SILENT or what in LAYERS:
            continue
        if what is HardSigmoidQuantizer and is_quantized(prepared, node.all_input_nodes[0]):
            reasons[str(node.target)] = "its pair of DequantizeLinear and QuantizeLinear is the hard sigmoid itself"
        elif keeps_range(prepared, node) or is_quantizer(prepared, node) or runs_in_integers(prepared, node):
            continue
        elif not (node.all_input_nodes and _taken_along(prepared, node)):
            name = str(node.target) if node.op == "call_module" else node.name
            reasons[name] = _reason(prepared, node)
    return reasons


def _reason(graph: fx.GraphModule, node: fx.Node) -> str:
    what = called(graph, node)
    if what in PLAIN:
        return "keep_float names it"
    if not is_kernel(graph, node):
        kind = what if isinstance(what, str) else getattr(what, "__name__", str(what))
        return f"ONNX Runtime has no integer kernel for {kind}"
    if any(not is_quantized(graph, source) for source in node.all_input_nodes):
        return "an input is float"
    return "nothing behind it reads integers"


def _taken_along(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a batch-norm or a clip belongs to the integer operation before it."""
    before = node.all_input_nodes[0]
    if called(graph, node) in CLIPS and called(graph, before) in NORMS:
        return runs_in_integers(graph, before) or _taken_along(graph, before)
    if called(graph, node) in NORMS or called(graph, node) in CLIPS:
        return called(graph, before) in LAYERS or runs_in_integers(graph, before)
    return False


def _output_scale(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Return the scale of the grid that an integer layer writes to, through a clip that the grid contains."""
    users = list(node.users)
    if len(users) == 1 and called(graph, users[0]) in CLIPS:
        return _output_scale(graph, users[0])
    if len(users) == 1 and is_quantizer(graph, users[0]):
        quantizer = graph.get_submodule(str(users[0].target))
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer.scale_and_zero_point()[0]
    return None


def _fold_norm(graph: fx.GraphModule, node: fx.Node) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
    """Take the batch-norm behind a layer out of the graph and return it, if there is one that nobody else reads past."""
    users = list(node.users)
    if len(users) != 1 or called(graph, users[0]) not in NORMS:
        return None
    norm = graph.get_submodule(str(users[0].target))
    assert isinstance(norm, NORMS)
    users[0].replace_all_uses_with(node)
    graph.graph.erase_node(users[0])
    return norm


def _matching(names: tuple[str, ...], patterns: Collection[str]) -> set[str]:
    """Return the names that a pattern matches.

    Raises ModelError for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(f"keep_float: {pattern} names no convolution or linear layer; they are {', '.join(names)}")
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _refuse_shared_layers(graph: fx.GraphModule) -> None:
    """Refuse a convolution or linear layer that runs twice: its inputs have two grids, its int32 bias can only have one."""
    shared = [name for name, uses in Counter(groups(graph)).items() if uses > 1]
    if shared:
        uses = groups(graph).count(shared[0])
        raise ModelError(f"{shared[0]}: runs {uses} times in one forward; give each use a layer of its own")
