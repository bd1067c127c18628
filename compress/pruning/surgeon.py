"""Importance as the error that remains once the other channels make up for a removed one: the optimal brain surgeon, for whole channels.

If weights W (outputs, d) read inputs with covariance H (d, d) and lose the inputs B, the best correction leaves the squared error
tr(W_B [H⁻¹]_BB⁻¹ W_Bᵀ), and the corrected weights and H⁻¹ are known in closed form (Hassibi & Stork 1993, eq. 5; for sets of inputs
Frantar & Alistarh 2022, OBC, eq. 5 and 6; for channels Kurtić et al. 2023, ZipLM, eq. 3 and 4). Here H covers a convolution's input
channels only; the weights at each place of the kernel count as further outputs. H over channels and places ranks no better, at twelve
times the cost (docs/decisions.md). A grouped convolution's outputs read the inputs of their own group only, so its WᵀW and H are block
diagonal. An attention's head is the block of inputs that its output projection reads from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from compress.errors import CompressError
from compress.pruning.costs import is_output_cut, one_to_one
from compress.pruning.heads import Attention, linear
from compress.pruning.inside_heads import HeadAttention, Side, query_key_errors
from compress.pruning.recovery.least_squares import SOLVED, image_sizes, image_weights

RIDGE = 1e-2  # of the inputs' mean square
ROWS = 64  # positions per image
MAX_CHANNELS = 8192  # of a layer: its covariance takes 256 MB
REMEMBERED = 2048  # inputs of a layer whose two matrices, of at most 32 MB each, are kept for the next group
MEASURED = 16  # images on which the errors of narrower queries and keys are measured
STEPS = 32  # in which a group's channels are removed; the errors are computed anew after each


@torch.no_grad()
def input_covariances(model: nn.Module, batches: Iterable[Tensor]) -> dict[nn.Module, Tensor]:
    """Return the inputs' covariance (channels, channels) of each layer that `_group_weights` knows, at random positions of batches (n, c, h, w).

    Positions are weighted as in the solve: images of larger inputs than the first batch's median image's count as if they were as large.
    Of a HeadAttention, the error at each width of its queries and keys (width,). Raises CompressError if inputs are not finite.
    """
    sums: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
    medians: dict[nn.Module, Tensor] = {}
    centers: dict[nn.Module, Tensor] = {}  # large means would leave nothing of small variances in float32
    generator = torch.Generator().manual_seed(0)

    def add(layer: SOLVED, inputs: tuple[object, ...], output: object) -> None:
        tensors = one_to_one(inputs, output)
        if tensors is None:
            return
        found = tensors[0] if isinstance(layer, nn.Linear) else tensors[0].movedim(1, -1)
        sizes = image_sizes(found)
        weights = image_weights(sizes, medians.setdefault(layer, sizes.median())).square()
        rows = found.reshape(-1, found.shape[-1])
        chosen = torch.randint(len(rows), (min(len(rows), ROWS * len(found)),), generator=generator).to(rows.device)
        rows, weights = rows[chosen].float(), weights[chosen // (len(rows) // len(found))]
        rows = rows - centers.setdefault(layer, rows.mean(0))
        square, total, n = sums.get(layer, (torch.zeros((), device=rows.device),) * 3)
        sums[layer] = square + rows.T @ (rows * weights[:, None]), total + weights @ rows, n + weights.sum()

    small = [module for module in model.modules() if isinstance(module, SOLVED) and _group_weights(module) is not None]
    handles = [layer.register_forward_hook(add) for layer in small]
    first: list[Tensor] = []
    try:
        for images in batches:
            model(images)
            first = first or [images[:MEASURED]]
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in model.named_modules():
        if layer in sums and not bool(sums[layer][0].isfinite().all()):
            raise CompressError(
                f"{name}: its inputs are not finite, so its channels cannot be scored: give weights and images that are"
            )
    covariances = {layer: square / n - torch.outer(total / n, total / n) for layer, (square, total, n) in sums.items()}
    return query_key_errors(model, first) | covariances


def _group_weights(layer: SOLVED) -> Tensor | None:
    """Return the weights as (groups, outputs of a group * kernel, inputs of a group).

    None for depthwise layers, which pass their inputs on, grouped transposed ones, which keep their width, and over MAX_CHANNELS inputs.
    """
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, nn.ConvTranspose2d)
    weight = layer.weight.detach().movedim(0 if transposed else 1, -1)  # (outputs, kernel, inputs of a group)
    inputs = groups * weight.shape[-1]
    if inputs > MAX_CHANNELS or (groups > 1 and (transposed or groups == inputs)):
        return None
    return weight.reshape(groups, -1, weight.shape[-1])


@dataclass
class Reader:
    """A layer that reads a group's channels, at the d inputs that it still reads them from, as if it had no others."""

    gram: Tensor  # (d, d), of the weights: WᵀW
    inverse: Tensor  # (d, d), of the inputs' covariance
    energy: float  # the outputs' variance, summed
    columns: Tensor  # (channels, b), the inputs of each channel that is left

    def errors(self) -> Tensor:
        """Return the fraction of the outputs' energy that each channel's removal costs, (channels,)."""
        blocks = self.columns[:, :, None], self.columns[:, None, :]
        solved: Tensor = torch.linalg.solve(self.inverse[blocks], self.gram[blocks])  # (channels, b, b)
        return solved.diagonal(dim1=1, dim2=2).sum(1) / self.energy

    def remove_(self, places: Tensor) -> None:
        """Remove the channels at some places, and let the others make up for them: W becomes W - W_B [H⁻¹]_BB⁻¹ [H⁻¹]_B."""
        gone = self.columns[places].flatten()
        solved = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])  # (b, d)
        crossed = self.gram[:, gone] @ solved
        gram = self.gram + solved.T @ (self.gram[gone][:, gone] @ solved) - crossed - crossed.T
        inverse = self.inverse - self.inverse[:, gone] @ solved
        kept = _all_but(len(inverse), gone)
        self.gram, self.inverse = gram[kept][:, kept], inverse[kept][:, kept]
        moved = torch.empty(len(inverse), dtype=torch.int64, device=kept.device)
        moved[kept] = torch.arange(len(kept), device=kept.device)
        self.columns = moved[self.columns[_all_but(len(self.columns), places)]]


