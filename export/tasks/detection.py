"""Detection: boxes with a class and a score. Predictions are boxes (n, detections, 6), the score is COCO's mean average precision.

An image's row has each detection's label, score, and the overlaps at which it is right, and the labels of the truths: enough to score
any set of images.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from export.errors import BundleError, ContentError
from export.images.annotations import box_examples, list_boxes
from export.images.box_listing import table_of
from export.images.drawing import with_boxes
from export.images.preprocess import Preprocess
from export.images.size import Size
from export.tasks.average_precision import (
    CORNERS,
    TRUTH,
    average_precision,
    curves,
    mean_average_precision,
    split,
    statistics,
)
from export.tasks.boxes import (
    BOX,
    LABEL,
    MOVES,
    NONE,
    READS,
    SCORE,
    SOFTMAX,
    decode,
    heads,
    overlap,
    probabilities,
)
from export.tasks.paired import compare_classes
from export.tasks.suppression import with_suppression
from export.tasks.task import Array, Classes, Comparison, FileClasses, Metric, OutputTask, Shown

SURE = 0.3  # least score of a detection that is shown, counted by class, and compared between files
SAME_PLACE, SAME_SCORE = 0.9, 0.02  # two detections agree with at least this overlap and at most this score difference
ALIKE = f"detections in common: same class, overlap of {SAME_PLACE}, scores within {SAME_SCORE}"
EVERY = 7  # every seventh anchor is used for the divergence of two files
MOST_TRUTHS = 1000  # boxes in a golden image
DRAWN = 500  # resamples of a comparison; each sums over every detection, so fewer than elsewhere


def output_shape(classes: int, _size: Size) -> tuple[int | None, ...]:
    """Return the shape of one image's output: any number of anchors."""
    return None, classes + 1 + MOVES + READS


