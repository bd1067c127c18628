"""Follow channels through a network: Torch-Pruning's dependency graph, with walls at operators that do not pass channels one to one.

Torch-Pruning treats every unknown operator as element-wise. After a channel shuffle, a split, a window partition or a weight used without
its module, that couples the wrong channels, divides by zero (ShuffleNetV2) or fills the memory (Swin). Here such operators are walls:
channels are not followed through them, and a group that reaches one keeps its width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning import ops
from torch_pruning.dependency.index_mapping import _FlattenIndexMapping

from compress.errors import CompressError
from compress.pruning.axes import Axes, Axis, channel_axes, shape_of

# Exceptions that Torch-Pruning raises on unknown operators.
GRAPH_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
MOVES = (
    ops.OPTYPE.CONCAT,
    ops.OPTYPE.SPLIT,
    ops.OPTYPE.UNBIND,
    ops.OPTYPE.EXPAND,
    ops.OPTYPE.SLICE,
    ops.OPTYPE.RESHAPE,
)


class ChannelGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's dependency graph that stops at walls."""

    def __init__(self) -> None:
        super().__init__()
        self.walls: set[Any] = set()

    def reaches_wall(self, group: Any) -> bool:
        """Tell whether a group's channels reach a wall."""
        return any(item.dep.target in self.walls for item in group.items)

    def _build_dependency(self, module2node: Any) -> None:
        """Correct the couplings after the trace, before Torch-Pruning maps indices between layers."""
        super()._build_dependency(module2node)
        nodes = list(module2node.values())
        layers = {node.grad_fn: node.module for node in nodes if not _is_operator(node) and not _is_parameter(node)}
        axes = channel_axes([node.grad_fn for node in nodes if not node.outputs], layers)
        apart = set()  # nodes that carry no channels
        for node in nodes:
            axis = axes.parameters.get(node.module) if _is_parameter(node) else axes.of.get(node.grad_fn)
            if _is_parameter(node):
                node.pruning_dim = axis
            elif _is_operator(node) and isinstance(axis, int):
                _follow_(node, axis, axes)
            if _is_wall(node, axis, axes, module2node) or node.grad_fn in axes.misread:
                self._wall_off_(node)
            elif axis == "none" and (_is_operator(node) or _is_parameter(node)):
                apart.add(node)
        for node in nodes:
            node.dependencies = [dep for dep in node.dependencies if dep.target not in apart and node not in apart]

    def build_dependency(self, *args: Any, **kwargs: Any) -> "ChannelGraph":
        """Build the graph; a concatenation without offsets is a wall too."""
        super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            if node.type == ops.OPTYPE.CONCAT and node.module.offsets is None:
                self._wall_off_(node)
        return self

    def _wall_off_(self, node: Any) -> None:
        self.walls.add(node)
        node.type = ops.OPTYPE.ELEMENTWISE  # else Torch-Pruning would map its indices
        node.dependencies, node.inputs, node.outputs = [], [], []


def channel_graph(model: nn.Module, images: Tensor) -> ChannelGraph:
    """Return the dependency graph of a model for one input (1, c, h, w).

    Raises CompressError if Torch-Pruning cannot build it.
    """
    # Pass fresh containers: Torch-Pruning's mutable defaults are shared between calls.
    training = model.training
    try:
        with torch.enable_grad(), Attached():
            return ChannelGraph().build_dependency(
                model, example_inputs=(images,), unwrapped_parameters=[], customized_pruners={}, verbose=False
            )
    except GRAPH_ERRORS as error:
        raise CompressError(
            f"{type(model).__name__}: Torch-Pruning cannot follow its channels ({type(error).__name__}: {error}); "
            "leave out the prune stage, or choose another network"
        ) from error
    finally:
        # The switch clears the position biases that LeViT and the like cache in this pass.
        model.train().train(training)


