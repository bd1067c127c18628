"""The exact confidence interval of a fraction that was counted."""

import numpy as np


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a binomial proportion (Clopper & Pearson 1934): its ends are where a tail weighs (1 - confidence) / 2.

    The ends are beta quantiles; found by bisecting the tail itself, to the last bit, so that no scipy is needed.
    """
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _bisect(successes, trials, tail)
    # The upper end counts failures: P(X <= k | p) = P(n - X >= n - k | 1 - p).
    high = 1.0 if successes == trials else 1 - _bisect(trials - successes, trials, tail)
    return low, high


def _bisect(successes: int, trials: int, tail: float) -> float:
    """Return the p at which `successes` or more of `trials` have probability `tail`; it grows with p."""
    logs = np.log(np.arange(1, trials + 1))
    factorials = np.concatenate([[0.0], np.cumsum(logs)])
    counts = np.arange(successes, trials + 1)
    choose = factorials[trials] - factorials[counts] - factorials[trials - counts]
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        weight = np.exp(choose + counts * np.log(middle) + (trials - counts) * np.log1p(-middle)).sum()
        low, high = (middle, high) if weight < tail else (low, middle)
    return middle
