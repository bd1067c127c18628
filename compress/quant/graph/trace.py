"""Turn a module, however its forward is written, into one graph of torch.nn layers and functions.

torch.export runs the forward once on fake tensors and records its operators; that resolves control flow on shapes, subclasses of layers
and weights that a forward computes. Here, operators with weights become layers of torch.nn again, at the paths of their weights, so that
batch-norms train, patterns can name layers, and saved weights keep their names. Whatever depends on no image is computed once:
standardized weights, position biases, attention masks.

The graph has no dropout or stochastic depth (QAT runs a few epochs without them), and parallel branches are merged into one convolution.
"""

import copy
import operator
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from compress.errors import ModelError, own_line
from compress.quant.graph.branches import merge_branches_
from compress.quant.graph.layers import FUNCTIONS, IDENTITIES, Lifted, layer_of, pad_into_convolutions_
from export.onnx_file.to_onnx import as_it_runs

aten = torch.ops.aten
# Operators that run a graph of their own, and its position among their arguments.
SCOPES: dict[object, int] = {
    torch.ops.higher_order.wrap_with_autocast: 4,
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
}
RESHAPES = (torch.flatten, torch.reshape, torch.unsqueeze)
# What writes into a slice of a tensor, by what cuts it out.
SCATTERS: dict[object, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
# Operators that read only the type of their input.
BLANKS = (aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)


def trace(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return the model in eval mode as a graph with the same outputs; `images` (n, channels, h, w) fix every size but n.

    Raises ModelError if the forward branches on values and cannot be one graph.
    """
    model = copy.deepcopy(model).eval().cpu()
    # torch.export would make a batch of 1 a constant.
    batch = images[:1].cpu().expand(2, *images.shape[1:]).contiguous()
    graph = _lift(_export(model, batch), type(model).__name__)
    pad_into_convolutions_(graph)
    for node in list(graph.graph.nodes):
        if node.target is torch.mean and averages_pixels(node) and not node.kwargs.get("keepdim", False):
            # Split into pool and flatten: the pool has an integer kernel, whose Q/DQ pair must follow it directly.
            with graph.graph.inserting_before(node):
                pooled = graph.graph.call_function(F.adaptive_avg_pool2d, (node.args[0], 1))
                node.replace_all_uses_with(graph.graph.call_function(torch.flatten, (pooled, 1)), propagate_meta=True)
            graph.graph.erase_node(node)
    merge_branches_(graph)
    if getattr(model, "packs", False):
        _mark_packing(graph)
    graph.delete_all_unused_submodules()
    graph.recompile()
    _check(graph.eval(), model, batch)
    return graph


def called(graph: fx.GraphModule, node: fx.Node) -> object:
    """Return what a node calls: a module's class, a function, or a method's name.

    "size" is arithmetic on the batch size, "pack" what lays several outputs side by side, behind the network's end.
    """
    for marked in ("is_size", "is_pack"):
        if node.meta.get(marked):
            return marked.removeprefix("is_")
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else None


def is_end(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node only gives the network's outputs away."""
    return node.op == "output" or called(graph, node) == "pack"


def _mark_packing(graph: fx.GraphModule) -> None:
    """Mark the last concatenation and the reshapes that only it reads."""
    (join,) = graph.graph.find_nodes(op="output")[0].all_input_nodes
    assert join.target is torch.cat, "several outputs are packed by one concatenation"
    for node in (join, *join.all_input_nodes):
        if node is join or (node.target in RESHAPES and list(node.users) == [join]):
            node.meta["is_pack"] = True


def averages_pixels(node: fx.Node) -> bool:
    """Tell whether a mean is over height and width."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(axes, list | tuple) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]


def name_of(node: fx.Node) -> str:
    """Return the path of the layer or torch.nn module that a node comes from, else the node's own name."""
    if node.op == "call_module":
        return str(node.target)
    path, kind = next(reversed(node.meta.get("nn_module_stack", {}).values()), ("", ""))
    return path if str(kind).startswith("torch.nn.modules.") else node.name


def _export(model: nn.Module, batch: Tensor) -> ExportedProgram:
    try:
        # When it fails, it prints the partial graph.
        with (
            as_it_runs(model),
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            warnings.simplefilter("ignore")
            return torch.export.export(model, (batch,), dynamic_shapes=({0: Dim("batch")},), strict=False)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: its forward cannot be one graph{own_line(error)}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}; "
            "write it without branches on the values of tensors and loops over the images"
        ) from error


def _lift(program: ExportedProgram, name: str) -> fx.GraphModule:
    """Return the program's graph as torch.nn layers and functions."""
    lifted, known = Lifted(fx.Graph()), program.graph_signature
    owned = {**known.inputs_to_parameters, **known.inputs_to_buffers, **known.inputs_to_lifted_tensor_constants}
    tensors = {**program.state_dict, **program.constants}
    inputs = [
        lifted.constant(owned[node.name], tensors[owned[node.name]])
        if node.name in owned
        else lifted.graph.placeholder(node.name)
        for node in program.graph.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        outputs = _run(lifted, program.graph_module, inputs)
    lifted.graph.output(lifted.readable(outputs[0] if len(outputs) == 1 else tuple(outputs)))
    graph = fx.GraphModule(lifted.attributes, lifted.graph, name)
    graph.graph.eliminate_dead_code()
    return graph.eval()


def _run(lifted: Lifted, program: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Run a recorded graph, computing what depends on no image and recording the rest anew; return its outputs."""
    rest, done = iter(inputs), dict[fx.Node, Any]()  # a new node, or a value that depends on no image
    for node in program.graph.nodes:
        if node.op == "placeholder":
            done[node] = next(rest)
        elif node.op == "get_attr":
            done[node] = program.get_submodule(str(node.target))
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda argument: done[argument]))
        elif node.target in SCOPES:  # the body of `with torch.autocast(...)` or `with torch.no_grad()`
            inner, *given = fx.map_arg(node.args[SCOPES[node.target] :], lambda argument: done[argument])
            done[node] = _run(lifted, inner, given)
        else:
            done[node] = _step(lifted, node, done)
    raise AssertionError("a graph ends with its output")


def _step(lifted: Lifted, node: fx.Node, done: dict[fx.Node, Any]) -> Any:
    """Return one operator's value if it depends on no image, else its node in the new graph."""
    given: Any = fx.map_arg((node.args, node.kwargs), lambda argument: done[argument])
    args, kwargs = given
    if isinstance(args[0], list) and node.target is operator.getitem:
        return args[0][args[1]]
    if "assert" in str(node.target) or "sym_constrain" in str(node.target):
        return None  # checks something, computes nothing
    on_images = [isinstance(done[source], fx.Node) for source in node.all_input_nodes]
    if getattr(node.target, "overloadpacket", None) in BLANKS and not any(on_images[1:]):
        args = (torch.empty(0, dtype=node.all_input_nodes[0].meta["val"].dtype), *args[1:])
    elif any(on_images):
        new = _record(lifted, node, args, kwargs)
        if _writes_into_input(node):
            _write_(lifted, node.all_input_nodes[0], new, done)
        return new
    assert callable(node.target)
    return node.target(*args, **kwargs)  # in-place operators may write: nothing else owns these values


def _write_(lifted: Lifted, written: fx.Node, new: Any, done: dict[fx.Node, Any]) -> None:
    """Let later readers of a tensor, and of what it is a slice of, see what was written into it."""
    before = done[written]
    done.update({source: new for source in done if done[source] is before})
    scatter = SCATTERS.get(written.target)
    if scatter is not None and isinstance(done[base := written.all_input_nodes[0]], fx.Node):
        places = fx.map_arg(written.args[1:], lambda argument: done[argument])
        _write_(lifted, base, lifted.call(scatter, (done[base], new, *places), {}), done)


def _record(lifted: Lifted, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return the new node of a layer or function, or the input itself if the operator only passes it on."""
    lifted.scope = node.meta.get("nn_module_stack", {})
    operation: Any = _out_of_place(node.target) if _writes_into_input(node) else node.target
    packet = getattr(operation, "overloadpacket", None)
    if packet in IDENTITIES and IDENTITIES[packet](node):
        return args[0]
    layer = layer_of(lifted, packet, args, kwargs, node)
    if layer is not None:
        return layer
    function, args, kwargs = FUNCTIONS[packet](args, kwargs) if packet in FUNCTIONS else (operation, args, kwargs)
    new = lifted.call(function, args, kwargs)
    new.meta["is_size"] = isinstance(node.meta.get("val"), torch.SymInt)
    return new


def _writes_into_input(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _out_of_place(operation: Any) -> torch._ops.OpOverload:
    """Return the out-of-place form of an in-place operator."""
    packet = getattr(aten, operation._schema.name.removeprefix("aten::").removesuffix("_"), None)
    found = getattr(packet, operation._overloadname, None)
    if found is None:
        raise ModelError(
            f"{operation}: writes into its input and has no form that does not; write the forward without it"
        )
    assert isinstance(found, torch._ops.OpOverload)
    return found


@torch.no_grad()
def _check(graph: fx.GraphModule, model: nn.Module, batch: Tensor) -> None:
    """Raise ModelError if the graph's outputs differ from its module's."""
    images = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
    expected_all, got_all = (tree_leaves(network(images)) for network in (model, graph))
    for expected, got in zip(expected_all, got_all, strict=True):
        scale = expected.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-6)
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(scale), equal_nan=True):
            raise ModelError(
                f"{type(model).__name__}: its graph gives other outputs than its forward (by {float((got - expected).abs().max()):.3g}); "
                "write the forward without changing tensors in place"
            )
