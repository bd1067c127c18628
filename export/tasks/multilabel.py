"""Multi-label: any number of labels for each image. A prediction is each class's probability, the sigmoid of its logit.

A row holds an image's true labels and probabilities. The score is the mean over classes of average precision, the area below precision over
recall without interpolation (scikit-learn's average_precision_score, macro).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from export.errors import ContentError
from export.images.tables import list_table, table_examples
from export.tasks.classification import check_output, output_shape
from export.tasks.paired import compare_classes
from export.tasks.task import Array, Classes, Comparison, FileClasses, Metric, OutputTask, Shown

THRESHOLD = 0.5  # a label is predicted from this probability on
SHUFFLES = 199  # of the true labels, for the score of a file that ignores the images
ENOUGH = 5000  # images to shuffle for it, about


def truths(values: Sequence[Any], output: tuple[int, ...]) -> Array:
    """Return 1 for each label of an image, else 0, float32 (n, classes)."""
    found = np.zeros((len(values), output[0]), np.float32)
    for row, labels in zip(found, values, strict=True):
        if not isinstance(labels, list) or not all(type(one) is int and 0 <= one < output[0] for one in labels):
            raise ContentError(
                f"bundle.json: golden.truths: must be lists of integers below {output[0]}, got {labels!r:.100}"
            )
        row[labels] = 1
    return found


def truths_json(truths: Array) -> Sequence[Sequence[int]]:
    """Return the indices of each image's labels."""
    return [np.flatnonzero(row).tolist() for row in truths]


def decode(outputs: Array) -> Array:
    """Return each class's probability (n, classes); 0 if the logit is not a number."""
    logits = np.nan_to_num(outputs.astype(np.float64), nan=-np.inf).clip(-500, 500)
    return np.asarray(1 / (1 + np.exp(-logits)))


def statistics(predictions: Array, truths: Array, _output: tuple[int, ...]) -> Array:
    """Return true labels and probabilities side by side, (n, 2 classes)."""
    return np.concatenate([truths, predictions], axis=1).astype(np.float64)


def _parts(rows: Array) -> tuple[Array, Array]:
    true, found = np.split(rows, 2, axis=1)
    return true, found


class Ranking(NamedTuple):
    """Images ranked by each class's probability, (n, classes): the image, whether it has the label, the last rank with the same probability."""

    image: Array
    right: Array
    last: Array

    def precision(self, weights: Array) -> Array:
        """Return each class's average precision if image i counts `weights[i]` times, (classes,); NaN for a class without labels."""
        times = weights[self.image]
        hits = np.cumsum(self.right * times, axis=0)
        at = np.take_along_axis(hits / np.maximum(np.cumsum(times, axis=0), 1), self.last, axis=0)
        return np.asarray((self.right * times * at).sum(axis=0) / np.where(hits[-1] > 0, hits[-1], np.nan))


def ranking(rows: Array) -> Ranking:
    """Return the ranking of all images."""
    true, found = _parts(rows)
    image = np.argsort(-found, axis=0, kind="stable")
    ordered = np.take_along_axis(found, image, axis=0)
    ends = np.append(ordered[1:] != ordered[:-1], np.ones_like(ordered[:1], bool), axis=0)
    places = np.where(ends, np.arange(len(rows))[:, None], len(rows))
    last = np.minimum.accumulate(places[::-1], axis=0)[::-1]
    return Ranking(image, np.take_along_axis(true, image, axis=0), last)


def average_precision(rows: Array) -> Array:
    """Return each class's average precision (classes,), NaN for a class without labels."""
    return ranking(rows).precision(np.ones(len(rows)))


def total(rows: Array) -> float:
    """Return the mean average precision of the classes with labels, 0 if there are none."""
    return _mean(average_precision(rows))


