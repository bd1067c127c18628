"""Calibration against brute force over all the values that passed."""

from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from networks import Mobile, lively
from torch import Tensor, fx, nn

from compress.errors import CompressError
from compress.quant.calibrate import (
    BINS,
    METHODS,
    PERCENTILE,
    Histogram,
    calibrate_,
    entropy,
    least_divergent,
    minmax,
    percentile,
)
from compress.quant.fake_quant import ActivationQuantizer
from compress.quant.prepare import prepare, quantizers
from compress.quant.rows import Method
from export.onnx_file.targets import TARGETS
from export.tasks.task import Array


def histogram_of(*parts: Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add_(part)
    return histogram


@pytest.fixture
def prepared() -> fx.GraphModule:
    return prepare(lively(Mobile(4)), TARGETS["cpu_vnni"], torch.zeros(1, 3, 16, 16))


def batches(scales: tuple[float, ...] = (1.0, 3.0, 0.5)) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for scale in scales:
        yield torch.randn(4, 3, 16, 16, generator=generator) * scale


def test_a_growing_histogram_equals_the_one_of_all_values_at_once() -> None:
    values = [torch.randn(1000) * scale for scale in (0.01, 1.0, 7.3, 0.2)]
    grown, whole = histogram_of(*values), histogram_of(torch.cat(values))
    assert grown.top == whole.top == 2.0 ** np.ceil(np.log2(float(torch.cat(values).abs().max())))
    assert np.array_equal(grown.counts, whole.counts)
    expected, _ = np.histogram(torch.cat(values).double().numpy(), len(whole.counts), (-whole.top, whole.top))
    assert np.array_equal(grown.counts, expected)


def test_memory_order_changes_no_count() -> None:
    images = torch.randn(2, 8, 5, 5)
    assert np.array_equal(
        histogram_of(images).counts, histogram_of(images.contiguous(memory_format=torch.channels_last)).counts
    )


def test_minmax_is_the_extremes_of_everything_that_passed(prepared: fx.GraphModule) -> None:
    seen: dict[nn.Module, list[Tensor]] = {quantizer: [] for quantizer in quantizers(prepared)}
    handles = [
        part.register_forward_pre_hook(lambda module, inputs: seen[module].append(inputs[0].clone())) for part in seen
    ]
    calibrate_(prepared, batches(), "minmax")
    for handle in handles:
        handle.remove()
    for quantizer, tensors in seen.items():
        assert isinstance(quantizer, ActivationQuantizer)
        values = torch.cat([tensor.flatten() for tensor in tensors])
        assert float(quantizer.low) == min(float(values.min()), 0.0)
        assert float(quantizer.high) == max(float(values.max()), 0.0)


def test_percentile_agrees_with_sorting_all_values() -> None:
    values = torch.cat([torch.randn(1_000_000), torch.tensor([40.0, -60.0])])
    low, high = percentile(histogram_of(*values.split(250_000)), False)
    expected = np.quantile(values.numpy(), [1e-5, 1 - 1e-5])
    assert low == pytest.approx(expected[0], rel=5e-3)
    assert high == pytest.approx(expected[1], rel=5e-3)


ADVERSARIAL: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda random, n: random.normal(size=n),
    "skewed": lambda random, n: random.lognormal(0, 2, n),
    "skewed, moved": lambda random, n: random.exponential(size=n) - 0.1,
    "one-sided": lambda random, n: np.maximum(random.normal(size=n), 0),
    "heavy tails": lambda random, n: random.standard_t(2, n),
    "outliers": lambda random, n: np.concatenate([random.normal(size=n - 3), [50.0, -80.0, 90.0]]),
    "constant": lambda _, n: np.full(n, 0.7),
    "two values": lambda random, n: np.where(random.random(n) < 1e-4, -3.0, 1.0),
}


@pytest.mark.parametrize("size", [50, 5_000, 200_000])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_both_ends_of_percentile_are_numpys_within_a_bin(kind: str, size: int) -> None:
    values = ADVERSARIAL[kind](np.random.default_rng(0), size).astype(np.float32)
    for sign in (1, -1):
        histogram = histogram_of(*torch.from_numpy(sign * values).split(70_000))
        expected = np.percentile(sign * values.astype(np.float64), [100 - PERCENTILE, PERCENTILE])
        wanted = min(expected[0], 0.0), max(expected[1], 0.0)
        assert percentile(histogram, False) == pytest.approx(wanted, abs=1.001 * histogram.top / BINS, rel=1e-6)


