"""Merge parallel branches that are added into one convolution (Ding et al. 2021, RepVGG, section 3.3).

Such networks train with a 3x3, a 1x1 and an identity branch side by side, each with its batch-norm, and are meant to run as plain
convolutions; quantized unmerged, every branch would cost time and be rounded. Merging two branches at a time on the graph works
for any library's blocks, and after pruning.
"""

import copy
import operator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

ADDS = (operator.add, operator.iadd, torch.add)
Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class _Branch:
    source: fx.Node
    path: str  # of the layer
    layer: nn.Conv2d | nn.BatchNorm2d  # a convolution with its batch-norm folded, or the batch-norm of an identity


def merge_branches_(graph: fx.GraphModule) -> None:
    """Replace every sum of two branches from one tensor by one convolution with a bias, at the larger kernel's path."""
    for node in list(graph.graph.nodes):
        if node.target not in ADDS or len(node.args) != 2 or node.kwargs:
            continue
        if 0 in node.args:  # what Python's sum() starts from
            (rest,) = node.all_input_nodes
            node.replace_all_uses_with(rest)
            graph.graph.erase_node(node)
            continue
        first, second = (_branch(graph, term) if isinstance(term, fx.Node) else None for term in node.args)
        if first is None or second is None or first.source is not second.source:
            continue
        large, small = sorted((first, second), key=_kernel_area, reverse=True)
        if not isinstance(large.layer, nn.Conv2d) or not _is_centred(large.layer):
            continue
        layer = _as_large(small.layer, large.layer)
        if layer is None:
            continue
        graph.set_submodule(large.path, _sum(large.layer, layer))
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.call_module(large.path, (large.source,)), propagate_meta=True)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _branch(graph: fx.GraphModule, term: fx.Node) -> _Branch | None:
    """Return the convolution with its batch-norm, or the lone batch-norm, that a term comes from; None if others read it."""
    norm = _called(graph, term, nn.BatchNorm2d)
    below = term if norm is None else term.all_input_nodes[0]
    convolution = _called(graph, below, nn.Conv2d)
    if convolution is not None:
        folded = convolution if norm is None else fuse_conv_bn_eval(convolution, norm)
        return _Branch(below.all_input_nodes[0], str(below.target), folded)
    return None if norm is None else _Branch(below, str(term.target), norm)


def _called(graph: fx.GraphModule, node: fx.Node, kind: type[Layer]) -> Layer | None:
    if node.op != "call_module" or len(node.users) != 1:
        return None
    module = graph.get_submodule(str(node.target))
    return module if type(module) is kind else None


def _kernel_area(branch: _Branch) -> int:
    return branch.layer.kernel_size[0] * branch.layer.kernel_size[1] if isinstance(branch.layer, nn.Conv2d) else 0


def _is_centred(layer: nn.Conv2d) -> bool:
    """Tell whether the kernel is centred on the pixel that a 1x1 convolution of the same stride reads."""
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return False
    return all(size % 2 and pad == size // 2 for size, pad in zip(layer.kernel_size, layer.padding, strict=True))


def _as_large(layer: nn.Conv2d | nn.BatchNorm2d, large: nn.Conv2d) -> nn.Conv2d | None:
    """Return the smaller branch as a convolution like the larger one except for its kernel size, or None."""
    if isinstance(layer, nn.BatchNorm2d):
        if large.in_channels != large.out_channels or large.stride != (1, 1):
            return None
        identity = nn.Conv2d(large.in_channels, large.out_channels, 1, groups=large.groups, bias=False).to(large.weight)
        nn.init.dirac_(identity.weight, large.groups)
        return fuse_conv_bn_eval(identity.eval(), layer)
    same = (layer.stride, layer.groups, layer.out_channels) == (large.stride, large.groups, large.out_channels)
    return layer if same and _is_centred(layer) else None


@torch.no_grad()
def _sum(large: nn.Conv2d, small: nn.Conv2d) -> nn.Conv2d:
    """Return one convolution that computes the sum of both."""
    total = copy.deepcopy(large)
    rows, columns = ((size - inner) // 2 for size, inner in zip(large.kernel_size, small.kernel_size, strict=True))
    total.weight.add_(F.pad(small.weight, (columns, columns, rows, rows)))
    biases = [layer.bias for layer in (large, small) if layer.bias is not None]
    total.bias = nn.Parameter(sum(biases, total.weight.new_zeros(large.out_channels)))
    return total
