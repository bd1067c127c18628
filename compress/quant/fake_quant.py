"""Modules that simulate INT8 in training.

Quantization is real = scale * (level - zero_point) (Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, eq. 1), on the grid of an `export.onnx_file.targets.Target`. Ranges are measured (a moving average) or
learned (`compress.quant.lsq`).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from compress.quant.lsq import round_learned, scale_gradient
from export.onnx_file.targets import Target

Ranges = Literal["moving_average", "lsq"]
# "observe" measures ranges in training mode and rounds nothing; "adapt" does both; "round" keeps the ranges.
Phase = Literal["observe", "adapt", "round"]

# Smallest scale: a constant-zero tensor or a dead channel must not divide by zero, and float16 scales must not underflow.
MIN_SCALE = 2.0**-24


class _Round(torch.autograd.Function):
    """Round to a grid; the gradient passes straight through except where values are clipped (Bengio et al. 2013).

    Plain tensor operations: on a CPU seven times faster than torch.fake_quantize_per_tensor_affine, and torch.compile fuses them.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Return the nearest of scale * [lowest, highest] for each value."""
        levels = (values / scale).round_()
        ctx.save_for_backward((levels >= lowest) & (levels <= highest))
        return levels.clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient, zero for clipped values."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class _RoundWeight(torch.autograd.Function):
    """Round to the grid of max|w|; nothing is clipped, so the gradient passes unchanged."""

    @staticmethod
    def forward(_: FunctionCtx, weight: Tensor, scale: Tensor) -> Tensor:
        """Return scale * round(weight / scale)."""
        return (weight / scale).round_().mul_(scale)

    @staticmethod
    def backward(_: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged."""
        return gradient, None


