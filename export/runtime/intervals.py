"""95 % confidence intervals: of counts and medians exact, of means over images and of scores by resampling images."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

TAIL = 0.025  # beyond each end of a 95 % interval
DRAWS, BLOCK = 2000, 4_000_000  # resamples, and weights drawn at once


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a binomial proportion (Clopper & Pearson 1934): each end has a tail of 2.5 %.

    The ends are beta quantiles, found here by bisection to the last bit, so that scipy is not needed.
    """
    low = 0.0 if successes == 0 else _bisect(successes, trials)
    # The upper end counts failures: P(X <= k | p) = P(n - X >= n - k | 1 - p).
    high = 1.0 if successes == trials else 1 - _bisect(trials - successes, trials)
    return low, high


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of such fractions (n,), one for each image.

    Exact for counts of images (all 0 or 1). Else quantiles of the mean with random weights of the images (Bayesian bootstrap, Rubin 1981),
    each end with one more image, as bad or as good as the worst or best seen: Gaffke's bound (2005), which for counts is Clopper and
    Pearson's; its own further image is at 0 and 1, and would hide every difference above 95 % of 78 images. In simulations of agreements of
    pixels and detections it holds the truth in 93 to 97 % of cases from 78 images on, the plain percentiles in 87 to 95 %.
    """
    images = len(values)
    if np.isin(values, (0, 1)).all():
        return clopper_pearson(round(values.sum()), images)
    random, extremes = np.random.default_rng(0), np.array([values.min(), values.max()])
    means = np.empty((DRAWS, 2))
    for part in np.array_split(means, 1 + DRAWS * images // BLOCK):
        weights = random.standard_exponential((len(part), images + 1))
        part[:] = weights[:, :images] @ values[:, None] + weights[:, images:] * extremes
        part /= weights.sum(axis=1, keepdims=True)
    return float(np.quantile(means[:, 0], TAIL)), float(np.quantile(means[:, 1], 1 - TAIL))


def score_interval(score: float, resampled: NDArray[np.float64], images: int) -> tuple[float, float]:
    """Return the 95 % interval of a score from 0 to 1 that is no mean over images, from the same score of resampled images.

    Bootstrap's normal interval (Davison & Hinkley 1997, 5.2.1) of the log-odds, so that it stays within 0 and 1, around the score less the
    resamples' bias: few images score too high a mAP. In simulations of mIoU and both mAPs on 40 to 150 images it holds the truth in 89 to
    97 % of cases. That of a count where the score does not vary.
    """
    spread = float(np.std(resampled))
    if not 0 < score < 1 or not spread:
        return clopper_pearson(round(score * images), images)
    corrected = 2 * score - float(np.mean(resampled))
    centre = corrected if 0 < corrected < 1 else score
    place, away = math.log(centre / (1 - centre)), NormalDist().inv_cdf(1 - TAIL) * spread / (centre * (1 - centre))
    low, high = (1 / (1 + math.exp(-max(-500.0, min(500.0, end)))) for end in (place - away, place + away))
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
