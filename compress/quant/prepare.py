"""Turn a float network into one that trains for INT8 (`prepare`), switch its phases, and convert it for export (`deploy`)."""

import copy
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, fx, nn

from compress.errors import matching
from compress.quant.deployed import DeployedQuantizer, DeployedSameRange, FloatGuard
from compress.quant.fake_quant import ActivationQuantizer, HardSigmoidQuantizer, JoinRange, Phase, Ranges, SameRange
from compress.quant.graph.placement import (
    CLIPS,
    JOINS,
    LAYERS,
    NORMS,
    is_kernel,
    is_quantized,
    is_quantizer,
    keeps_range,
    only_user,
    place_quantizers_,
    runs_in_integers,
)
from compress.quant.graph.rewrite import traced
from compress.quant.graph.trace import called, is_end, name_of
from compress.quant.layers import (
    Kernel,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    QuantNorm,
    QuantNorm1d,
    QuantNorm2d,
    is_expectation,
)
from export.onnx_file.targets import Target

PLAIN = (nn.Conv2d, nn.Linear)
QUANTIZED_NORMS: dict[type, type[QuantNorm]] = {nn.BatchNorm1d: QuantNorm1d, nn.BatchNorm2d: QuantNorm2d}
# ONNX Runtime runs a softmax between Q/DQ pairs as QLinearSoftmax, which is four times slower (0.25 instead of 0.065 ms on 3 x 197 x 197
# in 1.32, one thread), with up to 6 % of its levels off by one.
RUNTIME_ROUNDS = (torch.ops.aten.softmax.int,)
SQUASHES = (torch.sigmoid, torch.ops.aten.softmax.int, torch.ops.aten.exp.default)
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, torch.ops.aten.sub.Tensor, torch.ops.aten.div.Tensor,
              torch.ops.aten.unflatten.int, torch.ops.aten.unbind.int, torch.ops.aten.stack.default)  # fmt: skip
# Markers and sizes, which compute nothing.
SILENT = (SameRange, JoinRange, "size", "pack")


def prepare(
    model: nn.Module,
    target: Target,
    images: Tensor,
    *,
    ranges: Ranges = "moving_average",
    keep_float: Collection[str] = (),
) -> fx.GraphModule:
    """Return a copy of the float model with fake-quantized weights and activations; module paths do not change.

    Of `images` (n, channels, h, w) only the shape matters. `ranges`: scales are measured, or learned with the weights (LSQ). `keep_float`:
    shell patterns of layer paths that stay float; `heads` stay float anyway. A layer that runs twice gets a copy for the second run.
    Raises ModelError if the network cannot be traced, or no layer matches a pattern.
    """
    graph = traced(model, images)
    _split_shared_layers_(graph)
    kept = {*matching("qat.keep_float", keep_float, groups(graph)), *heads(graph), *of_chosen_rows(graph)}
    for name, module in graph.named_modules():
        if type(module) in PLAIN and name not in kept:
            module.__class__ = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
            assert isinstance(module, QuantLayer)
            module.quantize_(target, ranges)
        elif type(module) in QUANTIZED_NORMS:
            module.__class__ = QUANTIZED_NORMS[type(module)]
            module.kernel = None
    place_quantizers_(graph, target, ranges)
    _link_kernels_(graph)
    return graph


def groups(graph: fx.GraphModule) -> tuple[str, ...]:
    """Return the paths of a traced network's layers that can be or are quantized, in the order they run."""
    return tuple(str(node.target) for node in graph.graph.nodes if called(graph, node) in (*PLAIN, *LAYERS))