class ActivationQuantizer(nn.Module):
    """Round one tensor to the target's activation grid.

    Its range is a moving average of the batches' minimum and maximum, or (`ranges="lsq"`) two parameters that start there.
    """

    low: Tensor  # () smallest value of the range, <= 0 so that zero is exact
    high: Tensor  # () largest value of the range, >= 0

    def __init__(
        self, target: Target, *, cap: float = math.inf, momentum: float = 0.05, ranges: Ranges = "moving_average"
    ) -> None:
        super().__init__()
        self.target, self.cap, self.momentum, self.learned = target, cap, momentum, ranges == "lsq"
        self.group: str | None = None  # the layer with which `quantize_only_` switches this quantizer
        self.phase: Phase = "adapt"
        for name, start in (("low", math.inf), ("high", -math.inf)):
            if self.learned:
                self.register_parameter(name, nn.Parameter(torch.tensor(start)))
            else:
                self.register_buffer(name, torch.tensor(start))

    @property
    def quantizing(self) -> bool:
        """Whether this quantizer rounds its input."""
        return self.phase != "observe"

    @torch.no_grad()
    def observe_(self, values: Tensor) -> None:
        """Move the range towards the minimum and maximum of `values`."""
        flat = values.detach()
        if flat.dim() == 4 and flat.is_contiguous(memory_format=torch.channels_last):
            flat = flat.permute(0, 2, 3, 1)  # the order in memory: twenty times faster to reduce
        low, high = (extreme.float() for extreme in flat.aminmax())
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        first = torch.isinf(self.low)
        self.low.copy_(torch.where(first, low, torch.lerp(self.low, low, self.momentum)))
        self.high.copy_(torch.where(first, high, torch.lerp(self.high, high, self.momentum)))

    @torch.no_grad()
    def set_range_(self, low: float | Tensor, high: float | Tensor) -> None:
        """Set the range to [low, high], widened to contain zero."""
        self.low.copy_(torch.as_tensor(low).clamp(max=0.0))
        self.high.copy_(torch.as_tensor(high).clamp(min=0.0))

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale (float32 scalar) and the zero-point (int32 scalar) of the current range."""
        low, high = self._range()
        scale = self._scale(low, high)
        return scale.detach(), self._zero_point(low, scale)

    def read_scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero-point with which the levels are read: here, as they were written."""
        return self.scale_and_zero_point()

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` rounded to the grid, of the same shape."""
        # After calibration only the optimizer moves a learned range.
        if self.training and (self.phase == "observe" or (self.phase == "adapt" and not self.learned)):
            self.observe_(values)
        if not self.quantizing:
            return values
        values, (low, high) = values.float(), self._range()
        if self.learned:
            # N counts the features of one image, whatever the batch (Esser 2020, section 2.2).
            features = values.numel() // max(1, len(values))
            low, high = (scale_gradient(end, features, self._levels) for end in (low, high))
        scale = self._scale(low, high)
        zero_point = self._zero_point(low, scale)
        lowest, highest = self.target.activation_min - zero_point, self.target.activation_max - zero_point
        if not self.learned:
            rounded: Tensor = _Round.apply(values, scale, lowest, highest)
            return rounded
        if self.target.symmetric_activations:
            low, high = scale * lowest, scale * highest
        return round_learned(values, scale, low, high, lowest, highest)

    @property
    def _levels(self) -> int:
        """The number of steps in the range."""
        target = self.target
        return target.activation_max - (0 if target.symmetric_activations else target.activation_min)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the range: one on each side of zero, and with ReLU6 the upper one just below 6."""
        low, high = torch.where(self.low < 0, self.low, 0.0), torch.where(self.high > 0, self.high, 0.0)
        if math.isfinite(self.cap):
            # Just below 6, ONNX Runtime drops the Clip (ClipQuantFusion); the gradient passes, so a learned range can shrink again.
            high = high - (high.detach() - self.cap * (1 - 1e-6)).clamp(min=0.0)
        return low, high

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        span = torch.maximum(-low, high) if self.target.symmetric_activations else high - low
        return (span / self._levels).clamp(min=MIN_SCALE)

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        target = self.target
        if target.symmetric_activations:
            return torch.zeros((), dtype=torch.int32, device=scale.device)
        zero_point = (target.activation_min - low.detach() / scale.detach()).round()
        return zero_point.clamp(target.activation_min, target.activation_max).to(torch.int32)


class HardSigmoidQuantizer(ActivationQuantizer):
    """Compute relu6(x + 3) / 6 by requantizing: write x with scale 6/254 and zero-point 127, read it with 1/254 and 0.

    The grid's clipping on both sides is the function. After a convolution it is free, as the convolution writes that grid. The
    largest level reads as 255/254.
    """

    STEPS = 254  # on the slope from -3 to 3

    def __init__(self, target: Target) -> None:
        assert not target.symmetric_activations  # it needs two different zero-points
        super().__init__(target)
        self.low.fill_(-3.0)
        self.high.fill_(3.0 + 6.0 / self.STEPS)

    def observe_(self, values: Tensor) -> None:
        """Do nothing: the range is fixed by the function."""

    def set_range_(self, low: float | Tensor, high: float | Tensor) -> None:
        """Do nothing: the range is fixed by the function."""

    def read_scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero-point with which the levels read as the function's values."""
        scale, zero_point = self.scale_and_zero_point()
        return scale / 6, torch.full_like(zero_point, self.target.activation_min)

    def forward(self, values: Tensor) -> Tensor:
        """Return the hard sigmoid of `values`, on its grid while quantizing."""
        if not self.quantizing:
            return F.hardsigmoid(values)
        rounded = super().forward(values)
        if self.training:
            return rounded / 6 + 0.5
        (written, zero_point), (read, read_zero) = self.scale_and_zero_point(), self.read_scale_and_zero_point()
        return ((rounded / written).round() + (zero_point - read_zero)) * read  # to the bit as in the file


class SameRange(nn.Module):
    """Mark a tensor that lies on its producer's grid (after a max-pool or reshape); a no-op until deployed."""

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` as they are."""
        return values


class JoinRange(SameRange):
    """Mark a tensor that only a concatenation reads: write it on the concatenation's output grid, so that joining only copies.

    A no-op until deployed: rounding after the concatenation gives the same values.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        """Take the quantizer after the concatenation."""
        super().__init__()
        self._behind = (quantizer,)  # in a tuple, so that it is not registered as a submodule

    @property
    def quantizer(self) -> ActivationQuantizer:
        """The quantizer after the concatenation."""
        return self._behind[0]


def largest_weights(weight: Tensor, target: Target) -> Tensor:
    """Return the end of each output channel's grid: max|w|, float32 (out,)."""
    largest = weight.detach().float().abs().amax(tuple(range(1, weight.dim())))
    return largest.clamp(min=MIN_SCALE * target.weight_scale_divisor)


def weight_scale(weight: Tensor, target: Target) -> Tensor:
    """Return the symmetric scale of each output channel: max|w| / levels, float32 (out,)."""
    return largest_weights(weight, target) / target.weight_scale_divisor


def quantize_weight(weight: Tensor, scale: Tensor, target: Target) -> Tensor:
    """Return the weights' levels at each output channel's `scale` (out,), as floats of the weight's shape.

    The grid is symmetric, so that a negative batch-norm scale can flip the sign of a whole channel.
    """
    largest = target.weight_scale_divisor
    return (weight.detach().float() / per_channel(scale, weight)).round().clamp(-largest, largest)


def fake_quantize_weight(weight: Tensor, target: Target) -> Tensor:
    """Return `weight` rounded to each output channel's grid; gradients pass straight through."""
    rounded: Tensor = _RoundWeight.apply(weight.float(), per_channel(weight_scale(weight, target), weight))
    return rounded


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """Reshape (out,) scales to (out, 1, …), with the weight's number of dimensions."""
    return scale.view(-1, *[1] * (weight.dim() - 1))
