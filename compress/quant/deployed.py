"""The deployed forms of the fake-quantized modules: int8 weights, int32 biases, and the operators QuantizeLinear and DequantizeLinear.

When exported they become those operators. When called they do the integer kernels' arithmetic: integer sums, one multiplication, one rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant.fake_quant import MIN_SCALE, ActivationQuantizer, per_channel
from export.onnx_file.targets import Target

ONNX_VERSION = 18
Norm = nn.modules.batchnorm._BatchNorm
# A bias may use half of int32's range; the products have the other half.
BIAS_LIMIT = 2**30


def quantize_linear(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the levels of `values`; during export, the ONNX operator QuantizeLinear."""
    if not torch.compiler.is_exporting():
        limits = torch.iinfo(zero_point.dtype)
        levels = (values / scale).round() + zero_point.float()
        return levels.clamp(limits.min, limits.max).to(zero_point.dtype)
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (values, scale, zero_point), dtype=zero_point.dtype, shape=values.shape, version=ONNX_VERSION
    )


def dequantize_linear(levels: Tensor, scale: Tensor, zero_point: Tensor, *, per_channel: bool = False) -> Tensor:
    """Return the values of `levels`, with channels in the first dimension; during export, the ONNX operator DequantizeLinear."""
    if not torch.compiler.is_exporting():
        return (levels.float() - zero_point.float()) * scale
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
    read_scale: Tensor
    read_zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.target = quantizer.target
        dtype = torch.uint8 if quantizer.target.unsigned_activations else torch.int8
        written, read = quantizer.scale_and_zero_point(), quantizer.read_scale_and_zero_point()
        for prefix, (scale, zero_point) in (("", written), ("read_", read)):
            self.register_buffer(f"{prefix}scale", scale.clone())
            self.register_buffer(f"{prefix}zero_point", zero_point.to(dtype))

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` through the Q/DQ pair."""
        levels = quantize_linear(values, self.scale, self.zero_point)
        return dequantize_linear(levels, self.read_scale, self.read_zero_point)


class DeployedSameRange(nn.Module):
    """A Q/DQ pair on the grid with which a quantizer's levels are read."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, source: DeployedQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", source.read_scale.clone())
        self.register_buffer("zero_point", source.read_zero_point.clone())

    def forward(self, values: Tensor) -> Tensor:
        """Return `values` through the Q/DQ pair."""
        return dequantize_linear(quantize_linear(values, self.scale, self.zero_point), self.scale, self.zero_point)


class FloatGuard(nn.Module):
    """Keep a float operation after a quantizer in float, by clipping its input to the range that it has anyway.

    Otherwise ONNX Runtime itself quantizes the weights of a convolution between a DequantizeLinear and a QuantizeLinear
    (WeightBiasQuantization, seen in 1.32) on the full grid, which saturates without VNNI.
    """

    def __init__(self, source: DeployedQuantizer) -> None:
        super().__init__()
        limits, zero = torch.iinfo(source.read_zero_point.dtype), int(source.read_zero_point)
        scale = float(source.read_scale)
        self.low, self.high = (limits.min - zero) * scale, (limits.max - zero) * scale

    def forward(self, values: Tensor) -> Tensor:
        """Return `values`, which already lie in the range."""
        return values.clamp(self.low, self.high)


@dataclass(frozen=True)
class Folded:
    """A folded layer: weight levels (out, …) stored as floats, their scale (out,), float bias (out,)."""

    levels: Tensor
    scale: Tensor
    bias: Tensor


def affine_of(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return each channel's factor and shift of a batch-norm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var.float() + norm.eps)
    if not norm.affine:
        return factor, -norm.running_mean.float() * factor
    factor = factor * norm.weight.detach().float()
    return factor, norm.bias.detach().float() - norm.running_mean.float() * factor


def depthwise(norm: Norm, target: Target) -> Folded:
    """Return a batch-norm that follows no layer as a 1x1 depthwise convolution; exact, as each weight is its channel's scale."""
    factor, shift = affine_of(norm)
    largest = target.weight_scale_divisor
    return Folded(largest * factor.sign().view(-1, 1, 1, 1), factor.abs() / largest, shift)


class DeployedWeights(nn.Module):
    """A convolution or linear layer whose weights are int8 in the file, behind a DequantizeLinear.

    An int32 bias has scale(input) * scale(weight), the accumulator's unit, so the runtime adds it without rounding. The bias is
    float where the target has no int32 DequantizeLinear.
    """

    weight_levels: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor
    bias_levels: Tensor
    bias_scale: Tensor
    bias_zero: Tensor
    input_scale: Tensor
    output_scale: Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear | None,
        folded: Folded,
        source: ActivationQuantizer,
        sink: ActivationQuantizer | None,
    ) -> None:
        """Copy the layer's stride, padding and groups; `layer` None means a 1x1 depthwise convolution.

        `source` quantizes the layer's input, `sink` its output; without a sink the output is float.
        """
        super().__init__()
        (input_scale, _), target = source.read_scale_and_zero_point(), source.target
        # Dead channels: raise a scale that is denormal, or so small that the bias would not fit.
        scale = torch.maximum(folded.scale, folded.bias.abs() / (input_scale * BIAS_LIMIT)).clamp(min=MIN_SCALE)
        levels = (folded.levels * per_channel(folded.scale / scale, folded.levels)).round().to(torch.int8)
        self.convolution: tuple[Any, ...] | None = ((1, 1), (0, 0), (1, 1), len(scale)) if layer is None else None
        self.sides: tuple[int, ...] | None = None  # zero padding left, right, top and bottom, where they differ
        if isinstance(layer, nn.Conv2d):
            self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)
            if str(layer.padding_mode) == "constant":  # from `layers.pad_into_convolutions_`
                self.sides = tuple(layer._reversed_padding_repeated_twice)
        self.integer_bias = target.integer_bias
        self.register_buffer("input_scale", input_scale.clone())
        self.register_buffer("output_scale", None if sink is None else sink.scale_and_zero_point()[0])
        self.register_buffer("weight_levels", levels)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(len(scale), dtype=torch.int8))
        if not target.integer_bias:
            self.register_buffer("bias", folded.bias)
            return
        bias_scale = scale * input_scale
        self.register_buffer("bias_levels", (folded.bias.double() / bias_scale.double()).round().to(torch.int32))
        self.register_buffer("bias_scale", bias_scale)
        self.register_buffer("bias_zero", torch.zeros(len(scale), dtype=torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        """Apply the layer to (n, in, h, w) or (…, in)."""
        if not torch.compiler.is_exporting():
            return self.in_integers(values)
        weight = dequantize_linear(self.weight_levels, self.weight_scale, self.weight_zero, per_channel=True)
        if self.integer_bias:
            bias = dequantize_linear(self.bias_levels, self.bias_scale, self.bias_zero, per_channel=True)
        else:
            bias = self.bias
        return self._layer(values, weight, bias)

    def in_integers(self, values: Tensor) -> Tensor:
        """Sum integers (in float32, exact up to 2^24), then round to the output's grid if there is one."""
        unit = self.weight_scale * self.input_scale
        bias = self.bias_levels.float() if self.integer_bias else self.bias / unit
        sums = self._layer((values / self.input_scale).round(), self.weight_levels.float(), bias)
        shape = (-1, 1, 1) if self.convolution is not None else (-1,)
        if self.output_scale is None:
            return sums * unit.view(shape)
        return (sums * (unit / self.output_scale).view(shape)).round() * self.output_scale

    def _layer(self, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.convolution is not None:
            stride, padding, dilation, groups = self.convolution
            padded = values if self.sides is None else F.pad(values, self.sides)
            convolved = F.conv2d(padded, weight, bias, stride, padding, dilation, groups)
            if self.sides is None or not torch.compiler.is_exporting():
                return convolved
            left, right, above, below = self.sides
            attributes = {
                "strides": stride,
                "pads": (above, left, below, right),
                "dilations": dilation,
                "group": groups,
            }
            return torch.onnx.ops.symbolic(
                "Conv", (values, weight, bias), attributes, dtype=values.dtype, shape=convolved.shape, version=18
            )
        if values.dim() == 2:
            return F.linear(values, weight, bias)
        # Only a Gemm fuses the bias (QGemm), and only two dimensions export as Gemm; the reshapes copy nothing.
        return F.linear(values.reshape(-1, values.shape[-1]), weight, bias).reshape(*values.shape[:-1], len(weight))