def heads(graph: fx.GraphModule) -> tuple[str, ...]:
    """Return the paths of convolutions at the network's output, and of layers that are only moved, clipped and joined on the way there.

    Such are the last convolutions of a U-Net or a detector, also where a sigmoid or softmax, arithmetic and fixed convolutions follow. No
    integer kernel reads them, and quantizing them would round the predictions. A linear layer that is the output itself is none of them: its
    integer kernel can write floats.
    """
    # ends: only these lie between the node and the output. joined: at least one of them is a join, or squashes a convolution's values.
    ends = {node: node.op == "output" for node in graph.graph.nodes}
    joined = dict.fromkeys(ends, False)
    for node in reversed(graph.graph.nodes):
        if node.op == "output":
            continue
        moves = [
            is_end(graph, user)
            or called(graph, user) in (*JOINS, *CLIPS)
            or keeps_range(graph, user)
            or _scales(graph, user)
            for user in node.users
        ]
        ends[node] = bool(moves) and all(moves) and all(ends[user] for user in node.users)
        joined[node] = any(joined[user] or called(graph, user) in (*JOINS, *SQUASHES) for user in node.users)
        joined[node] |= called(graph, node) is nn.Conv2d and all(is_end(graph, user) for user in node.users)
    return tuple(str(node.target) for node in ends if called(graph, node) in PLAIN and ends[node] and joined[node])


