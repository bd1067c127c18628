"""Split images by class and seed: training images, and those held out for validation or tuning."""

import numpy as np

from compress.data.settings import DataSettings
from export.errors import DataError


def held_out(labels: np.ndarray, classes: tuple[str, ...], *, fraction: float, seed: int) -> np.ndarray:
    """Return the sorted indices of the held-out images: a fraction of each class, at least one and at most all but one.

    Raises DataError for a class of a single image.
    """
    chosen = []
    for label, members in enumerate(_shuffled(labels, len(classes), seed)):
        if len(members) < 2:
            raise DataError(
                f"class {classes[label]!r}: has {len(members)} image, and one must be held out for validation; "
                "add images or a val/ folder"
            )
        chosen.append(members[: min(max(round(len(members) * fraction), 1), len(members) - 1)])
    return np.sort(np.concatenate(chosen))


def parts_of(
    labels: np.ndarray, classes: tuple[str, ...], settings: DataSettings, *, has_validation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Split the training images by their labels (n,); return the indices to train on, and those held out."""
    train, out = np.arange(len(labels)), np.empty(0, np.int64)
    for _ in range((not has_validation) + settings.tuning):  # a tuning split comes after the validation split
        chosen = held_out(labels[train], classes, fraction=settings.val_fraction, seed=settings.seed)
        out, train = train[chosen], np.delete(train, chosen)
    if settings.limit_per_class is not None:
        members = _shuffled(labels[train], len(classes), settings.seed)
        train = train[np.sort(np.concatenate([own[: settings.limit_per_class] for own in members]))]
    return train, out


def sampled(labels: np.ndarray, num_classes: int, *, images: int, seed: int) -> np.ndarray:
    """Return the sorted indices of about `images` images, the same fraction of each class and at least one."""
    fraction = min(images / len(labels), 1.0)
    members = _shuffled(labels, num_classes, seed)
    return np.sort(np.concatenate([own[: max(round(len(own) * fraction), 1)] for own in members]))


def _shuffled(labels: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """Return each class's indices, shuffled by (seed, class), so that other classes' images do not matter."""
    return [
        np.random.default_rng((seed, label)).permutation(np.flatnonzero(labels == label))
        for label in range(num_classes)
    ]
