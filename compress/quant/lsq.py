"""Learned step sizes: the gradients of Esser et al. 2020 (Learned Step Size Quantization), with LSQ+'s asymmetric ranges (Bhalgat 2020).

The parameter is the range h = Q·s, in the tensor's own units, instead of the step s. With SGD both are the same method: the gradient
Q²·g·∂L/∂h moves h/Q exactly as g·∂L/∂s moves s, g = 1/√(N·Q) (eq. 5 ff.). Adam moves every parameter by about its rate, whatever the
gradient: 0.001 is 5 % of a step of 0.02, but only 0.02 % of a range of 5.
"""

from typing import Any

import torch
from torch import Tensor


class _RoundLearned(torch.autograd.Function):
    """Round to a grid, with gradients for the values, the step and the two ends of the range.

    Between the ends ∂v̂/∂s is round(v/s) - v/s (eq. 3). At an end or beyond it, the whole gradient goes to the end and none to the value
    (eq. 5). Where the end is Q·s, autograd turns that into ∂v̂/∂s = Q, the other two cases of eq. 3; where the end is a parameter of its own
    (asymmetric ranges), it is LSQ+'s offset.
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
    """Return the value unchanged and scale its gradient."""

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
    """Round to step * [lowest, highest]; at or beyond `low` and `high` (step's shape) the gradient goes to that end."""
    ends = (torch.as_tensor(end, device=values.device) for end in (lowest, highest))
    rounded: Tensor = _RoundLearned.apply(values, step, low, high, *ends)
    return rounded


def scale_gradient(learned_range: Tensor, values: int, steps: int) -> Tensor:
    """Return the range unchanged, with its gradient times Q²·g, g = 1/√(N·Q), for Q `steps` and N `values` that share it."""
    scaled: Tensor = _ScaleGradient.apply(learned_range, steps**2 / (values * steps) ** 0.5)
    return scaled
