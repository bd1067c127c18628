"""Importance by the error that is left once the other channels make up for a removed one: the optimal brain surgeon, for whole channels.

Where a layer's weights W (outputs, d) see inputs with second moments H (d, d), the best correction for the loss of the inputs B leaves the
squared error tr(W_B [H⁻¹]_BB⁻¹ W_Bᵀ), and moves the other weights and H⁻¹ in closed form (Hassibi & Stork 1993, eq. 5; for sets of inputs
Frantar & Alistarh 2022, OBC, eq. 5 and 6; for channels Kurtić et al. 2023, ZipLM, eq. 3 and 4).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from compress.errors import CompressError
from compress.pruning.costs import is_output_cut
from compress.pruning.least_squares import SOLVED, layer_rows, weight_matrix
from compress.pruning.reconstruction import ROWS, sample_positions

RIDGE = 1e-2  # of the inputs' mean square
MAX_INPUTS = 8192  # inputs * kernel of a layer whose moments are kept: 256 MB
STEPS = 32  # in which a group's channels leave; the errors are computed anew after each
CHUNK = 32  # images that the network sees at a time


@torch.no_grad()
def second_moments(model: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """Return for each layer without groups the covariance (d, d) of its inputs at some positions of the images (n, 3, s, s).

    Raises CompressError where inputs are not finite.
    """
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def add(layer: SOLVED, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        linear = isinstance(layer, nn.Linear)
        count = len(inputs[0])
        size = output.numel() // count // output.shape[-1 if linear else 1]
        generator = torch.Generator().manual_seed(0)
        positions = sample_positions(count, size, generator, rows=-(-ROWS * count // len(images))).to(output.device)
        rows = layer_rows(layer, inputs[0], positions, size if linear else output.shape[-1])[:, 0]  # (rows, d)
        square, total, n = sums.get(
            layer, (torch.zeros((), device=rows.device), torch.zeros((), device=rows.device), 0)
        )
        sums[layer] = square + rows.T @ rows, total + rows.sum(0), n + len(rows)

    layers = [module for module in model.modules() if isinstance(module, SOLVED) and getattr(module, "groups", 1) == 1]
    small = [layer for layer in layers if weight_matrix(layer).shape[2] <= MAX_INPUTS]
    handles = [layer.register_forward_hook(add) for layer in small]
    try:
        for part in images.split(CHUNK):
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    for layer, (square, _, _) in sums.items():
        if not bool(square.isfinite().all()):
            raise CompressError(
                f"{names[layer]}: its inputs are not finite, so its channels cannot be scored: give weights and images that are"
            )
    return {layer: square / n - torch.outer(total / n, total / n) for layer, (square, total, n) in sums.items()}


@dataclass
class Reader:
    """A layer that reads a group's channels, as far as they are still there."""

    weight: Tensor  # (outputs, d)
    inverse: Tensor  # (d, d), of the inputs' second moments
    energy: float  # of its outputs
    columns: Mapping[int, Tensor]  # the group's channel to the inputs that it is

    def errors(self, channels: list[int]) -> Tensor:
        """Return for each channel the fraction of the output's energy that is lost without it, (channels,)."""
        columns = torch.stack([self.columns[channel] for channel in channels])  # (channels, b)
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]  # (channels, b, b)
        weights = self.weight[:, columns].permute(1, 2, 0)  # (channels, b, outputs)
        solved: Tensor = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum((1, 2)) / self.energy

    def remove_(self, channels: list[int]) -> None:
        """Take channels away, and let the others make up for them."""
        gone = torch.cat([self.columns[channel] for channel in channels])
        solved = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])  # (b, d)
        self.weight -= self.weight[:, gone] @ solved
        self.inverse -= self.inverse[:, gone] @ solved
        # What is gone stays gone, whatever rounding says.
        self.weight[:, gone] = self.inverse[gone] = self.inverse[:, gone] = 0.0


@torch.no_grad()
def surgeon_scores(group: Group, moments: Mapping[nn.Module, Tensor]) -> Tensor | None:
    """Return the error that the layers behind are left with once each channel and all less important ones are gone, float32 (channels,).

    None where no layer with known moments reads the group.
    """
    readers = list(_readers(group, moments))
    if not readers:
        return None
    left, error = list(range(len(group[0].idxs))), 0.0
    scores = torch.zeros(len(left))
    step = -(-len(left) // STEPS)
    while left:
        errors = torch.stack([reader.errors(left) for reader in readers]).sum(0).double().cpu()
        chosen = torch.argsort(errors, stable=True)[:step].tolist()
        for place in chosen:
            error += float(errors[place])
            scores[left[place]] = error
        gone = [left[place] for place in chosen]
        left = sorted(set(left) - set(gone))
        for reader in readers if left else ():
            reader.remove_(gone)
    return scores


def _readers(group: Group, moments: Mapping[nn.Module, Tensor]) -> Iterator[Reader]:
    for item in group.items:
        layer = item.dep.target.module
        if is_output_cut(item.dep.handler) or layer not in moments or None in item.root_idxs:
            continue
        weight, square = weight_matrix(layer)[0].clone(), moments[layer].double()
        kernel = weight.shape[1] // (layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
        inputs: dict[int, list[int]] = {}
        for root, index in zip(item.root_idxs, item.idxs, strict=True):
            inputs.setdefault(root, []).extend(range(index * kernel, (index + 1) * kernel))
        energy = float((weight.double() @ square * weight).sum())
        if energy < torch.finfo(torch.float32).tiny:
            continue  # it gives a constant, whatever it reads
        damping = RIDGE * square.diagonal().mean()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square + damping * torch.eye(len(square)).to(square)))
        columns = {root: torch.tensor(found, device=weight.device) for root, found in inputs.items()}
        yield Reader(weight, inverse.to(weight.dtype), energy, columns)
