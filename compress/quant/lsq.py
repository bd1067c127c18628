"""Learned step sizes: the gradients of Esser et al. 2020 (Learned Step Size Quantization), with LSQ+'s asymmetric ranges (Bhalgat 2020).

What is learned is a range in the tensor's own units, h = Q·s for Q steps of size s. The two are the same method: SGD on h with the
gradient Q²·g·∂L/∂h moves h/Q exactly as SGD on s with g·∂L/∂s does, g = 1/√(N·Q) (eq. 5 ff.). But Adam moves every parameter by about its
rate, whatever its gradient: 0.001 is 5 % of a step of 0.02, and 0.02 % of its range of 5.
"""

from typing import Any

import torch
from torch import Tensor


class _RoundLearned(torch.autograd.Function):
    """Round to a grid, with gradients for the values, the step and the two ends.

    ∂v̂/∂s is round(v/s) - v/s between the ends (eq. 3). A value at an end or beyond it is that end, though it may be rounded to the same level
    from half a step inside: its gradient goes to the end whole, and none to the value (eq. 5). Where an end is Q·s, autograd makes that
    ∂v̂/∂s = Q, eq. 3's other two cases; where it is an asymmetric range's own parameter, it is LSQ+'s offset.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, low: Tensor, high: Tensor, lowest: Tensor, highest: Tensor
    ) -> Tensor:
        """Return the nearest of step * [lowest, highest] for each value."""
        ctx.save_for_backward(values, step, low, high)
        return (values / step).round_().clamp_(lowest, highest).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        """Return the gradients of the values, the step, the low end and the high end."""
        values, step, low, high = ctx.saved_tensors
        below, above = gradient * (values <= low), gradient * (values >= high)
        inside = gradient * ((values > low) & (values < high))
        scaled = values / step
        error = scaled.round().sub_(scaled).mul_(inside)
        return inside, *(part.sum_to_size(step.shape) for part in (error, below, above)), None, None


class _ScaleGradient(torch.autograd.Function):
    """Pass a value, scale its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        """Return `value`."""
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the scaled gradient."""
        return gradient * ctx.factor, None


def round_learned(
    values: Tensor, step: Tensor, low: Tensor, high: Tensor, lowest: Tensor | int, highest: Tensor | int
) -> Tensor:
    """Round to step * [lowest, highest]; values at `low` and `high` (step's shape), or beyond, send their gradient there."""
    ends = (torch.as_tensor(end, device=values.device) for end in (lowest, highest))
    rounded: Tensor = _RoundLearned.apply(values, step, low, high, *ends)
    return rounded


def scale_gradient(learned_range: Tensor, values: int, steps: int) -> Tensor:
    """Return the range of `steps` steps as it is, its gradient times Q²·g, g = 1/√(N·Q), for N `values` that share it."""
    scaled: Tensor = _ScaleGradient.apply(learned_range, steps**2 / (values * steps) ** 0.5)
    return scaled
