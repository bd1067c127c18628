"""Cut dimensions inside the heads of an attention: of its queries and keys, and of its values, each to a width of its own.

A head computes softmax(q kᵀ / √d) v, and the output projection reads that by columns of its own. Queries and keys may be multiplied by A
and B with A Bᵀ = I, values and columns alike, without changing the output. Of all such bases `rotate_` takes the one whose last dimensions
cost least: singular vectors of q kᵀ and of the output, on second moments of data. What is left without them is then the best that queries,
keys and values of that width give, so the removed ones are folded into the rest (CORP, arXiv 2602.05243, folds into a selection instead).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressError
from compress.pruning.criteria import Slices
from compress.pruning.heads import (
    Attention,
    attention_at,
    attention_calls,
    keep_inputs_,
    keep_outputs_,
    linear,
    same,
    slices_of,
)

Side = Literal["query_key", "value"]
PARTS: tuple[Side, ...] = ("query_key", "query_key", "value")  # of queries, keys and values
TINY = 1e-12
FLOOR = 1e-6  # smallest eigenvalue of second moments over the largest
LEVELS = 16  # widths of queries and keys at which their error is measured
TABLE, INDEX = "relative_position_bias_table", "relative_position_index"  # of timm's Swin


class HeadAttention(nn.Module):
    """What the plain attention computes that it is made from, with its layers and their names; the scale stays when dimensions leave."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        source, names = attention.module, sorted(attention.inputs, key=lambda name: "qkv".find(name[0]))
        width, sides = attention.heads * attention.size, iter(PARTS)
        self.heads, self.output, self.scale = attention.heads, attention.output, attention.size**-0.5
        self.widths: dict[Side, int] = dict.fromkeys(PARTS, attention.size)  # per head
        self.sides = {
            name: tuple(itertools.islice(sides, linear(source, name).out_features // width)) for name in names
        }
        self.in_pair = hasattr(source, "config")  # transformers returns the attention's weights too
        for name, layer in source.named_children():
            if name in (*names, self.output):
                self.add_module(name, layer)
        if isinstance(table := getattr(source, TABLE, None), nn.Parameter):
            self.register_parameter(TABLE, table)
            self.register_buffer(INDEX, source.get_buffer(INDEX), persistent=False)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, **others: object) -> Any:
        """Attend; `mask` (windows, tokens, tokens) is Swin's, added to the scores of the windows of an image.

        The first argument has the name by which transformers gives it.
        """
        assert not any(isinstance(value, Tensor) for value in others.values())
        queries, keys, values = self.parts(hidden_states)
        attended = self.attend(queries, keys, values, mask)
        output = linear(self, self.output)(attended.transpose(1, 2).reshape(*hidden_states.shape[:2], -1))
        return (output, None) if self.in_pair else output

    def parts(self, hidden_states: Tensor) -> list[Tensor]:
        """Return queries, keys and values, each (n, heads, tokens, width)."""
        return [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, sides in self.sides.items()
            for part in linear(self, name)(hidden_states).split(
                [self.heads * self.widths[side] for side in sides], dim=-1
            )
        ]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the means of the values, weighted by the softmax of the scores, (n, heads, tokens, width)."""
        if not hasattr(self, TABLE):
            return F.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        index = self.get_buffer(INDEX)
        bias = self.get_parameter(TABLE)[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)
        if mask is not None:  # once for each image
            windows = (bias + mask[:, None])[None].expand(queries.shape[0] // mask.shape[0], -1, -1, -1, -1)
            bias = windows.flatten(0, 1)  # (n, heads, tokens, tokens)
        # torch cannot write scaled_dot_product_attention with a bias and values of another width.
        weights: Tensor = ((queries * self.scale) @ keys.transpose(-2, -1) + bias).softmax(-1)
        return weights @ values

    def places(self) -> Iterator[tuple[Side, str, range]]:
        """Yield for queries, keys and values the side, the layer that writes them, and its outputs that are them."""
        for name, sides in self.sides.items():
            ends = itertools.accumulate((self.heads * self.widths[side] for side in sides), initial=0)
            for side, (start, end) in zip(sides, itertools.pairwise(ends), strict=True):
                yield side, name, range(start, end)

    def slices(self, side: Side) -> Iterator[Slices]:
        """Yield the weights of a side's dimensions, which count through all heads, for a criterion to score."""
        everything = range(self.heads * self.widths[side])
        for own, name, rows in self.places():
            if own == side:
                yield slices_of(linear(self, name), rows, everything, output=True)
        if side == "value":
            yield slices_of(linear(self, self.output), everything, everything, output=False)


def open_heads_(model: nn.Module, images: Tensor) -> bool:
    """Replace in place each attention by a HeadAttention that returns the same and has the same weights; tell whether there is any.

    Of `images` (1, c, h, w) only the shape matters.
    """
    for attention, args, kwargs in attention_calls(model, images):
        module, layers = attention.module, [linear(attention.module, name) for name in attention.inputs]
        drops = any(part.p for part in module.modules() if isinstance(part, nn.Dropout))
        drops |= any(value for name, value in vars(module).items() if "drop" in name)
        if drops or sum(layer.out_features for layer in layers) != len(PARTS) * attention.heads * attention.size:
            continue
        own = HeadAttention(attention).train(module.training)
        try:
            with torch.no_grad():
                plain = same(module(*args, **kwargs), own(*args, **kwargs))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            continue  # it has more inputs, or computes something else
        if plain and own.state_dict().keys() == module.state_dict().keys():
            model.set_submodule(attention.path, own)
    return bool(_opened(model))


def side_root(path: str, side: Side) -> str:
    """Return the root of a group of dimensions; no path of a module ends in a bracket."""
    return f"{path}[{side}]"


def side_of(root: str) -> tuple[str, Side] | None:
    """Return the attention's path and the side of a group of dimensions; None for other roots."""
    return next(((root.removesuffix(f"[{side}]"), side) for side in PARTS if root.endswith(f"[{side}]")), None)


def cut_side_(model: nn.Module, path: str, side: Side, dimensions: Sequence[int]) -> None:
    """Remove dimensions of one attention in place, as many of each head; they count through all heads."""
    module = model.get_submodule(path)
    if not isinstance(module, HeadAttention):
        module = HeadAttention(attention_at(model, path)).train(module.training)
        model.set_submodule(path, module)
    kept = sorted({*range(module.heads * module.widths[side])} - {*dimensions})
    rows: dict[str, list[int]] = {}
    for own, name, outputs in module.places():
        rows.setdefault(name, []).extend([outputs[index] for index in kept] if own == side else outputs)
    for name, outputs_kept in rows.items():
        keep_outputs_(linear(module, name), outputs_kept)
    if side == "value":
        keep_inputs_(linear(module, module.output), kept)
    module.widths = module.widths | {side: len(kept) // module.heads}


@torch.no_grad()
def rotate_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sort the dimensions inside each opened head by what they are worth on batches (n, c, h, w); the network computes the same.

    Without the last dimensions, the squared error of the scores is least over pairs of a query and a key (less the mean key of its image,
    which the softmax ignores), that of the output over tokens, for each head alone. Raises CompressError if a value is not finite.
    """
    sums: dict[tuple[HeadAttention, int], Tensor] = {}

    def read(module: HeadAttention, hidden_states: Tensor, mask: Tensor | None = None) -> None:
        queries, keys, values = module.parts(hidden_states)
        attended = F.pad(module.attend(queries, keys, values, mask), (0, 1), value=1.0)
        for part, rows in enumerate((queries, keys - keys.mean(2, keepdim=True), attended)):
            square = torch.einsum("nhti,nhtj->hij", rows, rows).double()
            sums[module, part] = sums.get((module, part), torch.zeros_like(square)) + square

    _run_with(model, batches, read)
    for path, module in model.named_modules():
        if not isinstance(module, HeadAttention):
            continue
        if not all(bool(sums[module, part].isfinite().all()) for part in range(len(PARTS))):
            raise CompressError(
                f"{path}: its inputs are not finite, so its heads cannot be sorted: give weights and images that are"
            )
        query, key, attended = (sums[module, part] for part in range(len(PARTS)))  # (heads, width, width)
        count, mean = attended[:, -1:, -1:], attended[:, :-1, -1:] / attended[:, -1:, -1:]
        (root, inverse), (key_root, key_inverse) = _roots(query / count), _roots(key / count)
        left, singular, right = torch.linalg.svd(root @ key_root)
        balance = singular.clamp(min=TINY).sqrt()[:, None]
        output = linear(module, module.output)
        columns = output.weight.double().unflatten(1, (module.heads, -1)).movedim(1, 0)  # (heads, outputs, width)
        square = attended[:, :-1, :-1] / count - mean @ mean.mT
        root, value_inverse = _roots(square)
        vectors = torch.linalg.eigh(root @ columns.mT @ columns @ root)[1].flip(-1)
        level = square.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY).sqrt()[:, None, None]  # weights keep their size
        changes = inverse @ left * balance, key_inverse @ right.mT * balance, value_inverse @ vectors * level
        for change, (_, name, rows) in zip(changes, module.places(), strict=True):
            for tensor in linear(module, name).parameters():
                by_head = tensor[rows].double().reshape(module.heads, change.shape[1], -1)
                tensor[rows] = (change.mT @ by_head).reshape(tensor[rows].shape).to(tensor.dtype)
        output.weight.copy_((columns @ root @ vectors / level).movedim(0, 1).flatten(1))


@torch.no_grad()
def query_key_errors(model: nn.Module, batches: Iterable[Tensor]) -> dict[nn.Module, Tensor]:
    """Return for each HeadAttention what its output loses where heads keep 0, 1, ... dimensions of queries and keys, (width,).

    It is a fraction of the output's variance, measured at some widths on the last of batches (n, c, h, w).
    """
    found: dict[nn.Module, Tensor] = {}

    def read(module: HeadAttention, hidden_states: Tensor, mask: Tensor | None = None) -> None:
        (queries, keys, values), width = module.parts(hidden_states), module.widths["query_key"]
        weight = linear(module, module.output).weight

        def energy(attended: Tensor) -> float:
            return float(F.linear(attended.transpose(1, 2).flatten(2), weight).square().sum())

        whole = module.attend(queries, keys, values, mask)
        tried = np.unique(np.linspace(1, width, LEVELS).astype(int))
        errors = [energy(module.attend(queries[..., :kept], keys[..., :kept], values, mask) - whole) for kept in tried]
        variance = max(energy(whole - whole.mean((0, 2), keepdim=True)), TINY)
        lost = np.interp(np.arange(width), tried, np.maximum.accumulate(errors[::-1])[::-1] / variance)
        found[module] = torch.from_numpy(lost + np.linspace(1e-5, 0, width)).float()  # the last dimension is the least

    _run_with(model, batches, read)
    return found


def _opened(model: nn.Module) -> list[HeadAttention]:
    return [module for module in model.modules() if isinstance(module, HeadAttention)]


def _run_with(model: nn.Module, batches: Iterable[Tensor], read: Callable[..., None]) -> None:
    """Run the network, and have `read` called with each HeadAttention and what it is given."""

    def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        read(module, args[0] if args else kwargs["hidden_states"], mask)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in _opened(model)]
    try:
        for images in batches if handles else ():
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def _roots(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of positive semi-definite matrices (heads, width, width), and its inverse."""
    values, vectors = torch.linalg.eigh(square)
    roots = values.clamp(min=TINY).maximum(FLOOR * values.amax(-1, keepdim=True)).sqrt()[:, None]
    return vectors * roots @ vectors.mT, vectors / roots @ vectors.mT
