"""Find the channel dimension of each tensor of a forward from autograd's graph.

A convolution writes channels along dimension 1, a linear layer along the last. From there they are followed through permutations, reshapes
and element-wise operators, and backwards from their users into bare parameters (position embeddings, class tokens, layer scales).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Axis = int | Literal["none"] | None
"""A tensor's channel dimension; "none" if it has no channels (a mean over them, a scale), None if unknown."""

# Operators that reorder values along a dimension that autograd does not record, or mix several dimensions.
OPAQUE = ("index", "gather", "repeat", "channelshuffle", "pixelshuffle", "pixelunshuffle", "unfold", "im2col", "bmm", "attention", "cumsum",
          "take", "scatter", "sort", "topk")  # fmt: skip
REDUCTIONS = ("mean", "sum", "norm", "linalgvectornorm", "amax", "amin", "var", "varmean", "std", "max",
              "min", "logsumexp")  # fmt: skip


def shape_of(grad_fn: Any, output: int = 0) -> tuple[int, ...]:
    """Return the shape of an operator's output, which is the gradient's input."""
    return tuple(int(size) for size in grad_fn._input_metadata[output].shape)


@dataclass(frozen=True)
class Axes:
    """The channel dimension of each operator's output (by grad_fn) and of each bare parameter."""

    of: Mapping[Any, Axis]
    parameters: Mapping[Tensor, Axis]
    misread: frozenset[Any]  # operators that read another dimension than the channels': a layer over tokens


def channel_axes(ends: Sequence[Any], layers: Mapping[Any, nn.Module]) -> Axes:
    """Return the channel dimensions in a forward whose outputs have the grad_fns `ends`; `layers` maps grad_fns to their modules."""
    axes: dict[Any, Axis] = {}
    parameters: dict[Tensor, set[Axis]] = {}
    misread = set()
    for grad_fn in _in_order(ends):
        sources = [source for source, _ in grad_fn.next_functions if source is not None]
        reads, layer = _reads(grad_fn), layers.get(grad_fn)
        if layer is None and reads is None and all(source not in axes for source in sources):
            continue  # computed from parameters alone
        if reads is not None and not {axes[source] for source in sources if source in axes} <= {reads, "none", None}:
            misread.add(grad_fn)
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            axes[grad_fn] = len(shape_of(grad_fn)) - 1 if isinstance(layer, nn.Linear) else 1
        elif reads is not None:
            axes[grad_fn] = None if grad_fn in misread else reads
        else:
            axes[grad_fn] = _after(grad_fn, axes)
    for grad_fn, axis in list(axes.items()):
        for source, number in grad_fn.next_functions:
            if source is not None and source not in axes:
                aligned: Axis = "none" if _reads(grad_fn) is not None else axis  # a layer knows its own weights
                if isinstance(aligned, int):
                    aligned += len(shape_of(source, number)) - len(shape_of(grad_fn))
                _back(source, "none" if isinstance(aligned, int) and aligned < 0 else aligned, axes, parameters)
    told = {parameter: found.pop() if len(found) == 1 else None for parameter, found in parameters.items()}
    return Axes(axes, told, frozenset(misread))


def _in_order(ends: Sequence[Any]) -> Iterator[Any]:
    """Yield every operator after those whose outputs it reads."""
    stack, seen = [(end, False) for end in ends], set()
    while stack:
        grad_fn, ready = stack.pop()
        if ready:
            yield grad_fn
        elif grad_fn not in seen:
            seen.add(grad_fn)
            stack.append((grad_fn, True))
            stack.extend((source, False) for source, _ in grad_fn.next_functions if source is not None)


def _reads(grad_fn: Any) -> int | None:
    """Return the dimension along which an operator with weights reads channels; None if it has no weights."""
    name = grad_fn.name().lower()
    if name.startswith(("addmm", "mm", "nativelayernorm")):
        return len(shape_of(grad_fn)) - 1
    return 1 if any(word in name for word in ("convolution", "batchnorm", "groupnorm")) else None


