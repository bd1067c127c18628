"""Importance as the error that remains once the other channels make up for a removed one: the optimal brain surgeon, for whole channels.

If weights W (outputs, d) read inputs with covariance H (d, d) and lose the inputs B, the best correction leaves the squared error
tr(W_B [H⁻¹]_BB⁻¹ W_Bᵀ), and the corrected weights and H⁻¹ are known in closed form (Hassibi & Stork 1993, eq. 5; for sets of inputs
Frantar & Alistarh 2022, OBC, eq. 5 and 6; for channels Kurtić et al. 2023, ZipLM, eq. 3 and 4). Here H covers a convolution's input
channels only; the weights at each place of the kernel count as further outputs. H over channels and places ranks no better, at twelve
times the cost (docs/decisions.md).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from compress.errors import CompressError
from compress.pruning.costs import is_output_cut
from compress.pruning.least_squares import SOLVED

RIDGE = 1e-2  # of the inputs' mean square
ROWS = 64  # positions per image
MAX_CHANNELS = 8192  # of a layer: its covariance takes 256 MB
STEPS = 32  # in which a group's channels are removed; the errors are computed anew after each
CHUNK = 32  # images per forward pass


@torch.no_grad()
def input_covariances(model: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """Return the inputs' covariance (channels, channels) of each layer without groups, at random positions of the images (n, c, h, w).

    Raises CompressError if inputs are not finite.
    """
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}
    generator = torch.Generator().manual_seed(0)

    def add(layer: SOLVED, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found = inputs[0] if isinstance(layer, nn.Linear) else inputs[0].movedim(1, -1)
        rows = found.reshape(-1, found.shape[-1])
        chosen = torch.randint(len(rows), (min(len(rows), ROWS * len(found)),), generator=generator)
        rows = rows[chosen.to(rows.device)]
        square, total, n = sums.get(
            layer, (torch.zeros((), device=rows.device), torch.zeros((), device=rows.device), 0)
        )
        sums[layer] = square + rows.T @ rows, total + rows.sum(0), n + len(rows)

    small = [module for module in model.modules() if isinstance(module, SOLVED) and _weight(module) is not None]
    handles = [layer.register_forward_hook(add) for layer in small]
    try:
        for part in images.split(CHUNK):
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in model.named_modules():
        if layer in sums and not bool(sums[layer][0].isfinite().all()):
            raise CompressError(
                f"{name}: its inputs are not finite, so its channels cannot be scored: give weights and images that are"
            )
    return {layer: square / n - torch.outer(total / n, total / n) for layer, (square, total, n) in sums.items()}


def _weight(layer: SOLVED) -> Tensor | None:
    """Return the weights as (outputs * kernel, inputs); None for a grouped layer or more than MAX_CHANNELS inputs."""
    if getattr(layer, "groups", 1) > 1:
        return None
    weight = layer.weight.detach().movedim(0 if isinstance(layer, nn.ConvTranspose2d) else 1, -1).flatten(0, -2)
    return None if weight.shape[1] > MAX_CHANNELS else weight


@dataclass
class Reader:
    """A layer that reads a group's channels, with the weights of those that remain."""

    weight: Tensor  # (outputs, d)
    inverse: Tensor  # (d, d), of the inputs' covariance
    energy: float  # the outputs' variance, summed
    columns: Mapping[int, Tensor]  # the inputs of each channel of the group

    def errors(self, channels: list[int]) -> Tensor:
        """Return the fraction of the outputs' energy that each channel's removal costs, (channels,)."""
        columns = torch.stack([self.columns[channel] for channel in channels])  # (channels, b)
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]  # (channels, b, b)
        weights = self.weight[:, columns].permute(1, 2, 0)  # (channels, b, outputs)
        solved: Tensor = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum((1, 2)) / self.energy

    def remove_(self, channels: list[int]) -> None:
        """Remove channels, and let the others make up for them."""
        gone = torch.cat([self.columns[channel] for channel in channels])
        solved = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])  # (b, d)
        self.weight -= self.weight[:, gone] @ solved
        self.inverse -= self.inverse[:, gone] @ solved


@torch.no_grad()
def surgeon_scores(group: Group, covariances: Mapping[nn.Module, Tensor]) -> Tensor | None:
    """Return the remaining error of the layers behind without each channel and all less important ones, float32 (channels,).

    None if no reader of the group has a known covariance.
    """
    readers = list(_readers(group, covariances))
    if not readers:
        return None
    left, error = list(range(len(group[0].idxs))), 0.0
    scores = torch.zeros(len(left))
    step = -(-len(left) // STEPS)
    while left:
        errors = torch.stack([reader.errors(left) for reader in readers]).sum(0).cpu()
        chosen = torch.argsort(errors, stable=True)[:step].tolist()
        for place in chosen:
            error += float(errors[place])
            scores[left[place]] = error
        gone = [left[place] for place in chosen]
        left = sorted(set(left) - set(gone))
        for reader in readers if left else ():
            reader.remove_(gone)
    return scores


def _readers(group: Group, covariances: Mapping[nn.Module, Tensor]) -> Iterator[Reader]:
    for item in group.items:
        layer = item.dep.target.module
        if is_output_cut(item.dep.handler) or layer not in covariances or None in item.root_idxs:
            continue
        weight = _weight(layer)
        assert weight is not None  # else its covariance is not known
        weight, square = weight.double(), covariances[layer].double()
        energy = float((weight @ square * weight).sum())
        if energy < torch.finfo(torch.float32).tiny:
            continue  # it gives a constant, whatever it reads
        damping = RIDGE * square.diagonal().mean()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square + damping * torch.eye(len(square)).to(square)))
        inputs: dict[int, list[int]] = {}
        for root, index in zip(item.root_idxs, item.idxs, strict=True):
            inputs.setdefault(root, []).append(index)
        columns = {root: torch.tensor(found, device=weight.device) for root, found in inputs.items()}
        yield Reader(weight, inverse, energy, columns)