class Attached(TorchFunctionMode):
    """While it is entered, `detach` returns the tensor itself: channels are followed by what autograd records, and gradients are whole."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        return args[0] if function is Tensor.detach else function(*args, **(kwargs or {}))


def _follow_(node: Any, axis: int, axes: Axes) -> None:
    """Tell Torch-Pruning how an operator maps its inputs' channels to its output's dimension `axis`."""
    if node.type == ops.OPTYPE.CONCAT and _dimension(node.grad_fn) == axis:
        node.module.concat_sizes = _joined_channels(node.grad_fn, axis)
        return
    if node.type == ops.OPTYPE.RESHAPE:  # Torch-Pruning's own stride is wrong where a concatenation follows
        ((source, number),) = node.grad_fn.next_functions
        before = axes.of[source]
        assert isinstance(before, int)  # else the output's were no integer
        stride = shape_of(node.grad_fn)[axis] // shape_of(source, number)[before]
        for dep in node.dependencies if stride > 1 else ():
            if dep.target in node.inputs:
                dep.index_mapping[0] = _FlattenIndexMapping(stride, reverse=True)
        for dep in (dep for source in node.inputs for dep in source.dependencies if stride > 1):
            if dep.target is node:
                dep.index_mapping[0] = _FlattenIndexMapping(stride)
    if node.type in MOVES:
        node.type = ops.OPTYPE.ELEMENTWISE


def _is_operator(node: Any) -> bool:
    return type(node.module).__module__.startswith(ops.__name__)


def _is_parameter(node: Any) -> bool:
    return isinstance(node.module, nn.Parameter)


def _is_wall(node: Any, axis: Axis, axes: Axes, module2node: Any) -> bool:
    """Tell whether channels along `axis` of a node's output cannot be followed through the node."""
    if isinstance(node.module, nn.MultiheadAttention):
        return True  # its width is fixed by the heads
    if isinstance(node.module, nn.Conv2d | nn.ConvTranspose2d):
        return _is_cut_wrongly(node.module) or not _is_whole(node)
    if not _is_operator(node):
        return _is_parameter(node) and axis is None
    if axis is None or (node.type == ops.OPTYPE.CONCAT and node.module.concat_sizes is None):
        return True
    if isinstance(axis, int) and _is_functional(node.grad_fn, module2node):
        return True
    scales = {parameter for parameter, found in axes.parameters.items() if found == "none"}  # the same for all channels
    return any(_is_foreign(parameter, module2node) for parameter in _leaves(node.grad_fn) if parameter not in scales)


def _is_cut_wrongly(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Tell whether Torch-Pruning would cut this grouped convolution wrongly.

    It mistakes transposed ones, whose weights are (in, out / groups, k, k), and those with several outputs per input or inputs per output.
    """
    widths = {layer.in_channels, layer.out_channels}
    return layer.groups > 1 and widths != {layer.groups} and (layer.transposed or layer.groups in widths)


def _is_whole(node: Any) -> bool:
    """Tell whether a convolution's call is one convolution by all of its weights; an octave convolution's are four, each by a quarter."""
    name, weight = node.grad_fn.name().lower(), node.module.weight
    return "convolution" in name and node.grad_fn._saved_weight.shape == weight.shape


def _is_functional(grad_fn: Any, module2node: Any) -> bool:
    """Tell whether an operator outside of its layer mixes channels; a linear layer's product on maps is inside of it."""
    name = grad_fn.name().lower()
    if "convolution" in name:
        return bool(grad_fn._saved_groups != shape_of(grad_fn)[1])
    read = [source for source, _ in grad_fn.next_functions if source is not None and not hasattr(source, "variable")]
    weights = [leaf for source in read if source.name().startswith("TBackward") for leaf in _leaves(source)]
    is_own = any(not _is_foreign(weight, module2node) for weight in weights)
    return name.startswith(("mm", "addmm")) and len(read) > 1 and not is_own


def _dimension(join: Any) -> int:
    rank = len(shape_of(join))
    return int(join._saved_dim - 2**64 if join._saved_dim >= 2**63 else join._saved_dim) % rank


def _joined_channels(join: Any, axis: int) -> list[int] | None:
    """Return the number of channels of each input of a concatenation; None if an input needs no gradient."""
    if any(source is None for source, _ in join.next_functions):
        return None
    return [shape_of(source, number)[axis] for source, number in join.next_functions]


def _leaves(grad_fn: Any) -> Iterator[Tensor]:
    """Yield the parameters that an operator reads directly."""
    return (source.variable for source, _ in getattr(grad_fn, "next_functions", ()) if hasattr(source, "variable"))


def _is_foreign(parameter: Tensor, module2node: Any) -> bool:
    """Tell whether a parameter belongs to no module in the graph: it is used without a call of its module."""
    return not any(
        parameter is own
        for module in module2node
        for own in (module.parameters() if isinstance(module, nn.Module) else [module])
    )
