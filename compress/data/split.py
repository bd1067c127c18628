"""Choose images of each class by seed: those held out for validation, and those a limit keeps."""

import numpy as np

from compress.errors import DataError


def held_out(labels: np.ndarray, classes: tuple[str, ...], *, fraction: float, seed: int) -> np.ndarray:
    """Return a mask (n,) of the images held out: the fraction of each class, one at least, and one at least stays.

    Raises `DataError` for a class of a single image.
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label, members in _shuffled(labels, len(classes), seed):
        if len(members) < 2:
            raise DataError(
                f"class {classes[label]!r}: has {len(members)} image; a held-out split needs two at least, or give a val/ folder"
            )
        mask[members[: min(max(round(len(members) * fraction), 1), len(members) - 1)]] = True
    return mask


def limited(labels: np.ndarray, num_classes: int, *, per_class: int, seed: int) -> np.ndarray:
    """Return a mask (n,) that keeps so many images of each class."""
    mask = np.zeros(len(labels), dtype=bool)
    for _, members in _shuffled(labels, num_classes, seed):
        mask[members[:per_class]] = True
    return mask


def _shuffled(labels: np.ndarray, num_classes: int, seed: int) -> list[tuple[int, np.ndarray]]:
    generators = ((label, np.random.default_rng((seed, label))) for label in range(num_classes))
    return [(label, generator.permutation(np.flatnonzero(labels == label))) for label, generator in generators]
