"""Turn a float network into one that trains for INT8 (`prepare`), steer its phases, and turn that into its deployed form (`deploy`).

A quantizer stands where ONNX Runtime wants a Q/DQ pair so that the optimized graph runs integer kernels: on the input, behind every
convolution or linear layer with its batch-norm and ReLU, behind additions, concatenations and average pools. Max-pools and reshapes keep
their input's grid. The network's output stays float.
"""

import copy
import math
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from compress.errors import ModelError
from compress.quant.fake_quant import (
    ActivationQuantizer,
    DeployedQuantizer,
    DeployedWeights,
    QuantConv2d,
    QuantLinear,
    SameRange,
)
from export.targets import Target

CLIPS: dict[object, float] = {nn.ReLU: math.inf, F.relu: math.inf, torch.relu: math.inf, nn.ReLU6: 6.0, F.relu6: 6.0}
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
JOINS = (torch.cat, torch.concat)
MEANS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, "mean")
KEEP_RANGE = (nn.MaxPool2d, nn.Flatten, F.max_pool2d, torch.flatten, "flatten", torch.reshape, "reshape", "view", "contiguous",
              "permute", torch.permute, "transpose", torch.transpose, "chunk", torch.chunk, operator.getitem)  # fmt: skip
NO_OPS = (nn.Dropout, nn.Identity, nn.Dropout2d, F.dropout)


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the model as a graph of its own modules; dropouts and identities are gone.

    Raises ModelError where the forward depends on values and cannot be one graph.
    """
    try:
        graph = fx.symbolic_trace(copy.deepcopy(model))
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__}: its forward cannot be traced into one graph ({error}); "
            "write it without branches on tensor values, or leave out the qat stage"
        ) from error
    for node in list(graph.graph.nodes):
        if _what(graph, node) in NO_OPS:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif _is_global_mean(node):
            # Pool and flatten apart: the pool has an integer kernel, and its Q/DQ pair must stand right behind it.
            with graph.graph.inserting_before(node):
                pooled = graph.graph.call_function(F.adaptive_avg_pool2d, (node.args[0], 1))
                node.replace_all_uses_with(graph.graph.call_function(torch.flatten, (pooled, 1)))
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def prepare(model: nn.Module, target: Target) -> fx.GraphModule:
    """Return a copy of the float model with fake-quantized weights and activations; module paths stay as they are.

    Raises ModelError where the network cannot be traced, or uses a layer twice.
    """
    graph = trace(model)
    _refuse_shared_layers(graph)
    for module in graph.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.__class__ = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
            module.target = target  # type: ignore[assignment]
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False  # a residual may still read the unclipped tensor's quantized copy
    output = next(node for node in graph.graph.nodes if node.op == "output")
    for node in list(graph.graph.nodes):
        what = _what(graph, node)
        if what in KEEP_RANGE:
            _insert_after(graph, node, SameRange(), f"same_range_{node.name}")
        elif node.op == "placeholder" or _computes(what, node):
            end, cap = _end_of_chain(graph, node)
            if end not in output.all_input_nodes:
                _insert_after(graph, end, ActivationQuantizer(target, cap=cap), f"quantizer_{node.name}")
    # Behind operators that have no integer kernel the next layer still needs its grid.
    for node in list(graph.graph.nodes):
        if _what(graph, node) in (QuantConv2d, QuantLinear) and not _is_quantized(graph, node.all_input_nodes[0]):
            before = node.all_input_nodes[0]
            _insert_after(graph, before, ActivationQuantizer(target), f"quantizer_{before.name}")
    graph.graph.lint()
    graph.recompile()
    return graph


def _refuse_shared_layers(graph: fx.GraphModule) -> None:
    """Refuse a convolution or linear layer that runs twice: its inputs have two grids, its int32 bias can only have one."""
    calls = [str(node.target) for node in graph.graph.nodes if _what(graph, node) in (nn.Conv2d, nn.Linear)]
    shared = [name for name, uses in Counter(calls).items() if uses > 1]
    if shared:
        raise ModelError(
            f"{shared[0]}: runs {calls.count(shared[0])} times in one forward; give each use a layer of its own"
        )


def quantizers(model: nn.Module) -> Iterator[ActivationQuantizer]:
    """Yield every activation quantizer of a prepared model."""
    return (module for module in model.modules() if isinstance(module, ActivationQuantizer))


def set_phase_(model: nn.Module, *, observing: bool, quantizing: bool) -> None:
    """Switch a prepared model's quantizers: calibration observes only, training does both, then only quantizes."""
    for quantizer in quantizers(model):
        quantizer.observing, quantizer.quantizing = observing, quantizing


