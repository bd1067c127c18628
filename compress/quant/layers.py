"""Convolutions and linear layers with fake-quantized weights, and the batch-norms after them.

In training they compute in float, and batch-norm is a layer of its own. In eval mode they compute what the file computes, to the bit:
integer sums, batch-norm folded, one rounding. Anything less exact would measure another accuracy than the file's: one tie rounded the
other way in one layer makes a fifth of the levels differ forty layers later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant.deployed import DeployedWeights, Folded, affine_of, depthwise
from compress.quant.fake_quant import (
    MIN_SCALE,
    ActivationQuantizer,
    Ranges,
    fake_quantize_weight,
    largest_weights,
    per_channel,
    quantize_weight,
    weight_scale,
)
from compress.quant.lsq import round_learned, scale_gradient
from export.onnx_file.targets import Target


@dataclass(eq=False)
class Kernel:
    """One integer kernel: a layer with the batch-norm after it, or a batch-norm alone, from input grid to output grid."""

    source: ActivationQuantizer  # wrote the input
    layer: "QuantConv2d | QuantLinear | None"
    norm: "QuantNorm | None"
    sink: ActivationQuantizer | None  # rounds the output; None where that is float
    kept: DeployedWeights | None = None  # see `deployed_once`

    @property
    def start(self) -> "QuantLayer | QuantNorm":
        """The module that the deployed kernel replaces."""
        start = self.layer or self.norm
        assert start is not None
        return start

    @property
    def exact(self) -> bool:
        """Whether to compute as deployed: no part is in training mode, and all parts round."""
        rounding = [part for part in (self.source, self.layer, self.sink) if part is not None]
        training = [part for part in (*rounding, self.norm) if part is not None and part.training]
        return not training and all(part.quantizing for part in rounding)

    def deployed(self) -> DeployedWeights:
        """Return the deployed layer."""
        if self.kept is not None:
            return self.kept
        if self.layer is not None:
            return DeployedWeights(self.layer, fold(self.layer, self.norm), self.source, self.sink)
        assert self.norm is not None
        return DeployedWeights(None, depthwise(self.norm, self.source.target), self.source, self.sink)


@contextmanager
def deployed_once(model: nn.Module) -> Iterator[None]:
    """Build every deployed kernel once for all forward passes inside; weights and ranges must not change there."""
    kernels = [part.kernel for part in model.modules() if isinstance(part, QuantLayer | QuantNorm) and part.kernel]
    exact = [kernel for kernel in kernels if kernel.exact]
    for kernel in exact:
        kernel.kept = kernel.deployed()
    try:
        yield
    finally:
        for kernel in exact:
            kernel.kept = None


class QuantLayer(nn.Module):
    """What a convolution and a linear layer with fake-quantized weights share.

    The batch-norm after it stays a module of its own in training. A positive scale per output channel commutes with rounding
    (round(γ/σ·w) = γ/σ·round(w) on the folded grid), so the deployed grid is the trained one without folding at every step.
    """

    weight: Tensor
    weight_range: nn.Parameter | None  # (out,) learned largest weight of each channel
    target: Target
    quantizing: bool
    kernel: Kernel | None  # set where integers reach the layer

    def quantize_(self, target: Target, ranges: Ranges) -> None:
        """Initialize the quantization state of a plain layer whose class was just changed."""
        self.target, self.quantizing, self.kernel = target, True, None
        # Not LSQ's own start, 2·mean|w|/√Q (Esser 2020): that is meant for few bits, and at 8 bits gives a range of 3.6 max|w|.
        start = nn.Parameter(largest_weights(self.weight, target)) if ranges == "lsq" else None
        self.register_parameter("weight_range", start)

    def weight_scale(self) -> Tensor:
        """Return the scale of each output channel, (out,)."""
        if self.weight_range is None:
            return weight_scale(self.weight, self.target)
        return (self.weight_range.detach() / self.target.weight_scale_divisor).clamp(min=MIN_SCALE)

    def rounded_weight(self) -> Tensor:
        """Return the weights on their grid, or unrounded while quantization is off."""
        if not self.quantizing:
            return self.weight
        if self.weight_range is None:
            return fake_quantize_weight(self.weight, self.target)
        largest, weight = self.target.weight_scale_divisor, self.weight.float()
        learned = scale_gradient(self.weight_range, weight[0].numel(), largest).clamp(min=MIN_SCALE * largest)
        # Not `largest` times the step: that can miss max|w|, where ranges start, by the last bit.
        end = per_channel(learned, weight)
        return round_learned(weight, end / largest, -end, end, -largest, largest)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A convolution with fake-quantized weights."""

    def forward(self, images: Tensor) -> Tensor:
        """Convolve (n, in, h, w) with the rounded weights; when exact, apply the batch-norm after it too."""
        if self.kernel is not None and self.kernel.exact:
            return self.kernel.deployed().in_integers(images)
        convolved: Tensor = self._conv_forward(images, self.rounded_weight(), self.bias)
        return convolved


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer with fake-quantized weights."""

    def forward(self, features: Tensor) -> Tensor:
        """Multiply (…, in) by the rounded weights; when exact, apply the batch-norm after it too."""
        if self.kernel is not None and self.kernel.exact:
            return self.kernel.deployed().in_integers(features)
        return F.linear(features, self.rounded_weight(), self.bias)


class QuantNorm(nn.modules.batchnorm._BatchNorm):
    """The forward that batch-norms of both shapes share."""

    kernel: Kernel | None  # of the layer before it, or its own

    def forward(self, values: Tensor) -> Tensor:
        """Normalize (n, channels, …), unless the layer before it has done so."""
        if self.kernel is None or not self.kernel.exact:
            return super().forward(values)
        return values if self.kernel.layer is not None else self.kernel.deployed().in_integers(values)


class QuantNorm1d(QuantNorm, nn.BatchNorm1d):
    """A batch-norm of (n, channels)."""


class QuantNorm2d(QuantNorm, nn.BatchNorm2d):
    """A batch-norm of (n, channels, h, w)."""


def is_expectation(module: nn.Module) -> bool:
    """Tell whether a convolution only takes the mean of 0, 1, 2 … under a distribution, as behind a detector's distances (Li 2020, DFL)."""
    if (
        not isinstance(module, nn.Conv2d)
        or module.out_channels != 1
        or module.in_channels < 2
        or module.bias is not None
    ):
        return False
    weights = module.weight.detach().flatten()
    return bool(torch.equal(weights, torch.arange(len(weights), dtype=weights.dtype, device=weights.device)))


def fold(layer: QuantConv2d | QuantLinear, norm: QuantNorm | None) -> Folded:
    """Return the trained levels, with the batch-norm after the layer folded into scale, sign and bias.

    The levels are those of the unfolded weights, so nothing is rounded a second time.
    """
    scale = layer.weight_scale()
    levels = quantize_weight(layer.weight, scale, layer.target)
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().float()
    if norm is None:
        return Folded(levels, scale, bias)
    factor, shift = affine_of(norm)
    return Folded(levels * per_channel(factor.sign(), levels), scale * factor.abs(), bias * factor + shift)