def _mean(found: Array) -> float:
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def by_chance(rows: Array) -> tuple[float, float]:
    """Return the mean score against shuffled true labels, near the mean prevalence, and the p-value of the actual score."""
    rows = rows[:: 1 + len(rows) // ENOUGH]
    known, random = ranking(rows), np.random.default_rng(0)
    true, ones = _parts(rows)[0], np.ones(len(rows))
    shuffled = [
        known._replace(right=true[random.permutation(len(rows))][known.image, range(true.shape[1])])
        for _ in range(SHUFFLES)
    ]
    scores = np.array([_mean(one.precision(ones)) for one in shuffled])
    return float(scores.mean()), float((1 + np.sum(scores >= total(rows) - 1e-12)) / (1 + SHUFFLES))


def further(rows: Array) -> Mapping[str, float | None]:
    """Return F1 over all labels, and the fraction of images with all labels right."""
    true, given = _parts(rows)[0] > 0, _parts(rows)[1] >= THRESHOLD
    named = true.sum() + given.sum()
    return {
        "F1": float(2 * (true & given).sum() / named) if named else None,
        "all labels right": float((true == given).all(axis=1).mean()),
    }


def by_class(rows: Mapping[str, Array], labels: Sequence[str], _confused: Collection[str]) -> Classes:
    """Return each class's number of right labels and of predicted labels, by file."""
    files = {}
    for name, found in rows.items():
        true, given = _parts(found)[0] > 0, _parts(found)[1] >= THRESHOLD
        files[name] = FileClasses(
            correct=(true & given).sum(axis=0).tolist(),
            answered=given.sum(axis=0).tolist(),
            mistakes=None,
            scores=[None if np.isnan(one) else one for one in average_precision(found).tolist()],
            by_chance=by_chance(found),
        )
    images = _parts(next(iter(rows.values())))[0].sum(axis=0).astype(int).tolist()
    return Classes(names=list(labels), images=images, files=files, counted="labels", measure="AP", any_number=True)


def agreement(predictions: Array, others: Array) -> Array:
    """Return the fraction of labels on which both agree, (n,)."""
    return np.asarray(((predictions >= THRESHOLD) == (others >= THRESHOLD)).mean(axis=1))


def divergence(outputs: Array, reference: Array) -> Array:
    """Return the Kullback-Leibler divergence in nats of each label's probability from the reference's, mean over classes, (n,)."""
    true, found = (np.clip(decode(part), 1e-9, 1 - 1e-9) for part in (reference, outputs))
    apart = true * np.log(true / found) + (1 - true) * np.log((1 - true) / (1 - found))
    return np.asarray(apart.mean(axis=1))


def resampled(rows: Array, weights: Array) -> Array:
    """Return each class's average precision (draws, classes) if the images count as often as weights (draws, n) say."""
    ranked = ranking(rows)
    return np.array([ranked.precision(one) for one in weights])


def compare(before: Array, now: Array, labels: Sequence[str]) -> Comparison:
    """Compare by resampling images: the score, and the average precision of single classes."""
    given = [_parts(rows)[1] >= THRESHOLD for rows in (before, now)]
    changed, how = np.any(given[0] != given[1], axis=1), "labelled differently"
    return compare_classes(before, now, labels, resampled=resampled, measure="AP", changed=changed, how=how)


def truth_text(row: Array, labels: Sequence[str]) -> str:
    """Return the names of the image's labels."""
    return ", ".join(label for label, true in zip(labels, row, strict=False) if true) or "nothing"


def show(output: Array, labels: Sequence[str], lines: int) -> Shown:
    """Return the predicted labels with their probabilities, most probable first."""
    found = decode(output[None])[0]
    best = [index for index in np.argsort(-found, kind="stable")[:lines] if found[index] >= THRESHOLD]
    return ("label", "probability"), [(labels[index], float(found[index])) for index in best]


MULTILABEL = OutputTask(
    name="multilabel",
    metric=Metric("macro_ap", "mAP", "labels on which both agree", counts_images=False),
    output_shape=output_shape,
    check_output=check_output,
    truths=truths,
    truths_json=truths_json,
    listing=list_table,
    examples=table_examples,
    decode=decode,
    statistics=statistics,
    total=total,
    further=further,
    by_class=by_class,
    agreement=agreement,
    divergence=divergence,
    compare=compare,
    resampled=resampled,
    truth_text=truth_text,
    show=show,
    exclusive=False,
    hub=("image-classification", "mAP"),
    meaning="a logit for each line of `labels.txt`, each for itself: its sigmoid is the label's probability",
    reading=f"print([label for label, logit in zip(labels, outputs[0]) if logit >= 0])  # a probability of {THRESHOLD} or more",
)
