"""Turn a module into one torch.fx graph whose nodes the rest of quantization can reason about.

What only training has is gone: dropouts, stochastic depth (quantization-aware training fine-tunes for a few epochs and does without),
parallel branches that add up to one convolution. So are checks of the input's shape: an exported file has one image size.
"""

import copy
import inspect
from typing import Any

import torch
from timm.layers.linear import Linear as TimmLinear
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import stochastic_depth

from compress.errors import ModelError
from compress.quant.graph.branches import merge_branches_
from compress.quant.graph.windows import attend

NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, F.dropout, F.dropout1d, F.dropout2d,
          F.dropout3d, stochastic_depth)  # fmt: skip


class _Tracer(fx.Tracer):
    """Trace down to torch.nn's own modules, and through attention that reads its linear layers' weights without calling them."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of `m`, or follow it."""
        if type(m) is ShiftedWindowAttention:
            return attend(m, *args)
        if isinstance(m, nn.BatchNorm2d) and type(m) is not nn.BatchNorm2d:
            values = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            for part in m.children():  # timm's BatchNormAct2d activates behind the norm
                values = part(values)
            return values
        return super().call_module(m, forward, args, kwargs)


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the model as a graph of its own modules in eval mode, fed by its first argument alone; module paths stay as they are.

    Raises ModelError where the forward depends on values and cannot be one graph.
    """
    model = copy.deepcopy(model).eval()  # stochastic depth and its kin take no part in eval mode
    for module in model.modules():
        if type(module) is TimmLinear:
            object.__setattr__(module, "__class__", nn.Linear)  # differs only where TorchScript runs it
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model, _defaults(model)), type(model).__name__)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__}: its forward cannot be traced into one graph ({error}); "
            "write it without branches on tensor values, or leave out the qat stage"
        ) from error
    for module in graph.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # what a subclass does besides is in the graph
    for node in list(graph.graph.nodes):
        if called(graph, node) in NO_OPS:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif _is_check(node):
            graph.graph.erase_node(node)
        elif _is_global_mean(node):
            # Pool and flatten apart: the pool has an integer kernel, and its Q/DQ pair must stand right behind it.
            with graph.graph.inserting_before(node):
                pooled = graph.graph.call_function(F.adaptive_avg_pool2d, (node.args[0], 1))
                node.replace_all_uses_with(graph.graph.call_function(torch.flatten, (pooled, 1)), propagate_meta=True)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    for node in [node for node in graph.graph.nodes if node.op == "placeholder"][1:]:
        graph.graph.erase_node(node)
    merge_branches_(graph)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def called(graph: fx.GraphModule, node: fx.Node) -> object:
    """Return what a node calls: a module's class, a function, or a method's name."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target)))
    return node.target if node.op in ("call_function", "call_method") else None


def _defaults(model: nn.Module) -> dict[str, object]:
    """Return the forward's arguments that have a default, such as a ViT's attention mask: they stay at it."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _is_check(node: fx.Node) -> bool:
    """Tell whether a node asserts something, as fx also does where an argument stays at its default."""
    return node.target is torch._assert or getattr(node.target, "__name__", "") == "_assert_is_none"


def _is_global_mean(node: fx.Node) -> bool:
    """Tell whether a node is the mean over height and width that drops both dimensions."""
    if node.target not in (torch.mean, "mean") or node.kwargs.get("keepdim", False) or len(node.args) > 2:
        return False
    axes = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    return isinstance(axes, tuple | list) and sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3]
