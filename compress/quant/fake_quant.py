"""The modules that simulate INT8 while training.

The numbers are those of Jacob et al. 2018 (Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference),
eq. 1: real = scale * (level - zero_point), on the grid that `export.onnx_file.targets.Target` gives. Ranges are either measured (a moving average)
or learned (`compress.quant.lsq`).
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
# Measure the range of what passes in training mode and round nothing; measure and round; round on the range that is.
Phase = Literal["observe", "adapt", "round"]

# Smallest scale: a constant-zero tensor or a dead channel must not divide by zero, and float16 scales must not underflow.
MIN_SCALE = 2.0**-24


class _Round(torch.autograd.Function):
    """Round to a grid; gradients pass straight through where the value lies on it (Bengio et al. 2013).

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
        """Return the gradient where the value was not clipped."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class _RoundWeight(torch.autograd.Function):
    """Round to the grid of max|w|, on which nothing is clipped, so that the gradient passes whole."""

    @staticmethod
    def forward(_: FunctionCtx, weight: Tensor, scale: Tensor) -> Tensor:
        """Return scale * round(weight / scale)."""
        return (weight / scale).round_().mul_(scale)

    @staticmethod
    def backward(_: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it is."""
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
        self.group: str | None = None  # the layer that `quantize_only_` switches this quantizer with
        self.phase: Phase = "adapt"
        for name, start in (("low", math.inf), ("high", -math.inf)):
            if self.learned:
                self.register_parameter(name, nn.Parameter(torch.tensor(start)))
            else:
                self.register_buffer(name, torch.tensor(start))

    @property
    def quantizing(self) -> bool:
        """Whether it rounds what passes."""
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
        """Make the range [low, high], widened to hold zero."""
        self.low.copy_(torch.as_tensor(low).clamp(max=0.0))
        self.high.copy_(torch.as_tensor(high).clamp(min=0.0))

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale (float32 scalar) and the zero-point (int32 scalar) of the present range."""
        low, high = self._range()
        scale = self._scale(low, high)
        return scale.detach(), self._zero_point(low, scale)

    def read_scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero-point that readers give the levels: those they were written with."""
        return self.scale_and_zero_point()

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` rounded to the grid, of the same shape."""
        # Between calibration and the end of the training, a learned range is the optimizer's alone.
        if self.training and (self.phase == "observe" or (self.phase == "adapt" and not self.learned)):
            self.observe_(values)
        if not self.quantizing:
            return values
        values, (low, high) = values.float(), self._range()
        if self.learned:
            # One step serves the features of one image (Esser 2020, section 2.2), whatever the batch.
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
        """The steps that the range is divided into."""
        target = self.target
        return target.activation_max - (0 if target.symmetric_activations else target.activation_min)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the range: an end at zero stays there, and with ReLU6 the upper one stays a hair inside 6."""
        low, high = torch.where(self.low < 0, self.low, 0.0), torch.where(self.high > 0, self.high, 0.0)
        if math.isfinite(self.cap):
            # The hair lets ONNX Runtime drop the Clip (ClipQuantFusion); the gradient passes, so that a learned range can leave the bound.
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
    """Compute relu6(x + 3) / 6 by rounding alone: x is written with scale 6/254 and zero 127, and read with scale 1/254 and zero 0.

    The grid clips on both sides, which is the function; behind a convolution it costs nothing, as the convolution writes that grid. Its
    largest level reads as 255/254.
    """

    STEPS = 254  # of the function's slope from -3 to 3

    def __init__(self, target: Target) -> None:
        assert not target.symmetric_activations  # two zero-points are what it lives on
        super().__init__(target)
        self.low.fill_(-3.0)
        self.high.fill_(3.0 + 6.0 / self.STEPS)

    def observe_(self, values: Tensor) -> None:
        """Leave the range alone: it is the function."""

    def set_range_(self, low: float | Tensor, high: float | Tensor) -> None:
        """Leave the range alone: it is the function."""

    def read_scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale and zero-point under which the levels are the function's values."""
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
        return ((rounded / written).round() + (zero_point - read_zero)) * read  # as the file says it, to the bit


class SameRange(nn.Module):
    """Mark a tensor that already lies on its producer's grid (after a max-pool, a reshape); a no-op until it is deployed."""

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` as they are."""
        return values


class JoinRange(SameRange):
    """Mark a tensor whose one reader is a concatenation: it is written on the grid behind that, so that values only move when they are joined.

    A no-op until it is deployed: what is rounded behind a concatenation is what would be rounded before it.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        """Take the quantizer behind the concatenation."""
        super().__init__()
        self._behind = (quantizer,)  # in a tuple: it is no module of this one

    @property
    def quantizer(self) -> ActivationQuantizer:
        """The quantizer behind the concatenation."""
        return self._behind[0]


def largest_weights(weight: Tensor, target: Target) -> Tensor:
    """Return the end of each output channel's grid: max|w|, float32 (out,)."""
    largest = weight.detach().float().abs().amax(tuple(range(1, weight.dim())))
    return largest.clamp(min=MIN_SCALE * target.weight_scale_divisor)


def weight_scale(weight: Tensor, target: Target) -> Tensor:
    """Return the symmetric scale of each output channel: max|w| / levels, float32 (out,)."""
    return largest_weights(weight, target) / target.weight_scale_divisor


def quantize_weight(weight: Tensor, scale: Tensor, target: Target) -> Tensor:
    """Return the levels of each output channel's weights at `scale` (out,), float of the weight's shape.

    The grid is clipped to its symmetric part, so that a negative batch-norm scale may turn the sign of a whole channel.
    """
    largest = target.weight_scale_divisor
    return (weight.detach().float() / per_channel(scale, weight)).round().clamp(-largest, largest)


def fake_quantize_weight(weight: Tensor, target: Target) -> Tensor:
    """Return `weight` rounded to each output channel's grid of max|w|; gradients pass straight through."""
    rounded: Tensor = _RoundWeight.apply(weight.float(), per_channel(weight_scale(weight, target), weight))
    return rounded


def per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """Return (out,) scales as (out, 1, …), one dimension for each of the weight's."""
    return scale.view(-1, *[1] * (weight.dim() - 1))