def freeze_batchnorm_(model: nn.Module) -> None:
    """Let batch-norms use their running statistics from now on, also in training mode; scale and shift keep learning."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


def deploy(prepared: fx.GraphModule) -> fx.GraphModule:
    """Return the prepared model with batch-norms folded, int8 weights, int32 biases and Q/DQ pairs, ready for export."""
    graph = copy.deepcopy(prepared).eval().cpu()
    _fold_batchnorms_(graph)
    scales: dict[fx.Node, Tensor] = {}
    replaced: dict[str, nn.Module] = {}
    source: dict[fx.Node, DeployedQuantizer] = {}
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            source[node] = DeployedQuantizer(module)
            replaced[str(node.target)] = source[node]
        elif isinstance(module, SameRange):
            quantizer = next((source[n] for n in _upstream(node) if n in source), None)
            if quantizer is not None:
                replaced[str(node.target)] = source[node] = quantizer
        elif isinstance(module, (QuantConv2d, QuantLinear)):
            scales[node] = source[node.all_input_nodes[0]].scale
            replaced[str(node.target)] = DeployedWeights(module, scales[node], module.target)
    for name, module in replaced.items():
        graph.set_submodule(name, module)
    graph.recompile()
    return graph


def _what(graph: fx.GraphModule, node: fx.Node) -> object:
    """Return what a node calls: a module's class, a function, or a method's name."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else None


def _is_global_mean(node: fx.Node) -> bool:
    """Tell whether a node is the mean over height and width that drops both dimensions."""
    if node.target not in (torch.mean, "mean") or node.kwargs.get("keepdim", False) or len(node.args) > 2:
        return False
    axes = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    return isinstance(axes, tuple | list) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]


def _is_quantized(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a tensor lies on a quantizer's grid, be it behind pools and reshapes that keep it."""
    while _what(graph, node) is SameRange or _what(graph, node) in KEEP_RANGE:
        node = node.all_input_nodes[0]
    return _what(graph, node) is ActivationQuantizer


def _computes(what: object, node: fx.Node) -> bool:
    """Tell whether a node makes a new range that an integer kernel can produce."""
    if what in ADDS:
        return len(node.all_input_nodes) == 2
    return what in (QuantConv2d, QuantLinear) or what in JOINS or what in MEANS


def _end_of_chain(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, float]:
    """Follow batch-norm and ReLU as long as nobody else reads in between; return the last node and ReLU6's bound."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        what = _what(graph, user)
        if what in CLIPS:
            return user, CLIPS[what]
        if what not in NORMS:
            break
        node = user
    return node, math.inf


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the chain of first inputs above a node."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def _insert_after(graph: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> None:
    graph.add_submodule(name, module)
    with graph.graph.inserting_after(node):
        inserted = graph.graph.call_module(name, (node,))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)


def _fold_batchnorms_(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if _what(graph, node) not in NORMS:
            continue
        before = node.all_input_nodes[0]
        if _what(graph, before) not in (QuantConv2d, QuantLinear) or len(before.users) > 1:
            continue
        layer, norm = graph.get_submodule(str(before.target)), graph.get_submodule(str(node.target))
        assert isinstance(norm, NORMS)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        graph.set_submodule(str(before.target), fuse(layer, norm))  # type: ignore[type-var]
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
