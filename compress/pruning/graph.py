"""Follow channels through a network: Torch-Pruning's dependency graph, with walls where channels are not carried one to one.

Torch-Pruning takes every operator that it does not know for an element-wise one. Behind a channel shuffle, a split, a window partition
or a weight used without its module that would couple the wrong channels, divide by zero (ShuffleNetV2) or fill the memory (Swin). Such
operators are walls here: nothing is followed beyond them, and a group of channels that reaches one keeps its width.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from compress.errors import CompressError

# What Torch-Pruning raises on operators that it does not know.
GRAPH_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Autograd's names of operators that take channels apart or put them in another order, whatever the dimension they do it along: which
# dimension holds the channels (NCHW or NHWC) cannot be told from a shape.
REGROUPING = ("split", "slice", "select", "unbind", "index", "gather", "repeat", "roll", "flip", "channelshuffle", "pixelshuffle",
              "pixelunshuffle", "unfold")  # fmt: skip
RESHAPES = ("view", "reshape")


class ChannelGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's dependency graph that stops at walls."""

    def __init__(self) -> None:
        super().__init__()
        self.walls: set[Any] = set()

    def reaches_wall(self, group: Any) -> bool:
        """Tell whether the channels of a group meet an operator that they cannot be followed through."""
        return any(item.dep.target in self.walls for item in group.items)

    def _build_dependency(self, module2node: Any) -> None:
        """Couple the layers, after the trace and before Torch-Pruning works out which index becomes which."""
        super()._build_dependency(module2node)
        for node in module2node.values():
            if node.type == ops.OPTYPE.CONCAT:
                node.module.concat_sizes = _joined_channels(node.grad_fn)
            if _is_wall(node, module2node):
                self._wall_off_(node)

    def build_dependency(self, *args: Any, **kwargs: Any) -> "ChannelGraph":
        """Build the graph; a concatenation that Torch-Pruning found no offsets for is a wall too."""
        super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            if node.type == ops.OPTYPE.CONCAT and node.module.offsets is None:
                self._wall_off_(node)
        return self

    def _wall_off_(self, node: Any) -> None:
        self.walls.add(node)
        node.type = ops.OPTYPE.ELEMENTWISE  # else its indices would be mapped
        node.dependencies, node.inputs, node.outputs = [], [], []


def channel_graph(model: nn.Module, images: Tensor) -> ChannelGraph:
    """Return the dependency graph of a model on one input (1, 3, s, s).

    Raises CompressError where Torch-Pruning cannot build it.
    """
    # Fresh containers: Torch-Pruning's default ones are shared between calls and change.
    try:
        with torch.enable_grad():
            return ChannelGraph().build_dependency(
                model, example_inputs=images, unwrapped_parameters=[], customized_pruners={}, verbose=False
            )
    except GRAPH_ERRORS as error:
        raise CompressError(
            f"{type(model).__name__}: Torch-Pruning cannot follow its channels ({type(error).__name__}: {error}); "
            "leave out the prune stage, or choose another network"
        ) from error


def _is_wall(node: Any, module2node: Any) -> bool:
    """Tell whether channels cannot be followed through a node."""
    if isinstance(node.module, nn.MultiheadAttention | nn.Parameter):
        return True  # the heads fix attention's width; a bare parameter does not say which of its dimensions holds channels
    if isinstance(node.module, nn.Conv2d | nn.ConvTranspose2d):
        return _is_cut_wrongly(node.module)
    if not type(node.module).__module__.startswith(ops.__name__):
        return False
    name = node.grad_fn.name().lower()
    if any(word in name for word in REGROUPING):
        return True
    if any(word in name for word in RESHAPES):
        return not _keeps_channels(tuple(node.grad_fn._saved_self_sym_sizes), _output_shape(node.grad_fn))
    if node.type == ops.OPTYPE.CONCAT:
        return node.module.concat_sizes is None
    return any(_is_foreign(parameter, module2node) for parameter in _leaves(node.grad_fn))


def _is_cut_wrongly(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Tell whether Torch-Pruning mistakes a grouped convolution: a transposed one's weights are (in, out / groups, k, k), and with several
    outputs for each input (or inputs for each output) its groups are no channels.
    """  # noqa: D205
    widths = {layer.in_channels, layer.out_channels}
    return layer.groups > 1 and widths != {layer.groups} and (layer.transposed or layer.groups in widths)


def _keeps_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Tell whether a reshape leaves whole channels together: it flattens an image, or what it changes are other dimensions."""
    if max(len(before), len(after)) > 4:
        return False  # groups of channels, heads, windows
    if before[:2] == after[:2] or (len(after) == 2 and math.prod(before[1:]) == after[1]):
        return True
    return len(before) != len(after) and before[-1] == after[-1]  # tokens (n, h, w, c), (n, t, c), (n * t, c)


def _joined_channels(join: Any) -> list[int] | None:
    """Return how many channels each input of a concatenation has; None where it does not join channels, or an input needs no gradient."""
    rank = len(_output_shape(join))
    axis = join._saved_dim - 2**64 if join._saved_dim >= 2**63 else join._saved_dim
    if rank not in (2, 4) or axis % rank != 1 or any(source is None for source, _ in join.next_functions):
        return None
    return [int(source._input_metadata[number].shape[1]) for source, number in join.next_functions]


def _output_shape(grad_fn: Any) -> tuple[int, ...]:
    return tuple(grad_fn._input_metadata[0].shape)  # a gradient's input is the output of the forward


def _leaves(grad_fn: Any) -> Iterator[Tensor]:
    """Yield the parameters that an operator reads itself."""
    return (source.variable for source, _ in getattr(grad_fn, "next_functions", ()) if hasattr(source, "variable"))


def _is_foreign(parameter: Tensor, module2node: Any) -> bool:
    """Tell whether a parameter is no part of a module in the graph: it is used without its module being called."""
    return not any(
        parameter is own for module in module2node if isinstance(module, nn.Module) for own in module.parameters()
    )
