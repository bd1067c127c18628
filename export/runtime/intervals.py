"""Exact confidence intervals of a binomial proportion and of a median."""

import math

import numpy as np
from numpy.typing import NDArray

TAIL = 0.025  # beyond each end of a 95 % interval


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a binomial proportion (Clopper & Pearson 1934): each end has a tail of 2.5 %.

    The ends are beta quantiles, found here by bisection to the last bit, so that scipy is not needed.
    """
    low = 0.0 if successes == 0 else _bisect(successes, trials)
    # The upper end counts failures: P(X <= k | p) = P(n - X >= n - k | 1 - p).
    high = 1.0 if successes == trials else 1 - _bisect(trials - successes, trials)
    return low, high


def median_interval(values: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the median of the distribution of `values` (n,), whatever that distribution is.

    The median lies between the d-th smallest and d-th largest value with the probability that n fair coins show at least d heads and d
    tails; other confidences are interpolated (Hettmansperger & Sheather 1986). Infinite if n is too small: 95 % needs six values.
    """
    ordered, n = np.sort(values), len(values)
    covered = [1.0]  # probability of [d-th smallest, d-th largest]; d = 0 is the whole line
    for count in range(n // 2):
        covered.append(covered[-1] - 2 * math.comb(n, count) / 2**n)
    if n < 2 or covered[1] < confidence:
        return -math.inf, math.inf
    d = max(index for index, coverage in enumerate(covered) if coverage >= confidence)
    inner = covered[d + 1] if d + 1 < len(covered) else 0.0
    excess = (covered[d] - confidence) / (covered[d] - inner)
    inwards = (n - d) * excess / (d + (n - 2 * d) * excess)
    low = (1 - inwards) * ordered[d - 1] + inwards * ordered[d]
    high = (1 - inwards) * ordered[n - d] + inwards * ordered[n - d - 1]
    return float(low), float(high)


def _bisect(successes: int, trials: int) -> float:
    """Return the p for which the probability of at least `successes` in `trials`, which grows with p, is TAIL."""
    logs = np.log(np.arange(1, trials + 1))
    factorials = np.concatenate([[0.0], np.cumsum(logs)])
    counts = np.arange(successes, trials + 1)
    choose = factorials[trials] - factorials[counts] - factorials[trials - counts]
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        weight = np.exp(choose + counts * np.log(middle) + (trials - counts) * np.log1p(-middle)).sum()
        low, high = (middle, high) if weight < TAIL else (low, middle)
    return middle
