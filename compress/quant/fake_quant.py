"""The modules that simulate INT8 while training, and their deployed form that exports as QuantizeLinear / DequantizeLinear.

The numbers are those of Jacob et al. 2018 (Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference),
eq. 1: real = scale * (level - zero_point), on the grid that `export.targets.Target` gives.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from export.targets import Target

# Smallest scale: a constant-zero tensor or a dead channel must not divide by zero, and float16 scales must not underflow.
MIN_SCALE = 2.0**-24
ONNX_VERSION = 18


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
    """Round one tensor to the target's activation grid; its range is a moving average of the batches' minimum and maximum.

    `observing` updates the range from the tensors that pass (in training mode only), `quantizing` rounds them.
    """

    low: Tensor  # () smallest value of the range, <= 0 so that zero is exact
    high: Tensor  # () largest value of the range, >= 0

    def __init__(self, target: Target, *, cap: float = math.inf, momentum: float = 0.05) -> None:
        super().__init__()
        self.target, self.cap, self.momentum = target, cap, momentum
        self.observing, self.quantizing = True, True
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))

    @torch.no_grad()
    def observe_(self, values: Tensor) -> None:
        """Move the range towards the minimum and maximum of `values`."""
        flat = values.detach()
        if flat.dim() == 4 and flat.is_contiguous(memory_format=torch.channels_last):
            flat = flat.permute(0, 2, 3, 1)  # the order in memory: twenty times faster to reduce
        low, high = flat.aminmax()
        low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
        first = torch.isinf(self.low)
        self.low.copy_(torch.where(first, low, torch.lerp(self.low, low, self.momentum)))
        self.high.copy_(torch.where(first, high, torch.lerp(self.high, high, self.momentum)))

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale (float32 scalar) and the zero-point (int32 scalar) of the present range."""
        target = self.target
        if target.symmetric_activations:
            scale = torch.maximum(-self.low, self.high) / target.activation_max
            return scale.clamp(min=MIN_SCALE), torch.zeros((), dtype=torch.int32, device=scale.device)
        levels = target.activation_max - target.activation_min
        # The range of a ReLU6 stays a hair inside 6, so that ONNX Runtime can drop the Clip (ClipQuantFusion).
        high = self.high.clamp(max=self.cap * (1 - 1e-6)) if math.isfinite(self.cap) else self.high
        scale = ((high - self.low) / levels).clamp(min=MIN_SCALE)
        zero_point = (
            (target.activation_min - self.low / scale).round().clamp(target.activation_min, target.activation_max)
        )
        return scale, zero_point.to(torch.int32)

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` rounded to the grid, of the same shape."""
        if self.observing and self.training:
            self.observe_(values)
        if not self.quantizing:
            return values
        scale, zero_point = self.scale_and_zero_point()
        low, high = self.target.activation_min - zero_point, self.target.activation_max - zero_point
        rounded: Tensor = _Round.apply(values.float(), scale, low, high)
        return rounded


class SameRange(nn.Module):
    """Mark a tensor that already lies on its producer's grid (after a max-pool, a reshape); a no-op until it is deployed."""

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` as they are."""
        return values


def weight_scale(weight: Tensor, target: Target) -> Tensor:
    """Return the symmetric scale of each output channel: max|w| / levels, float32 (out,)."""
    largest = weight.detach().float().abs().amax(tuple(range(1, weight.dim())))
    return (largest / target.weight_scale_divisor).clamp(min=MIN_SCALE)


def quantize_weight(weight: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return the int8 levels (same shape) and the scale of each output channel (out,)."""
    scale = weight_scale(weight, target)
    levels = (weight.detach().float() / _per_channel(scale, weight)).round()
    return levels.clamp(target.weight_min, target.weight_max).to(torch.int8), scale


def fake_quantize_weight(weight: Tensor, target: Target) -> Tensor:
    """Return `weight` rounded to each output channel's grid; gradients pass straight through."""
    rounded: Tensor = _RoundWeight.apply(weight.float(), _per_channel(weight_scale(weight, target), weight))
    return rounded


def _per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    """Return (out,) scales as (out, 1, …), one dimension for each of the weight's."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


class QuantConv2d(nn.Conv2d):
    """A convolution with fake-quantized weights.

    The batch-norm behind it stays a module of its own while training. A scale of max|w| for each output channel makes rounding commute
    with the fold (round(γ/σ·w) = γ/σ·round(w) on the folded grid), so the trained grid is the deployed one without folding in the loop.
    """

    target: Target

    def forward(self, images: Tensor) -> Tensor:
        """Convolve (n, in, h, w) with the rounded weights."""
        weight = fake_quantize_weight(self.weight, self.target)
        return self._conv_forward(images, weight, self.bias)  # type: ignore[no-any-return]


class QuantLinear(nn.Linear):
    """A linear layer with fake-quantized weights."""

    target: Target

    def forward(self, features: Tensor) -> Tensor:
        """Multiply (…, in) with the rounded weights."""
        return F.linear(features, fake_quantize_weight(self.weight, self.target), self.bias)


def quantize_linear(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the ONNX operator QuantizeLinear as a traceable op."""
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (values, scale, zero_point), dtype=zero_point.dtype, shape=values.shape, version=ONNX_VERSION
    )


def dequantize_linear(levels: Tensor, scale: Tensor, zero_point: Tensor, *, per_channel: bool = False) -> Tensor:
    """Return the ONNX operator DequantizeLinear as a traceable op; per channel along the first dimension."""
    attrs: dict[str, Any] = {"axis": 0} if per_channel else {}
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (levels, scale, zero_point),
        attrs,
        dtype=torch.float32,
        shape=levels.shape,
        version=ONNX_VERSION,
    )


class DeployedQuantizer(nn.Module):
    """An activation quantizer as the pair QuantizeLinear, DequantizeLinear."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero_point = quantizer.scale_and_zero_point()
        dtype = torch.uint8 if quantizer.target.unsigned_activations else torch.int8
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(dtype))

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` through the Q/DQ pair."""
        return dequantize_linear(quantize_linear(values, self.scale, self.zero_point), self.scale, self.zero_point)


class DeployedWeights(nn.Module):
    """A convolution or linear layer whose weights are int8 and whose bias is int32 in the file, each behind a DequantizeLinear.

    The bias has scale(input) * scale(weight), the accumulator's own unit, so the runtime adds it without rounding again.
    """

    weight_levels: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias_levels: Tensor
    bias_scale: Tensor
    bias_zero: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, input_scale: Tensor, target: Target) -> None:
        super().__init__()
        levels, scale = quantize_weight(layer.weight, target)
        bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias.detach().float()
        bias_scale = scale * input_scale
        limit = 2**31 - 1
        bias_levels = (bias.double() / bias_scale.double()).round().clamp(-limit, limit).to(torch.int32)
        self.convolution = (
            (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else None
        )
        self.register_buffer("weight_levels", levels)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int8))
        self.register_buffer("bias_levels", bias_levels)
        self.register_buffer("bias_scale", bias_scale)
        self.register_buffer("bias_zero", torch.zeros(len(scale), dtype=torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layer to (n, in, h, w) or (…, in)."""
        weight = dequantize_linear(self.weight_levels, self.weight_scale, self.weight_zero, per_channel=True)
        bias = dequantize_linear(self.bias_levels, self.bias_scale, self.bias_zero, per_channel=True)
        if self.convolution is None:
            return F.linear(values, weight, bias)
        stride, padding, dilation, groups = self.convolution
        return F.conv2d(values, weight, bias, stride, padding, dilation, groups)
