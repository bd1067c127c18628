"""Least squares for one layer: its inputs as rows, and the weight correction that restores its missing output.

Sources: He et al. 2017, Channel Pruning, eq. 4; Luo et al. 2017, ThiNet, eq. 6; Frantar & Alistarh 2022, OBC (the same closed form when the
reference is the network itself); Narshana et al. 2023, OBSPA, for coupled channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOLVED = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # as fractions of the inputs' mean square


def layer_rows(layer: SOLVED, inputs: Tensor, positions: Tensor, width: int) -> Tensor:
    """Return the layer's input patches for some positions of its output, (n * p, groups, inputs of a group * kernel).

    `positions` (n, p) count row by row in the output map of `width` columns; for a linear layer, over all dimensions but the channel's.
    """
    number = torch.arange(len(positions), device=inputs.device)[:, None]
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(positions), -1, inputs.shape[-1])[number, positions].flatten(0, 1)[:, None]
    sides = _padding(layer)
    if layer.padding_mode != "zeros":
        inputs, sides = F.pad(inputs, sides, mode=layer.padding_mode), (0, 0, 0, 0)
    height, breadth = inputs.shape[-2:]
    ys, inside_y = _sources(layer, positions // width, height, axis=0, before=sides[2])  # (n, p, kernel height)
    xs, inside_x = _sources(layer, positions % width, breadth, axis=1, before=sides[0])
    index = (ys[..., :, None] * breadth + xs[..., None, :]).flatten(2)  # (n, p, kernel)
    inside = (inside_y[..., :, None] & inside_x[..., None, :]).flatten(2)
    pixels = inputs.permute(0, 2, 3, 1).flatten(1, 2)  # (n, height * breadth, channels)
    seen = pixels[number[..., None], index] * inside[..., None]  # (n, p, kernel, channels)
    rows: Tensor = seen.flatten(0, 1).unflatten(-1, (layer.groups, -1))
    return rows.permute(0, 2, 3, 1).flatten(2)


def _padding(layer: nn.Conv2d | nn.ConvTranspose2d) -> tuple[int, ...]:
    """Return left, right, top, bottom."""
    if isinstance(layer.padding, str):
        return tuple(layer._reversed_padding_repeated_twice)
    rows, columns = layer.padding
    return (columns, columns, rows, rows)


def _sources(
    layer: nn.Conv2d | nn.ConvTranspose2d, outputs: Tensor, size: int, *, axis: int, before: int
) -> tuple[Tensor, Tensor]:
    """Return which inputs along one axis the outputs (n, p) read, (n, p, kernel), and whether each lies inside the image."""
    stride = layer.stride[axis]
    offsets = torch.arange(layer.kernel_size[axis], device=outputs.device) * layer.dilation[axis]
    if isinstance(layer, nn.ConvTranspose2d):
        scaled = outputs[..., None] + before - offsets
        found, met = scaled.div(stride, rounding_mode="floor"), scaled % stride == 0
    else:
        found = outputs[..., None] * stride - before + offsets
        met = torch.ones_like(found, dtype=torch.bool)
    return found.clamp(0, size - 1), met & (found >= 0) & (found < size)


def weight_matrix(layer: SOLVED) -> Tensor:
    """Return the weights as (groups, outputs of a group, inputs of a group * kernel)."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()[None]
    groups: Tensor = layer.weight.detach().unflatten(0, (layer.groups, -1))
    return (groups.transpose(1, 2) if isinstance(layer, nn.ConvTranspose2d) else groups).flatten(2)


def set_weight_matrix_(layer: SOLVED, matrix: Tensor) -> None:
    """Write weights of `weight_matrix`'s shape back into the layer."""
    if isinstance(layer, nn.ConvTranspose2d):
        outputs, kernel = matrix.shape[1], layer.weight.shape[2:]
        matrix = matrix.reshape(layer.groups, outputs, -1, *kernel).transpose(1, 2)
    layer.weight.detach().copy_(matrix.reshape(layer.weight.shape))