class Surgeon:
    """Scores channels and heads by what their layers read: `covariances` of inputs (d, d), as `input_covariances` returns them."""

    def __init__(self, covariances: Mapping[nn.Module, Tensor]) -> None:
        self.covariances = covariances
        self.known: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}  # a layer can read several groups

    def channel_scores(self, group: Group, unit: int) -> Tensor | None:
        """Return the remaining error of the layers behind without each channel and all less important ones, float32 (channels,).

        The errors are fractions of the energy of the layers' outputs. `unit` channels leave together: those at the same place in each of
        `unit` equal parts. None if no reader of the group has a known covariance.
        """
        readers, places = [], len(group[0].idxs) // unit
        for item in group.items:
            if is_output_cut(item.dep.handler) or None in item.root_idxs:
                continue
            inputs: list[list[int]] = [[] for _ in range(places)]
            for root, index in zip(item.root_idxs, item.idxs, strict=True):
                inputs[root % places].append(index)
            readers.append(self._reader(item.dep.target.module, inputs))
        scores = _errors_in_order([reader for reader in readers if reader is not None], places)
        return None if scores is None else scores.repeat(unit)

    def head_scores(self, attention: Attention) -> Tensor | None:
        """Return the same for the heads of an attention, float32 (heads,)."""
        projection = attention.module.get_submodule(attention.output)
        reader = self._reader(projection, [attention.columns([head]) for head in range(attention.heads)])
        return None if reader is None else _errors_in_order([reader], attention.heads)

    def side_scores(self, module: HeadAttention, side: Side) -> Tensor | None:
        """Return the same for the dimensions inside heads, of which those at one place of all heads leave together, (heads * width,)."""
        width = module.widths[side]
        if side == "query_key":
            scores = self.covariances.get(module)
        else:
            places = [list(range(place, module.heads * width, width)) for place in range(width)]
            reader = self._reader(linear(module, module.output), places)
            scores = None if reader is None else _errors_in_order([reader], width)
        return None if scores is None else scores.repeat(module.heads)

    @torch.no_grad()
    def _reader(self, layer: nn.Module, inputs: Sequence[Sequence[int]]) -> Reader | None:
        """Return a layer as a reader of channels, each at some of its `inputs`; None if its covariance is not known, or its output constant."""
        if not isinstance(layer, SOLVED) or layer not in self.covariances:
            return None
        gram, inverse, energy = self.known.get(layer) or self._facts(layer)
        if energy < torch.finfo(torch.float32).tiny:
            return None
        columns = torch.tensor(inputs, device=gram.device)
        read = columns.flatten()
        places = torch.arange(len(read), device=gram.device).view_as(columns)
        return Reader(gram[read][:, read], inverse[read][:, read], energy, places)

    def _facts(self, layer: SOLVED) -> tuple[Tensor, Tensor, float]:
        """Return the weights' WᵀW, the inverse covariance of the inputs, both float64 (d, d), and the outputs' variance, summed."""
        weights, square = _group_weights(layer), self.covariances[layer].double()
        assert weights is not None  # else its covariance is not known
        blocks = weights.double().transpose(1, 2) @ weights.double()  # (groups, inputs of a group, inputs of a group)
        gram = torch.block_diag(*blocks)
        if len(blocks) > 1:
            square = square * torch.block_diag(*torch.ones_like(blocks))
        damping = RIDGE * square.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square + damping * torch.eye(len(square)).to(square)))
        facts = (gram, inverse, float((gram * square).sum()))
        if len(gram) <= REMEMBERED:
            self.known[layer] = facts
        return facts


def shares_in_order(scores: Tensor) -> Tensor:
    """Return the fraction of a group's importance lost without each channel and all less important ones, float32 (channels,).

    With squared weights it is what `Surgeon` gives for inputs that are uncorrelated and of the same size, so groups that have no
    known covariance compete with those that do.
    """
    order = torch.argsort(scores, stable=True)
    shares = torch.empty_like(scores)
    shares[order] = scores[order].cumsum(0)
    return shares / shares.max().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _errors_in_order(readers: Sequence[Reader], channels: int) -> Tensor | None:
    if not readers:
        return None
    left, error = torch.arange(channels), 0.0
    scores = torch.zeros(channels)
    step = -(-channels // STEPS)
    while len(left):
        errors = torch.stack([reader.errors() for reader in readers]).sum(0).cpu()
        chosen = torch.argsort(errors, stable=True)[:step]
        for place in chosen.tolist():
            error += float(errors[place])
            scores[left[place]] = error
        left = left[_all_but(len(left), chosen)]
        for reader in readers if len(left) else ():
            reader.remove_(chosen.to(reader.columns.device))
    return scores


def _all_but(length: int, places: Tensor) -> Tensor:
    """Return the indices below `length` that are not among `places`."""
    kept = torch.ones(length, dtype=torch.bool, device=places.device)
    kept[places] = False
    return kept.nonzero().flatten()