def check_output(file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
    """Raise BundleError if the model's output does not fit the number of labels."""
    wanted = output_shape(len(labels), (0, 0))[1]
    if len(shape) != 3 or shape[2] != wanted:
        raise BundleError(
            f"labels.txt: {file} has the output {shape}, expected (batch, anchors, {wanted}) for {len(labels)} classes: "
            "get the bundle again",
            defect="missing_class",
        )


def truths_json(truths: Array) -> Sequence[Sequence[Sequence[float]]]:
    """Return each image's boxes: class, left, top, right, bottom as fractions of the image, and 1 for a crowd."""
    return [boxes[boxes[:, 0] != NONE].astype(float).tolist() for boxes in truths]


def truths(values: Sequence[Any], output: tuple[int, ...], *, classes: int | None = None) -> Array:
    """Return boxes (n, most boxes of an image, 6), padded with rows without a box; by default the output has a column for each class."""
    classes = output[-1] - 1 - MOVES - READS if classes is None else classes
    for boxes in values:
        if not isinstance(boxes, list) or len(boxes) > MOST_TRUTHS or not all(_is_box(box, classes) for box in boxes):
            raise ContentError(
                f"bundle.json: golden.truths: must be lists of boxes with a class below {classes} inside the image, got {boxes!r:.100}"
            )
    return table_of([np.array(boxes, np.float32).reshape(-1, 6) for boxes in values])


def _is_box(box: object, classes: int) -> bool:
    if not isinstance(box, list) or len(box) != 6 or not all(type(one) in (int, float) for one in box):
        return False
    return box[0] in range(classes) and all(0 <= one <= 1 for one in box[1:])


def further(rows: Array) -> Mapping[str, float | None]:
    """Return the mean average precision at an overlap of 0.5, and at 0.75."""
    return {
        "mAP50": mean_average_precision(rows, thresholds=slice(0, 1)),
        "mAP75": mean_average_precision(rows, thresholds=slice(5, 6)),
    }


def by_class(rows: Mapping[str, Array], labels: Sequence[str], _confused: Collection[str]) -> Classes:
    """Return, for each class, how many objects a file finds with a score of SURE or more, and how many it predicts."""
    files = {}
    for name, found in rows.items():
        (table, true), precision = split(found), average_precision(found)
        sure = (table[..., 0] != NONE) & (table[..., 1] >= SURE)
        bits = table[..., 2].astype(np.int64)
        files[name] = FileClasses(
            correct=_count(table[..., 0][sure & (bits & 1 > 0)], labels),
            answered=_count(table[..., 0][sure & (bits >> 10 & 1 == 0)], labels),
            mistakes=None,
            scores=[float(precision[label].mean()) if label in precision else None for label in range(len(labels))],
        )
    return Classes(
        names=list(labels),
        images=_count(true[true != NONE], labels),
        files=files,
        counted="objects",
        measure="AP",
        any_number=True,
    )


def _count(classes: Array, labels: Sequence[str]) -> list[int]:
    return np.bincount(classes.astype(np.int64), minlength=len(labels)).tolist()  # type: ignore[no-any-return]


def agreement(predictions: Array, others: Array) -> Array:
    """Return the fraction of both files' sure detections that the other has too (n,): same class, place and score."""
    return np.array([_alike(mine, its) for mine, its in zip(predictions, others, strict=True)])


def _alike(mine: Array, its: Array) -> float:
    mine, its = (part[part[:, LABEL] != NONE] for part in (mine, its))
    same = (
        (overlap(mine[:, BOX], its[:, BOX]) >= SAME_PLACE)
        & (mine[:, None, LABEL] == its[:, LABEL])
        & (np.abs(mine[:, None, SCORE] - its[:, SCORE]) <= SAME_SCORE)
    )
    sure = np.concatenate([mine[:, SCORE], its[:, SCORE]]) >= SURE
    met = np.concatenate([same.any(axis=1), same.any(axis=0)])
    return float(met[sure].mean()) if sure.any() else 1.0


def evidence(outputs: Array) -> Array:
    """Return the outputs of every EVERY-th anchor."""
    return outputs[:, ::EVERY]


def divergence(outputs: Array, reference: Array) -> Array:
    """Return the mean over anchors of the Kullback-Leibler divergence in nats from the reference's classes, (n,)."""
    true, found = (np.clip(probabilities(heads(part)), 1e-9, 1 - 1e-9) for part in (reference, outputs))
    apart = true * np.log(true / found)
    if heads(reference).kind == SOFTMAX:
        rest, left = (np.clip(1 - part.sum(axis=2), 1e-9, 1) for part in (true, found))
        apart = np.concatenate([apart, (rest * np.log(rest / left))[..., None]], axis=2)
    else:
        apart = apart + (1 - true) * np.log((1 - true) / (1 - found))
    return np.asarray(apart.sum(axis=2).mean(axis=1))


def resampled(rows: Array, weights: Array, *, classes: int | None = None) -> Array:
    """Return each class's average precision (draws, classes) if the images count as often as weights (draws, n) say."""
    known = {curve.label: curve for curve in curves(rows)}
    found = np.full((len(weights), 1 + max(known, default=0) if classes is None else classes), np.nan)
    for row, own in zip(found, weights, strict=True):
        for name, curve in known.items():
            row[name] = curve.precision(own).mean()
    return found


def compare(before: Array, now: Array, labels: Sequence[str]) -> Comparison:
    """Compare by resampling images: the score, and the average precision of single classes."""
    return compare_classes(
        before,
        now,
        labels,
        resampled=partial(resampled, classes=len(labels)),
        measure="AP",
        changed=np.any(_outcome(before) != _outcome(now), axis=1),
        how="with other objects found or missed",
        draws=DRAWN,
    )


def _outcome(rows: Array) -> Array:
    """Return each image's numbers of right and wrong sure detections at an overlap of 0.5, (n, 2)."""
    table, _ = split(rows)
    sure = (table[..., 0] != NONE) & (table[..., 1] >= SURE)
    right = table[..., 2].astype(np.int64) & 1 > 0
    return np.stack([(sure & right).sum(axis=1), (sure & ~right).sum(axis=1)], axis=1)


def truth_text(row: Array, labels: Sequence[str]) -> str:
    """Return the number of objects of each class in the image, in words."""
    _, true = split(row[None])
    counts = _count(true[true != NONE], labels)
    return ", ".join(f"{label} {number}" for label, number in zip(labels, counts, strict=True) if number) or "nothing"


def show(output: Array, labels: Sequence[str], lines: int, *, decode: Callable[[Array], Array] = decode) -> Shown:
    """Return the boxes with the highest scores; lengths are fractions of the image."""
    found = [one for one in decode(output[None])[0] if one[LABEL] != NONE and one[SCORE] >= SURE][:lines]
    columns = ("label", "score", "left", "top", "right", "bottom")
    return columns, [(labels[int(one[LABEL])], *map(float, one[1:])) for one in found]


def of_whole(task: OutputTask, preprocess: Preprocess, image: Size) -> OutputTask:
    """Return the task whose boxes are fractions of an image of this size, not of the network's input."""

    def placed(outputs: Array) -> Array:
        found = task.decode(outputs)
        if not preprocess.stretch:
            found[..., BOX] = np.clip(preprocess.boxes(found[..., BOX], image, back=True), 0, 1)
        return found

    return replace(task, decode=placed, show=partial(show, decode=placed))


def draw(image: Array, prediction: Array, labels: Sequence[str]) -> Array:
    """Return the image with its sure boxes, their labels and scores."""
    found = prediction[(prediction[:, LABEL] != NONE) & (prediction[:, SCORE] >= SURE)][::-1]  # the likeliest on top
    words = [f"{labels[int(label)]} {score:.0%}" for label, score in found[:, : SCORE + 1]]
    return with_boxes(image, found[:, BOX], found[:, LABEL].astype(int).tolist(), words)


def draw_truth(image: Array, truth: Array, labels: Sequence[str]) -> Array:
    """Return the image with its true boxes."""
    real = truth[truth[:, TRUTH] != NONE]
    classes = real[:, TRUTH].astype(int).tolist()
    return with_boxes(image, real[:, CORNERS], classes, [labels[label] for label in classes])


DETECTION: OutputTask = OutputTask(
    name="detection",
    metric=Metric("map", "mAP", ALIKE, counts_images=False),
    output_shape=output_shape,
    check_output=check_output,
    truths=truths,
    truths_json=truths_json,
    listing=list_boxes,
    examples=box_examples,
    decode=decode,
    finish=with_suppression,
    of_whole=of_whole,
    statistics=statistics,
    total=mean_average_precision,
    further=further,
    by_class=by_class,
    agreement=agreement,
    evidence=evidence,
    divergence=divergence,
    compare=compare,
    resampled=resampled,
    truth_text=truth_text,
    show=show,
    several=lambda _outputs: DETECTION,  # which a decoder reads; all else works on predictions
    by_class_axis=False,  # it is the anchors, and each network's boxes are its own
    draw=draw,
    draw_truth=draw_truth,
    hub=("object-detection", "mAP"),
    meaning="a row for each anchor: logits (background first, then the lines of `labels.txt`), four moves, five constants to decode them",
    reading="""\
from export.tasks.boxes import decode  # of the package that wrote this; numpy alone

for label, score, left, top, right, bottom in decode(outputs)[0]:  # fractions of the image, the likeliest first
    if label >= 0:
        print(labels[int(label)], score, left, top, right, bottom)""",
)