def image_sizes(outputs: Tensor) -> Tensor:
    """Return the root mean square of each image's outputs (n, ...), float32 (n,)."""
    return outputs.float().flatten(1).square().mean(1).sqrt()


def image_weights(sizes: Tensor, median: Tensor | None = None) -> Tensor:
    """Return what each image's rows of a least-squares problem are multiplied by, (n,), for its outputs' `image_sizes`.

    Images of larger outputs than the median image's count as if they were as large (Huber 1964). A network can answer a few images
    with outputs a thousand times as large as others: in a hundredth of the images, 99 % of all squared outputs.
    """
    median = (sizes.median() if median is None else median).clamp(min=torch.finfo(torch.float32).tiny)
    return median / sizes.maximum(median)


def solve(
    inputs: Tensor, missing: Tensor, held_out: Tensor, weights: Tensor, *, offset: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the weight correction (groups, outputs, d) and offset (groups, outputs), or None if they would not help.

    Minimizes |w(missing - D·inputs - offset)|² + δ|D|² over `inputs` (rows, groups, d) and `missing` (rows, groups, outputs), where w is
    `weights` (rows,). The ridge δ is chosen by the error on the held-out rows (`held_out` (rows,)); the final solution uses all rows. Without
    `offset` the offset is zero. With fewer rows than inputs the dual form is solved: D = Rᵀ(XXᵀ + δI)⁻¹X instead of RᵀX(XᵀX + δI)⁻¹.
    """
    scale, shares = weights[:, None, None], weights.square() * (float(offset) / weights.square().sum())
    mean_input, mean_missing = (torch.tensordot(shares, values, dims=1) for values in (inputs, missing))
    rows = (inputs - mean_input).mul_(scale).transpose(0, 1)  # (groups, rows, d)
    rest = (missing - mean_missing).mul_(scale).transpose(0, 1)  # (groups, rows, outputs)
    fitted, judged = rows[:, ~held_out], rows[:, held_out]
    few_rows = rows.shape[1] < rows.shape[2]
    if few_rows:
        whole = rows @ rows.transpose(1, 2), rest
        part = whole[0][:, ~held_out][:, :, ~held_out], rest[:, ~held_out]
        judge = whole[0][:, held_out][:, :, ~held_out]
    else:
        part, whole, judge = _moments(fitted, rest[:, ~held_out]), _moments(judged, rest[:, held_out]), judged
        whole = part[0] + whole[0], part[1] + whole[1]
    least, chosen = float(rest[:, held_out].double().square().mean()), None
    for ridge in RIDGES:
        solution = _ridge(*part, ridge, inputs=rows.shape[2])
        if solution is not None:
            error = float((rest[:, held_out] - judge @ solution).double().square().mean())
            if error < least:
                least, chosen = error, ridge
    solution = None if chosen is None else _ridge(*whole, chosen, inputs=rows.shape[2])
    if solution is None:
        return None
    correction = (rows.transpose(1, 2) @ solution if few_rows else solution).transpose(1, 2)
    return correction, mean_missing - (correction @ mean_input[..., None])[..., 0]


def _moments(rows: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    return rows.transpose(1, 2) @ rows, rows.transpose(1, 2) @ rest


def _ridge(moments: Tensor, right: Tensor, ridge: float, *, inputs: int) -> Tensor | None:
    """Return (moments + δI)⁻¹ right, where δ is `ridge` times the inputs' mean square; None if that is still singular."""
    damped = moments.double()
    square = damped.diagonal(dim1=1, dim2=2).sum(1) / inputs
    damped.diagonal(dim1=1, dim2=2).add_((ridge * square).clamp(min=1e-30)[:, None])
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if bool(failed.any()) else torch.cholesky_solve(right.double(), factor).to(right.dtype)