def _scales(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node is arithmetic or squashes values, or a fixed convolution; a gate such as SiLU, which is an activation, is none."""
    what, before = called(graph, node), node.all_input_nodes
    if what is nn.Conv2d:
        return is_expectation(graph.get_submodule(str(node.target)))
    gates = what is operator.mul and any(set(one.all_input_nodes) & set(before) for one in before)
    return what in (*SQUASHES, *ARITHMETIC) and not gates


def of_chosen_rows(graph: fx.GraphModule) -> tuple[str, ...]:
    """Return the paths of layers that run only on rows that top-k chose, as a detector's decoder on its queries.

    They refine few rows' boxes in small steps, which rounding destroys, and are little of the work.
    """
    behind = dict.fromkeys(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default), True)
    for node in graph.graph.nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind[node] = True
    return tuple(str(node.target) for node in behind if called(graph, node) in PLAIN)


def quantizers(model: nn.Module) -> Iterator[ActivationQuantizer]:
    """Yield every activation quantizer of a prepared model."""
    return (module for module in model.modules() if isinstance(module, ActivationQuantizer))


def set_phase_(model: nn.Module, phase: Phase) -> None:
    """Set the phase of a prepared model's activation quantizers."""
    for quantizer in quantizers(model):
        quantizer.phase = phase


def quantize_only_(prepared: nn.Module, names: Collection[str] | None) -> None:
    """Round only the named layers' weights, and their activations up to the next layer; None means all layers."""
    for name, module in prepared.named_modules():
        if isinstance(module, QuantLayer):
            module.quantizing = names is None or name in names
        elif isinstance(module, ActivationQuantizer):
            module.phase = "round" if names is None or module.group in names else "observe"


def freeze_batchnorm_(model: nn.Module) -> None:
    """Make batch-norms use their running statistics in training too; scale and shift keep learning."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


@torch.no_grad()
def reestimate_batchnorm_(prepared: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute batch-norm statistics as the plain mean over `batches`, with deployed rounding; the model ends in eval mode."""
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
    source: dict[fx.Node, DeployedQuantizer] = {}
    for node in list(graph.graph.nodes):
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        before = node.all_input_nodes[0] if node.all_input_nodes else None
        if isinstance(module, ActivationQuantizer):
            source[node] = DeployedQuantizer(module)
            graph.set_submodule(str(node.target), source[node])
        elif isinstance(module, JoinRange):
            source[node] = DeployedQuantizer(module.quantizer)
            graph.set_submodule(str(node.target), source[node])
        elif before in source and (isinstance(module, SameRange) or keeps_range(graph, node)):
            source[node] = source[before]
            if isinstance(module, SameRange):
                graph.set_submodule(str(node.target), DeployedSameRange(source[node]))
        elif isinstance(module, QuantLayer | QuantNorm) and module.kernel is not None:
            if module is module.kernel.start:
                deployed = module.kernel.deployed()
                for name, child in module.named_children():  # a layer's path may lead on: attention, attention.out_proj
                    if not hasattr(deployed, name):
                        deployed.add_module(name, child)
                graph.set_submodule(str(node.target), deployed)
            else:  # the layer before it has fused the batch-norm
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.graph.erase_node(node)
        elif before in source and (type(module) in PLAIN or called(graph, node) in RUNTIME_ROUNDS):
            graph.add_submodule(f"float_guard_{node.name}", FloatGuard(source[before]))
            with graph.graph.inserting_before(node):
                guard = graph.graph.call_module(f"float_guard_{node.name}", (before,))
            node.replace_input_with(before, guard)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def float_on_purpose(prepared: fx.GraphModule) -> dict[str, str]:
    """Return the reason why each float operation is float, by its module path or node name."""
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
            reasons[name_of(node)] = _reason(prepared, node)
    return reasons


def _reason(graph: fx.GraphModule, node: fx.Node) -> str:
    what = called(graph, node)
    if what in PLAIN:
        if str(node.target) in of_chosen_rows(graph):
            return "it runs on the rows that top-k chose"
        return "its output leaves the network" if str(node.target) in heads(graph) else "keep_float names it"
    if not is_kernel(graph, node):
        kind = what if isinstance(what, str) else getattr(what, "__name__", str(what)).partition(".")[0]
        return f"ONNX Runtime has no integer kernel for {kind}"
    if any(not is_quantized(graph, source) for source in node.all_input_nodes):
        return "an input is float"
    return "nothing behind it reads integers"


def _taken_along(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether the integer operation before a batch-norm or clip fuses it."""
    before = node.all_input_nodes[0]
    if called(graph, node) in CLIPS and called(graph, before) in NORMS:
        return runs_in_integers(graph, before) or _taken_along(graph, before)
    if called(graph, node) in NORMS or called(graph, node) in CLIPS:
        return called(graph, before) in LAYERS or runs_in_integers(graph, before)
    return False


def _link_kernels_(graph: fx.GraphModule) -> None:
    """Give its kernel to every layer, and to every batch-norm that runs in integers by itself."""
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, QuantConv2d | QuantLinear):
            norm = only_user(graph, node, NORMS)
            end = norm or node
            behind = None if norm is None else graph.get_submodule(str(norm.target))
            assert isinstance(behind, QuantNorm | None)
            module.kernel = Kernel(_source(graph, node), module, behind, _sink(graph, end))
            if behind is not None:
                behind.kernel = module.kernel
        elif isinstance(module, QuantNorm) and runs_in_integers(graph, node):
            module.kernel = Kernel(_source(graph, node), None, module, _sink(graph, node))


def _source(graph: fx.GraphModule, node: fx.Node) -> ActivationQuantizer:
    """Return the quantizer of a node's input."""
    before = node.all_input_nodes[0]
    if not is_quantizer(graph, before):
        return _source(graph, before)
    quantizer = graph.get_submodule(str(before.target))
    assert isinstance(quantizer, ActivationQuantizer)
    return quantizer


def _sink(graph: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """Return the quantizer that is the only reader of a node's output, possibly after a clip."""
    users = list(node.users)
    if len(users) == 1 and called(graph, users[0]) in CLIPS:
        return _sink(graph, users[0])
    if len(users) == 1 and called(graph, users[0]) is JoinRange:
        joined = graph.get_submodule(str(users[0].target))
        assert isinstance(joined, JoinRange)
        return joined.quantizer
    if len(users) == 1 and is_quantizer(graph, users[0]):
        quantizer = graph.get_submodule(str(users[0].target))
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer
    return None


def _split_shared_layers_(graph: fx.GraphModule) -> None:
    """Give each further run of a layer a copy (a detector's shared heads): its input has another grid, hence its bias another scale."""
    runs: Counter[str] = Counter()
    alone = heads(graph)
    for node in graph.graph.nodes:
        path = str(node.target)
        if called(graph, node) not in (*PLAIN, *QUANTIZED_NORMS) or path in alone:
            continue
        runs[path] += 1
        if runs[path] > 1:
            node.target = f"{path}_run{runs[path]}"
            graph.add_submodule(node.target, copy.deepcopy(graph.get_submodule(path)))
    graph.recompile()
