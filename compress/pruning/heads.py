"""Find attention modules whose heads are independent, and cut whole heads.

A head is a block of rows in each projection of queries, keys and values, the same block of columns in the output projection, and one entry
of every per-head tensor (position biases, temperatures). A trial on a copy tells whether a module is built that way: without a head, its
outputs must equal those with the head's columns set to zero.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.pruning.criteria import Slices

# Attribute names for the number of heads; modules with the second lose no whole head.
HEADS = ("num_heads", "num_attention_heads")
# Attribute names for the width of all heads together.
WIDTHS = ("attn_dim", "all_head_dim", "inner_dim")


@dataclass(frozen=True)
class Attention:
    """One module with heads that can be cut."""

    path: str
    module: nn.Module
    inputs: tuple[str, ...]  # paths, inside the module, of the query, key and value projections
    output: str  # path of the output projection
    heads: int
    size: int  # inputs of the output projection per head

    def rows(self, projection: str, heads: Sequence[int]) -> list[int]:
        """Return the outputs of a projection that belong to `heads`; a joint projection writes q, k and v one after the other."""
        parts = linear(self.module, projection).out_features // (self.heads * self.size)
        width = self.heads * self.size
        return [
            part * width + head * self.size + i for part in range(parts) for head in heads for i in range(self.size)
        ]

    def columns(self, heads: Sequence[int]) -> list[int]:
        """Return the inputs of the output projection that come from `heads`."""
        return [head * self.size + i for head in heads for i in range(self.size)]

    def slices(self) -> Iterator[Slices]:
        """Yield the projections for a criterion to score, one row per output or input, with the head of each row."""
        everything = range(self.heads)
        for projection, output in [*((name, True) for name in self.inputs), (self.output, False)]:
            rows = self.rows(projection, everything) if output else self.columns(everything)
            roots = [row // self.size % self.heads for row in rows]
            yield slices_of(linear(self.module, projection), rows, roots, output=output)


def slices_of(layer: nn.Linear, rows: Sequence[int], roots: Sequence[int], *, output: bool) -> Slices:
    """Return some outputs, or inputs, of a layer for a criterion to score, with the channel that each belongs to."""
    weight, grad = (
        None if part is None else part if output else part.T for part in (layer.weight.detach(), layer.weight.grad)
    )
    assert weight is not None
    return Slices(layer, weight[rows], None if grad is None else grad[rows], output, torch.tensor(roots))


def attention_calls(model: nn.Module, images: Tensor) -> list[tuple[Attention, tuple[Any, ...], dict[str, Any]]]:
    """Return what looks like attention, in the order it runs, each with the arguments of its first call on noise."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    named = {module: name for name, module in model.named_modules() if _projections(module)}
    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in named]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model.eval()(noise.to(images))
    finally:
        for handle in handles:
            handle.remove()
    return [(attention_at(model, named[module]), *call) for module, call in calls.items()]


def find_attentions(model: nn.Module, images: Tensor) -> list[Attention]:
    """Return the modules whose heads can be cut, in the order they run; of `images` (1, c, h, w) only the shape matters."""
    calls = (call for call in attention_calls(model, images) if hasattr(call[0].module, HEADS[0]))
    return [call[0] for call in calls if _heads_are_alone(*call)]


def attention_at(model: nn.Module, path: str) -> Attention:
    """Return the attention module at a path; the last of its linear layers is the output projection."""
    module = model.get_submodule(path)
    *inputs, output = _projections(module)
    heads = _heads(module)
    return Attention(path, module, tuple(inputs), output, heads, linear(module, output).in_features // heads)


def _heads(module: nn.Module) -> int:
    found = (getattr(module, name, None) for name in HEADS)
    return next((heads for heads in found if isinstance(heads, int)), 0)


def _projections(module: nn.Module) -> list[str]:
    """Return the names of an attention module's linear layers; none if their widths are not multiples of the heads."""
    heads = _heads(module)
    own = {name: part for name, part in module.named_children() if isinstance(part, nn.Linear)}
    if heads < 2 or len(own) < 2:
        return []
    *inputs, output = own.values()
    whole = output.in_features % heads == 0 and all(layer.out_features % output.in_features == 0 for layer in inputs)
    return list(own) if whole else []


def cut_heads_(attention: Attention, heads: Sequence[int]) -> None:
    """Remove `heads` in place."""
    module, kept = attention.module, [head for head in range(attention.heads) if head not in heads]
    width = attention.heads * attention.size
    projections = {
        id(part) for name in (*attention.inputs, attention.output) for part in linear(module, name).parameters()
    }
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if id(tensor) not in projections:
                for dim, size in enumerate(tensor.shape):
                    if size in (attention.heads, width):
                        rows = kept if size == attention.heads else attention.columns(kept)
                        _keep_(owner, name, dim, rows)
    for projection in attention.inputs:
        keep_outputs_(linear(module, projection), attention.rows(projection, kept))
    keep_inputs_(linear(module, attention.output), attention.columns(kept))
    for name, value in vars(module).items():
        if name == "num_heads":
            setattr(module, name, len(kept))
        elif name in WIDTHS and value == width:
            setattr(module, name, len(kept) * attention.size)


@torch.no_grad()
def _heads_are_alone(attention: Attention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether cutting the first head gives the same outputs as setting its columns to zero."""
    masked, cut = copy.deepcopy(attention.module), copy.deepcopy(attention.module)
    linear(masked, attention.output).weight[:, attention.columns([0])] = 0
    try:
        cut_heads_(replace(attention, module=cut), [0])
        return same(masked(*args, **kwargs), cut(*args, **kwargs))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False  # it uses its heads in some other way


def same(expected: object, got: object) -> bool:
    """Tell whether two modules returned the same tensors but for rounding; raise ValueError if not as many."""
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)
        for one, other in zip(_tensors(expected), _tensors(got), strict=True)
    )


def _tensors(value: object) -> list[Tensor]:
    return [part for part in (value if isinstance(value, tuple | list) else [value]) if isinstance(part, Tensor)]


def linear(module: nn.Module, name: str) -> nn.Linear:
    """Return a projection of an attention module."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def keep_outputs_(layer: nn.Linear, rows: Sequence[int]) -> None:
    """Keep some outputs of a layer."""
    for name, _ in list(layer.named_parameters()):
        _keep_(layer, name, 0, rows)
    layer.out_features = len(rows)


def keep_inputs_(layer: nn.Linear, columns: Sequence[int]) -> None:
    """Keep some inputs of a layer."""
    _keep_(layer, "weight", 1, columns)
    layer.in_features = len(columns)


def _keep_(owner: nn.Module, name: str, dim: int, rows: Sequence[int]) -> None:
    """Keep some entries along one dimension of a parameter (and its gradient) or buffer."""
    tensor = getattr(owner, name)
    kept = tensor.detach().index_select(dim, torch.tensor(rows, device=tensor.device))
    if name in owner._buffers:
        owner._buffers[name] = kept
        return
    grad = tensor.grad
    setattr(owner, name, nn.Parameter(kept, requires_grad=tensor.requires_grad))
    if grad is not None:
        getattr(owner, name).grad = grad.index_select(dim, torch.tensor(rows, device=grad.device))