def _after(grad_fn: Any, axes: Mapping[Any, Axis]) -> Axis:
    """Return the channel dimension of an operator's output, from those of its inputs."""
    shape, found = shape_of(grad_fn), set[Axis]()
    for source, number in grad_fn.next_functions:
        if source in axes:
            axis = axes[source]
            found.add(_moved(grad_fn, axis, shape_of(source, number), shape) if isinstance(axis, int) else axis)
    if found == {"none"}:
        return "none"
    found.discard("none")
    return found.pop() if len(found) == 1 else None


def _moved(grad_fn: Any, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> Axis:
    """Return where dimension `axis` of an operator's input is in its output."""
    name, dims = grad_fn.name().lower(), _dims(grad_fn, len(before))
    if any(word in name for word in OPAQUE):
        return None
    if name.startswith("permute"):
        return dims.index(axis)
    if name.startswith(("transpose", "tbackward")):
        first, second = _swapped(grad_fn, len(before))
        return {first: second, second: first}.get(axis, axis)
    if name.startswith("unsqueeze"):
        return axis + (_wrapped(grad_fn._saved_dim, len(after)) <= axis)
    if "view" in name or "reshape" in name or name.startswith("squeeze"):
        flattened = axis == 1 and len(after) == 2 and math.prod(before[1:]) == after[1]
        return 1 if flattened else _carried(before, after, axis)
    if name.startswith(("select", "unbind")):
        return None if axis in dims else axis - (dims[0] < axis)
    if _is_reduction(name) and dims and math.prod(after) < math.prod(before):
        if axis in dims:
            return "none"
        return axis if len(before) == len(after) else axis - sum(dim < axis for dim in dims)
    if name.startswith(("slice", "split", "roll", "flip", "chunk")) and axis in dims:
        return None
    if name.startswith("cat") and len(before) == len(after):
        return axis
    aligned = axis + len(after) - len(before)  # element-wise operators, pools, padding: aligned at the right
    return aligned if aligned >= 0 and after[aligned] == before[axis] else None


def _back(grad_fn: Any, axis: Axis, axes: dict[Any, Axis], parameters: dict[Tensor, set[Axis]]) -> None:
    """Follow a dimension from the output of an operator on parameters back to the parameters."""
    shape = shape_of(grad_fn)
    if isinstance(axis, int) and shape[axis] == 1:
        axis = "none"  # the same for all channels
    axes[grad_fn] = axis
    if hasattr(grad_fn, "variable"):
        parameters.setdefault(grad_fn.variable, set()).add(axis)
        return
    for source, number in grad_fn.next_functions:
        if source is not None:
            before = shape_of(source, number)
            origins = [dim for dim in range(len(before)) if _moved(grad_fn, dim, before, shape) == axis]
            before_it = origins[0] if isinstance(axis, int) and len(origins) == 1 else None
            _back(source, "none" if axis == "none" else before_it, axes, parameters)


def _carried(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Return where a reshape puts a dimension; None if it splits it or merges it with others."""
    outside = math.prod(before[:axis])
    for position, size in enumerate(after):
        if size == before[axis] and math.prod(after[:position]) == outside:
            return position
    return None


def _dims(grad_fn: Any, rank: int) -> list[int]:
    """Return the dimensions that an operator saved as its arguments."""
    for name in ("_saved_dims", "_saved_dim"):
        if hasattr(grad_fn, name):
            found = getattr(grad_fn, name)
            return [_wrapped(dim, rank) for dim in (found if isinstance(found, Iterable) else (found,))]
    return list(range(rank)) if _is_reduction(grad_fn.name().lower()) else []


def _is_reduction(name: str) -> bool:
    return name.partition("backward")[0] in REDUCTIONS


def _swapped(grad_fn: Any, rank: int) -> tuple[int, int]:
    if not hasattr(grad_fn, "_saved_dim0"):
        return 0, 1
    return _wrapped(grad_fn._saved_dim0, rank), _wrapped(grad_fn._saved_dim1, rank)


def _wrapped(dim: int, rank: int) -> int:
    """Return a dimension counted from the left; autograd saves negative ones as unsigned 64-bit."""
    return int(dim - 2**64 if dim >= 2**63 else dim) % max(rank, 1)
