"""Compare two files on the same images: tests of the difference, and the smallest loss that they would detect."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from export.tasks.task import Array, Comparison, FileClasses

FEWEST = 6  # changed images, all for the worse, that McNemar's test does not take for chance: 2 / 2^6 < ALPHA
ALPHA = 0.05  # two-sided: for equal files, one gate in forty takes chance for a loss
POWER = 0.8
RESAMPLES = 2000
MAX_CHANCE = 0.01  # predictions that guessing equals with a higher probability are no better than chance


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value of McNemar's test (1947): by chance, half of the changed images go each way."""
    changed = lost + gained
    ways = tail = 1  # number of ways to lose 0, 1, … of them, each computed from the one before
    for count in range(min(lost, gained)):
        ways = ways * (changed - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << changed))


def detectable_loss(images: int, discordance: float) -> float:
    """Return the smallest loss (a fraction of the images) that McNemar's test detects with probability POWER.

    `discordance` is the fraction of images that only one file predicts right. Connor (1987) gives the number of images for a
    loss; this solves for the loss by bisection, with at least the number of flips that the exact test needs.
    """
    sure, often = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)

    def needs(loss: float) -> float:
        changing = max(discordance, loss)
        return (sure * math.sqrt(changing) + often * math.sqrt(changing - loss**2)) ** 2 / loss**2

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if needs(middle) <= images else (middle, high)
    return max(high, FEWEST / images)


def compare_classes(
    before: Array,
    now: Array,
    labels: Sequence[str],
    *,
    resampled: Callable[[Array, Array], Array],
    measure: str,
    changed: Array,
    how: str,
    draws: int = RESAMPLES,
) -> Comparison:
    """Compare two files' rows (n, k) of the same images by resampling images (Efron 1979), where the score is a mean over classes.

    `resampled` gives the classes' scores (draws, classes) from rows and weights (draws, n), NaN for a class without one. `changed` (n,) says
    which images are predicted differently, `how` in which way.
    """
    images = len(now)
    weights = drawn_weights(images, draws)
    was_of, now_of = resampled(before, weights), resampled(now, weights)
    was_total, now_total = mean_of_classes(was_of), mean_of_classes(now_of)
    was, is_now = (resampled(rows, np.ones((1, images)))[0] for rows in (before, now))
    gains, loss = now_total - was_total, np.nan_to_num(was - is_now)
    worse = sorted(np.flatnonzero(loss > 0).tolist(), key=lambda index: -loss[index])
    # ALPHA is divided among all classes (Bonferroni). A resample may lack a class.
    limit = ALPHA / max(int(np.isfinite(is_now).sum()), 1)
    surely = [index for index in worse if two_sided(np.nan_to_num(now_of[:, index] - was_of[:, index])) < limit]
    words = {index: f"{labels[index]} ({measure} {was[index]:.2%} to {is_now[index]:.2%})" for index in worse}
    fraction, p_value = float(np.mean(changed)), two_sided(gains)
    low, high = np.percentile(gains, [2.5, 97.5])
    return Comparison(
        images=images,
        before=float(mean_of_classes(was[None])[0]),
        now=float(mean_of_classes(is_now[None])[0]),
        p_value=p_value,
        changed=fraction,
        detectable=detectable_gain(gains, was_total, images),
        counts=f"{fraction:.2%} of {images} images {how}, change {low:+.2%} to {high:+.2%} (95 %), p = {p_value:.2g}",
        lost=tuple(words[index] for index in surely),
        worse=tuple(words[index] for index in worse),
    )


def mean_of_classes(scores: Array) -> Array:
    """Return the mean over the classes that have a score, of each row (n, classes); 0 if none has."""
    known = np.isfinite(scores)
    return np.asarray(np.where(known, scores, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1))


def drawn_weights(images: int, draws: int) -> Array:
    """Return how often each image is in each resample, (draws, images), always the same."""
    return np.stack([np.bincount(drawn, minlength=images) for drawn in resamples(images)[:draws]]).astype(np.float64)


def resamples(images: int) -> Array:
    """Return the indices of the images in each resample, (RESAMPLES, images), always the same."""
    return np.random.default_rng(0).integers(0, images, (RESAMPLES, images))


def two_sided(gains: Array) -> float:
    """Return the two-sided p-value of resampled differences: twice the fraction with the other sign; 1 for equal files."""
    return float(min(1.0, 2 * (1 + min(np.sum(gains >= 0), np.sum(gains <= 0))) / (1 + len(gains))))


def detectable_gain(gains: Array, scores: Array, images: int) -> float:
    """Return the smallest loss that resampling detects with probability POWER, from resampled differences and scores.

    A loss with the spread σ of these differences takes z(1 - ALPHA / 2) + z(POWER) times σ. But the difference may consist of few images:
    by chance all resamples but e^-m have one of m images, so a loss in fewer than FEWEST of them is none for this test either. One image
    moves the score by its spread / sqrt(n), as the variance of the score is the mean square of the images' influences / n (Hampel 1974). So
    the loss is at least FEWEST times that, also where nothing changed, and FEWEST / n where the score does not vary at all.
    """
    sure, often = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(POWER)
    fewest = FEWEST * float(np.std(scores)) / math.sqrt(images) or FEWEST / images
    return max(float((sure + often) * np.std(gains)), fewest)


def chance(images: list[int], found: FileClasses) -> tuple[float, float]:
    """Return how many predictions would be right if randomly permuted over the images, and the p-value of the actual number.

    The null hypothesis is that of Cohen's kappa (1960): a file that always predicts one class, or guesses, is at chance whatever its
    score. One-sided, by the permutation's exact mean and variance and the normal distribution. A task may bring its own (score, p-value).
    """
    if "by_chance" in found:
        return found["by_chance"]
    total = sum(images)
    pairs = [
        (of_class * answered, of_class + answered) for of_class, answered in zip(images, found["answered"], strict=True)
    ]
    matches = sum(product for product, _ in pairs)
    variance = matches - sum(product * both for product, both in pairs) / total + (matches / total) ** 2
    if total < 2 or variance <= 0:
        return matches / total, 1.0
    deviations = (sum(found["correct"]) - matches / total) / math.sqrt(variance / (total - 1))
    return matches / total, math.erfc(deviations / math.sqrt(2)) / 2
