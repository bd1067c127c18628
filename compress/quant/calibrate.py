"""Calibrate each activation quantizer's range: extremes, a percentile, or least Kullback-Leibler divergence.

One pass over unaugmented batches fills a histogram for each quantizer; every method reads its range from that.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import CompressError
from compress.quant.fake_quant import ActivationQuantizer
from compress.quant.prepare import set_phase_
from compress.quant.rows import Method

PERCENTILE = 99.999
BINS = 2**14  # on each side of zero; after a doubling, at least half of them are in use
ENTROPY_BINS, ENTROPY_STEP = 2048, 8  # Migacz 2017 tries every bin; eight bins are 0.4 % of the largest range
SMALLEST_TOP = 2.0**-24


class Histogram:
    """Counts of a tensor's values over [-top, top]; when a value lies outside, top doubles and bins merge in pairs."""

    def __init__(self) -> None:
        self.top, self.low, self.high = SMALLEST_TOP, 0.0, 0.0  # every range contains zero
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS, np.int64)

    def add_(self, values: Tensor) -> None:
        """Count every value of a tensor; CompressError if one is not finite."""
        if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # the order in memory: twenty times faster to reduce
        flat = values.detach().float().reshape(-1)
        low, high = (float(extreme) for extreme in flat.aminmax())
        if not np.isfinite(high - low):
            raise CompressError(
                "calibration: an activation is not finite; the network's weights are damaged, train again"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        while self.top < max(-self.low, self.high):
            self.top *= 2
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(merged, BINS // 2)
        # bincount is exact and faster; histc counts in float32. Scaling by a power of two is exact.
        bins = flat.mul(BINS / self.top).floor_().add_(BINS).clamp_(max=2 * BINS - 1).to(torch.int32)
        self.counts += torch.bincount(bins, minlength=2 * BINS).cpu().numpy()


def calibrate_(prepared: nn.Module, batches: Iterable[Tensor], method: Method) -> None:
    """Set every quantizer's range from `batches`, each (n, c, h, w); the model ends in eval mode, phase "adapt"."""
    set_ranges_(prepared, collect(prepared, batches), method)


@torch.no_grad()
def collect(prepared: nn.Module, batches: Iterable[Tensor]) -> dict[str, Histogram]:
    """Return the histogram of each quantizer's input, by its module path, while nothing rounds activations.

    Raises CompressError if there is no batch.
    """
    named = {name: part for name, part in prepared.named_modules() if isinstance(part, ActivationQuantizer)}
    histograms = {name: Histogram() for name in named}
    handles = [quantizer.register_forward_pre_hook(_counter(histograms[name])) for name, quantizer in named.items()]
    prepared.eval()
    set_phase_(prepared, "observe")
    try:
        for batch in batches:
            prepared(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(histogram.counts.any() for histogram in histograms.values()):
        raise CompressError("calibration: there are no images; raise calibration_images, or check the data folder")
    set_phase_(prepared, "adapt")
    return histograms


def set_ranges_(prepared: nn.Module, histograms: Mapping[str, Histogram], method: Method) -> None:
    """Set every quantizer's range from its histogram."""
    for name, histogram in histograms.items():
        quantizer = prepared.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        quantizer.set_range_(*METHODS[method](histogram, quantizer.target.symmetric_activations))


def minmax(histogram: Histogram, _symmetric: bool) -> tuple[float, float]:
    """Return the smallest and the largest value."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, _symmetric: bool, percent: float = PERCENTILE) -> tuple[float, float]:
    """Return the range that cuts off a fraction 1 - percent / 100 of the values at each end, as numpy.percentile does, within a bin.

    That is linear between the values of two ranks; the values of a bin are taken to lie evenly in it. Both ends are treated alike.
    """
    before = np.cumsum(histogram.counts)
    ranks = (before[-1] - 1) * np.array([1 - percent / 100, percent / 100])
    low, high = ((1 - part) * _value(histogram, before, int(rank)) + part * _value(histogram, before, math.ceil(rank))
                 for rank, part in zip(ranks, ranks % 1, strict=True))  # fmt: skip
    return max(histogram.low, min(low, 0.0)), min(histogram.high, max(high, 0.0))


def _value(histogram: Histogram, before: NDArray[np.int64], rank: int) -> float:
    """Return the value of a rank, from 0; `before` are the cumulative counts."""
    bin_ = int(np.searchsorted(before, rank, side="right"))
    count = int(histogram.counts[bin_])
    inside = (rank - (int(before[bin_]) - count) + 0.5) / count
    return (bin_ + inside - BINS) / BINS * histogram.top


def entropy(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """Return the range [-t, t], cut to the extremes, whose quantized distribution of |x| has the least divergence.

    Migacz 2017 (8-bit inference with TensorRT), slides 38 to 40.
    """
    largest = max(-histogram.low, histogram.high)
    if largest == 0:
        return 0.0, 0.0
    negative, positive = histogram.counts.reshape(2, BINS)
    used = int(np.ceil(largest / histogram.top * BINS))
    width = -(-used // ENTROPY_BINS)  # fine bins per coarse bin
    counts = np.add.reduceat((positive + negative[::-1])[:used], np.arange(0, used, width))
    levels = 256 if histogram.low == 0 and not symmetric else 128
    if len(counts) < levels:  # values far below SMALLEST_TOP fill a few bins
        return minmax(histogram, symmetric)
    kept = least_divergent(counts, levels=levels)
    threshold = kept * width / BINS * histogram.top
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def least_divergent(counts: NDArray[np.int64], *, levels: int, step: int = ENTROPY_STEP) -> int:
    """Return how many bins to keep for the least divergence when rounded to `levels`; cut counts join the last bin."""
    values = counts.astype(np.float64)
    # Zeros are exact on every grid, and after a ReLU they would outweigh the rest (pytorch-quantization does the same).
    values[0] = values[1]
    sizes = range(len(values), levels - 1, -step)
    return min(sizes, key=lambda size: _divergence(values, size, levels))


def _divergence(counts: NDArray[np.float64], size: int, levels: int) -> float:
    """Return the Kullback-Leibler divergence of the quantized first `size` bins from the clipped distribution."""
    level = np.arange(size) * levels // size
    true, occupied = counts[:size].copy(), counts[:size] > 0
    sums, bins = np.bincount(level, true, levels), np.bincount(level, occupied, levels)
    rounded = np.where(occupied, (sums / np.maximum(bins, 1))[level], 0.0)
    true[-1] += counts[size:].sum()
    support = true > 0
    if not np.all(rounded[support] > 0):
        return np.inf
    true, rounded = true[support] / true.sum(), rounded[support] / rounded.sum()
    return float(np.sum(true * np.log(true / rounded)))


def _counter(histogram: Histogram) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: histogram.add_(inputs[0])


METHODS: dict[Method, Callable[[Histogram, bool], tuple[float, float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
}