def test_percentile_of_a_relu_keeps_zero_as_its_lower_end() -> None:
    assert percentile(histogram_of(torch.randn(10_000).relu()), False)[0] == 0.0


def test_percentile_stays_within_the_extremes() -> None:
    low, high = percentile(histogram_of(torch.full((100,), 0.7)), False)
    assert low == 0.0
    assert high == pytest.approx(0.7, abs=1e-3)


def brute_divergence(counts: list[float], size: int, levels: int) -> float:
    """The divergence of Migacz 2017, slide 39, bin by bin."""
    kept = counts[:size]
    true = [*kept[:-1], kept[-1] + sum(counts[size:])]
    rounded = [0.0] * size
    for level in range(levels):
        bins = [b for b in range(size) if b * levels // size == level and kept[b] > 0]
        for b in bins:
            rounded[b] = sum(kept[i] for i in bins) / len(bins)
    divergence = 0.0
    for p, q in zip(true, rounded, strict=True):
        if p > 0 and q == 0:
            return float("inf")
        if p > 0:
            divergence += p / sum(true) * np.log(p / sum(true) / (q / sum(rounded)))
    return float(divergence)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_entropy_chooses_the_bins_of_least_divergence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts, _ = np.histogram(np.abs(rng.laplace(size=3000)), 64)
    spread = [float(counts[1]), *map(float, counts[1:])]
    divergences = {size: brute_divergence(spread, size, 8) for size in range(8, 65)}
    least = min(divergences.values())
    chosen = least_divergent(counts, levels=8, step=1)
    assert divergences[chosen] == pytest.approx(least)
    assert chosen == max(size for size, value in divergences.items() if value <= least * (1 + 1e-9))


def test_entropy_keeps_all_of_a_histogram_that_levels_hold_exactly() -> None:
    counts = np.repeat(np.arange(1, 9), 4)  # 8 levels of 4 equal bins: nothing diverges
    assert least_divergent(counts, levels=8, step=1) == len(counts)


def test_entropy_cuts_a_lone_outlier_and_minmax_does_not() -> None:
    histogram = histogram_of(torch.randn(100_000), torch.tensor([50.0]))
    assert minmax(histogram, False)[1] == 50.0
    low, high = entropy(histogram, False)
    assert 3.0 < high < 10.0
    assert low == max(-high, histogram.low)


def test_entropy_of_zeros_is_an_empty_range() -> None:
    assert entropy(histogram_of(torch.zeros(10)), True) == (0.0, 0.0)


def test_entropy_of_values_too_small_for_its_bins_keeps_them_all() -> None:
    low, high = entropy(histogram_of(torch.tensor([0.0, 1e-10])), True)
    assert (low, high) == pytest.approx((0.0, 1e-10), abs=1e-14)


@pytest.mark.parametrize("method", get_args(Method))
def test_calibration_leaves_a_model_that_quantizes_and_observes(prepared: fx.GraphModule, method: Method) -> None:
    calibrate_(prepared.train(), batches(), method)
    assert not prepared.training
    images = next(batches())
    for quantizer in quantizers(prepared):
        assert quantizer.phase == "adapt"
        assert float(quantizer.low) <= 0.0 < float(quantizer.high) < float("inf")
    assert torch.isfinite(prepared(images)).all()


def test_every_method_has_its_function() -> None:
    assert set(METHODS) == set(get_args(Method))


def test_calibration_without_images_is_refused(prepared: fx.GraphModule) -> None:
    with pytest.raises(CompressError, match="there are no images"):
        calibrate_(prepared, iter(()), "minmax")


def test_an_activation_that_is_not_finite_is_refused(prepared: fx.GraphModule) -> None:
    with pytest.raises(CompressError, match="not finite"):
        calibrate_(prepared, [torch.full((1, 3, 16, 16), float("nan"))], "minmax")
