"""Classification: one label per image. Predictions are the likeliest classes, at most five, the best first."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from export.errors import BundleError, ContentError
from export.images.folders import list_folder
from export.images.read import find_examples
from export.images.size import Size
from export.tasks.paired import ALPHA, detectable_loss, mcnemar
from export.tasks.task import Array, Classes, Comparison, FileClasses, Metric, OutputTask, Shown

TOP = 5  # with no more classes than these, every label would be among them
TRUTH, PREDICTION = 0, 1  # columns of a row; with more than TOP classes, a third says if the label is in the top five


def output_shape(classes: int, _size: Size) -> tuple[int, ...]:
    """Return the shape of one image's logits."""
    return (classes,)


def check_output(file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
    """Raise BundleError if the number of labels does not fit the model's output."""
    if shape[1:] != (len(labels),):
        raise BundleError(
            f"labels.txt: {file} has the output {shape}, got {len(labels)} labels: get the bundle again",
            defect="missing_class",
        )


def truths(values: Sequence[Any], output: tuple[int, ...]) -> Array:
    """Return labels as integers (n,)."""
    if not all(type(value) is int and 0 <= value < output[0] for value in values):
        raise ContentError(
            f"bundle.json: golden.truths: must be integers below {output[0]}, got {list(values)[:9]!r:.100}"
        )
    return np.array(values, np.int64)


def decode(outputs: Array) -> Array:
    """Return the likeliest classes (n, at most 5); ties in order and NaN first, as in argmax."""
    order = np.where(np.isnan(outputs), -np.inf, -outputs.astype(np.float64))
    return np.argsort(order, axis=1, kind="stable")[:, : TOP if outputs.shape[1] > TOP else 1]


def statistics(predictions: Array, labels: Array, _output: tuple[int, ...]) -> Array:
    """Return label, prediction and, for more than five classes, whether the label is in the top five, integers (n, 2 or 3)."""
    rows = [labels, predictions[:, 0]]
    if predictions.shape[1] == TOP:
        rows.append((predictions == labels[:, None]).any(axis=1))
    return np.stack(rows, axis=1).astype(np.int64)


def total(rows: Array) -> float:
    """Return the fraction of images whose prediction is their label."""
    return float(np.mean(rows[:, TRUTH] == rows[:, PREDICTION]))


def further(rows: Array) -> Mapping[str, float | None]:
    """Return top-5 (None for up to five classes), and balanced accuracy: the mean recall of the classes that have images."""
    images = np.bincount(rows[:, TRUTH])
    correct = np.bincount(rows[rows[:, TRUTH] == rows[:, PREDICTION], TRUTH], minlength=len(images))
    return {
        "top-5": float(np.mean(rows[:, 2])) if rows.shape[1] > 2 else None,
        "balanced accuracy": float(np.mean(correct[images > 0] / images[images > 0])),
    }


def by_class(rows: Mapping[str, Array], labels: Sequence[str], confused: Collection[str]) -> Classes:
    """Return the files' predictions class by class, with the mistakes of the files in `confused`."""

    def count(classes: Array) -> list[int]:
        return np.bincount(classes, minlength=len(labels)).tolist()  # type: ignore[no-any-return]

    return Classes(
        names=list(labels),
        images=count(next(iter(rows.values()))[:, TRUTH]),
        files={
            name: FileClasses(
                correct=count(found[found[:, TRUTH] == found[:, PREDICTION], TRUTH]),
                answered=count(found[:, PREDICTION]),
                mistakes=_mistakes(found) if name in confused else None,
            )
            for name, found in rows.items()
        },
    )


def _mistakes(rows: Array) -> list[tuple[int, int, int]]:
    pairs = rows[rows[:, TRUTH] != rows[:, PREDICTION], :2].tolist()
    return [(label, prediction, images) for (label, prediction), images in sorted(Counter(map(tuple, pairs)).items())]


def agreement(predictions: Array, others: Array) -> Array:
    """Return 1 where both predict the same class, else 0, (n,)."""
    return np.asarray((predictions[:, 0] == others[:, 0]).astype(np.float64))


def divergence(outputs: Array, reference: Array) -> Array:
    """Return the Kullback-Leibler divergence in nats of each output's distribution from the reference's, (n,)."""
    true, found = log_probabilities(reference), log_probabilities(outputs)
    return np.asarray(np.sum(np.exp(true) * (true - found), axis=1))


def log_probabilities(logits: Array) -> Array:
    """Return the logarithm of the softmax (n, classes); infinite logits count as ±10,000, NaN as 0."""
    finite = np.nan_to_num(logits.astype(np.float64), nan=0.0, posinf=1e4, neginf=-1e4)
    shifted: Array = finite - finite.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def compare(before: Array, now: Array, labels: Sequence[str]) -> Comparison:
    """Compare by McNemar's exact test, over all images and for single classes."""
    before, now = before.astype(np.int64), now.astype(np.int64)
    was, is_right = (rows[:, TRUTH] == rows[:, PREDICTION] for rows in (before, now))
    lost, gained = (Counter(now[mask, TRUTH].tolist()) for mask in (was & ~is_right, ~was & is_right))
    changed = int(np.sum(before[:, PREDICTION] != now[:, PREDICTION]))
    images, p_value = len(now), mcnemar(lost.total(), gained.total())
    classes = {index: (lost[index], gained[index]) for index in sorted(lost.keys() | gained.keys())}
    worse = sorted(
        (index for index, (down, up) in classes.items() if down > up), key=lambda index: gained[index] - lost[index]
    )
    # ALPHA is divided among all classes that changed (Bonferroni).
    surely = [index for index in worse if mcnemar(*classes[index]) < ALPHA / max(1, len(classes))]
    words = {index: f"{labels[index]} ({lost[index]} lost, {gained[index]} gained)" for index in worse}
    return Comparison(
        images=images,
        before=total(before),
        now=total(now),
        p_value=p_value,
        changed=changed / images,
        detectable=detectable_loss(images, (lost.total() + gained.total()) / images),
        counts=f"{lost.total()} lost, {gained.total()} gained, {changed} flipped of {images}, p = {p_value:.2g}",
        lost=tuple(words[index] for index in surely),
        worse=tuple(words[index] for index in worse),
    )


def truth_text(row: Array, labels: Sequence[str]) -> str:
    """Return the name of the image's class."""
    return labels[int(row[TRUTH])]


def show(output: Array, labels: Sequence[str], lines: int) -> Shown:
    """Return the likeliest labels with their probabilities."""
    found = softmax(output.astype(np.float64))
    best = np.argsort(-found, kind="stable")[:lines]
    return ("label", "probability"), [(labels[index], float(found[index])) for index in best]


def softmax(logits: Array) -> Array:
    """Return the softmax, subtracting the largest logit first to avoid overflow."""
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


CLASSIFICATION = OutputTask(
    name="classification",
    metric=Metric("top1", "top-1", "images for which both predict the same class"),
    output_shape=output_shape,
    check_output=check_output,
    truths=truths,
    truths_json=lambda truths: truths.tolist(),
    listing=list_folder,
    examples=find_examples,
    decode=decode,
    statistics=statistics,
    total=total,
    further=further,
    by_class=by_class,
    agreement=agreement,
    divergence=divergence,
    compare=compare,
    truth_text=truth_text,
    show=show,
)
