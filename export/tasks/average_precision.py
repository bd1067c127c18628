"""COCO's mean average precision from one row of statistics per image, which can be resampled, paired and stored.

Matching and interpolation follow pycocotools' COCOeval (Lin 2014), all areas; tests compare the two.
"""

from typing import NamedTuple

import numpy as np

from export.tasks.boxes import BOX, LABEL, LIMITS, NONE, SCORE, overlap
from export.tasks.task import Array

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # least overlaps of a right detection
RECALLS = np.linspace(0, 1, 101)
TRUTH, CORNERS, CROWD = 0, slice(1, 5), 5  # columns of a truth: label, box, and whether it is a crowd of objects
# A row is for each detection label, score, and bits (right, then ignored, at each threshold), then the labels of the truths. Where there
# are not LIMITS.detections of them, the row begins with their number, negative and less COUNTED, as no label is.
PER_DETECTION, COUNTED = 3, -2


def statistics(predictions: Array, truths: Array, _output: tuple[int, ...] = ()) -> Array:
    """Return one row per image from detections (n, detections, 6) and truths (n, boxes, 6)."""
    detections = predictions.shape[1]
    rows = np.full((len(predictions), detections * PER_DETECTION + truths.shape[1]), float(NONE))
    for row, found, true in zip(rows, predictions, truths, strict=True):
        table = row[: detections * PER_DETECTION].reshape(detections, PER_DETECTION)
        table[:, 0], table[:, 1], table[:, 2] = found[:, LABEL], found[:, SCORE], 0
        for label in np.intersect1d(found[:, LABEL], true[:, TRUTH]):
            if label != NONE:
                chosen = np.flatnonzero(found[:, LABEL] == label)
                table[chosen, 2] = _matched(found[chosen][:, BOX], true[true[:, TRUTH] == label])
        row[detections * PER_DETECTION :] = np.where(true[:, CROWD] > 0, NONE, true[:, TRUTH])
    counted = np.full((len(rows), int(detections != LIMITS.detections)), COUNTED - detections)
    return np.concatenate([counted, rows], axis=1)


def _matched(boxes: Array, true: Array) -> Array:
    """Return the bits of one class's detections (m, 4), in order of score: each takes the best free truth, a crowd last."""
    crowds = true[:, CROWD] > 0
    overlaps = overlap(boxes, true[:, CORNERS], crowds=crowds)
    free = np.ones((len(THRESHOLDS), len(true)), bool)
    bits = np.zeros(len(boxes), np.int64)
    powers = 1 << np.arange(len(THRESHOLDS))
    for index in np.flatnonzero(overlaps.max(axis=1, initial=0) >= THRESHOLDS[0] - 1e-9):
        near = overlaps[index] >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]  # (thresholds, truths)
        for kind, shift in ((~crowds, 0), (crowds, len(THRESHOLDS))):
            fits = near & free & kind
            hit = fits.any(axis=1)
            # COCOeval takes the last of equally good truths.
            best = len(true) - 1 - np.where(fits, overlaps[index], -1.0)[:, ::-1].argmax(axis=1)
            if not shift:
                free[np.flatnonzero(hit), best[hit]] = False
            bits[index] |= int(powers[hit].sum()) << shift
            near = near & ~hit[:, None]
    return bits


class Curve(NamedTuple):
    """One class: its detections in all images in order of score, and its number of truths in each image."""

    label: int
    right: Array  # (m, thresholds)
    counted: Array  # (m, thresholds): 0 for detections that match a crowd
    image: Array  # (m,)
    truths: Array  # (images,)

    def precision(self, weights: Array) -> Array:
        """Return for each threshold the mean, over 101 recalls, of the best precision at that recall or more; `weights` count images.

        NaN if no image with a weight has a truth.
        """
        total = float(self.truths @ weights)
        if not total:
            return np.full(len(THRESHOLDS), np.nan)
        times = weights[self.image][:, None]
        hits = np.cumsum(self.right * times, axis=0)
        precision = hits / (np.cumsum(self.counted * times, axis=0) + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        precision = np.concatenate([precision, np.zeros((1, len(THRESHOLDS)))])  # for recalls that are not reached
        found = [np.searchsorted(recall, RECALLS, side="left") for recall in (hits / total).T]
        return np.asarray(np.take_along_axis(precision, np.stack(found, axis=1), axis=0).mean(axis=0))


def curves(rows: Array) -> list[Curve]:
    """Return the curve of each class that has a truth."""
    table, truths = split(rows)
    image, place = np.nonzero(table[..., 0] != NONE)
    label, score, bits = table[image, place].T
    found = []
    for name in np.unique(truths[truths != NONE]).astype(int):
        own = np.flatnonzero(label == name)
        order = own[np.argsort(-score[own], kind="stable")]
        known = bits[order].astype(np.int64)[:, None] >> np.arange(2 * len(THRESHOLDS)) & 1
        right, ignored = known[:, : len(THRESHOLDS)], known[:, len(THRESHOLDS) :]
        found.append(Curve(int(name), right, 1 - ignored, image[order], (truths == name).sum(axis=1)))
    return found


def split(rows: Array) -> tuple[Array, Array]:
    """Return the detections in rows (n, detections, (label, score, bits)), and the labels of their truths (n, boxes)."""
    detections = LIMITS.detections
    if rows.size and rows[0, 0] < COUNTED:
        detections, rows = int(COUNTED - rows[0, 0]), rows[:, 1:]
    first = detections * PER_DETECTION
    return rows[:, :first].reshape(len(rows), detections, PER_DETECTION), rows[:, first:]


def average_precision(rows: Array) -> dict[int, Array]:
    """Return the average precision at each threshold (10,) of each class that has a truth."""
    return {curve.label: curve.precision(np.ones(len(rows))) for curve in curves(rows)}


def mean_average_precision(rows: Array, *, thresholds: slice = slice(None)) -> float:
    """Return the mean over classes and thresholds, 0 if there are no truths."""
    found = average_precision(rows)
    return float(np.mean([values[thresholds] for values in found.values()])) if found else 0.0
