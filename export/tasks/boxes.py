"""Decode a detector's outputs: boxes with a class and a score, without duplicates.

An output row belongs to one anchor: logits (background first, then the classes), four numbers that move the anchor, and five constants:
the kind of head with the level of the pyramid, and the anchor's centre, width and height. All lengths are fractions of the network's
input. So outputs can be decoded without further data, and files with other anchors in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from export.tasks.task import Array

# Kinds of heads: SSD; RetinaNet; its second version, which differs only in training; FCOS, whose background column is the centre-ness.
SOFTMAX, SIGMOID, GIOU, CENTRED = 0, 1, 2, 3
PER_LEVEL = 4  # the constant is the kind plus PER_LEVEL times the anchor's level, counted from 0
MOVES, READS = 4, 5  # numbers of columns after the logits: moves, constants
# Divisors of the moves: for x and y, for width and height. SSD's variances (Liu 2016) are 1 / 10 and 1 / 5.
WEIGHTS = {SOFTMAX: (10.0, 5.0), SIGMOID: (1.0, 1.0), GIOU: (1.0, 1.0)}
LARGEST_GROWTH = np.log(1000 / 16)  # torchvision's bound on a box's growth
# Most boxes of an image that suppression considers, by score, as in torchvision: of each class for SSD, of each level for the others.
OF_CLASS, OF_LEVEL = 400, 1000
NONE = -1  # the label of a row without a box
LABEL, SCORE, BOX = 0, 1, slice(2, 6)  # columns of a detection; boxes are left, top, right, bottom


@dataclass(frozen=True)
class Limits:
    """Which boxes of an image are its detections."""

    detections: int = 100  # most of them, as in COCO
    least_score: float = 0.01
    most_overlap: float = 0.5  # of two boxes of one class; above it the one with the lower score is a duplicate


LIMITS = Limits()


class Heads(NamedTuple):
    """Outputs (n, anchors, columns) split into their parts."""

    kind: int
    logits: Array  # (n, anchors, classes + 1)
    moves: Array  # (n, anchors, 4)
    anchors: Array  # (n, anchors, 4): centre x, centre y, width, height
    levels: tuple[int, ...]  # each level's first anchor, and the number of anchors


def heads(outputs: Array) -> Heads:
    """Split outputs into their parts, in float64."""
    values = outputs.astype(np.float64)
    constants = np.rint(np.nan_to_num(values[0, :, -READS])).astype(np.int64) if values.size else np.zeros(0, np.int64)
    levels = [0, *(np.flatnonzero(np.diff(constants // PER_LEVEL)) + 1).tolist(), values.shape[1]]
    kind = int(constants[0]) % PER_LEVEL if values.size else SOFTMAX
    parts = np.split(values, [-MOVES - READS, -READS, 1 - READS], axis=2)
    return Heads(kind, parts[0], parts[1], parts[3], tuple(levels))


def probabilities(found: Heads) -> Array:
    """Return the classes' probabilities (n, anchors, classes), without the background."""
    if found.kind == SOFTMAX:
        powers = np.exp(found.logits - found.logits.max(axis=-1, keepdims=True))
        return np.asarray(powers[..., 1:] / powers.sum(axis=-1, keepdims=True))
    each = 1 / (1 + np.exp(-np.clip(found.logits, -500, 500)))
    return np.asarray(np.sqrt(each[..., 1:] * each[..., :1]) if found.kind == CENTRED else each[..., 1:])


def boxes(found: Heads) -> Array:
    """Return the boxes (n, anchors, 4), clipped to the image."""
    centre, size = found.anchors[..., :2], found.anchors[..., 2:]
    first, second = found.moves[..., :2], found.moves[..., 2:]
    if found.kind == CENTRED:
        corners = [centre - first * size, centre + second * size]
    else:
        place, growth = WEIGHTS[found.kind]
        centre = centre + first / place * size
        half = np.exp(np.minimum(second / growth, LARGEST_GROWTH)) * size / 2
        corners = [centre - half, centre + half]
    return np.asarray(np.clip(np.concatenate(corners, axis=-1), 0, 1))


def decode(outputs: Array) -> Array:
    """Return each image's detections, (n, 100, 6), as `suppressed` does."""
    found = heads(outputs)
    return suppressed(probabilities(found), boxes(found), found.levels, by_class=found.kind == SOFTMAX)


def suppressed(
    scores: Array, places: Array, levels: Sequence[int], *, by_class: bool = False, limits: Limits = LIMITS
) -> Array:
    """Return each image's detections (n, detections, 6) by score: label, score and box; label NONE in rows without one.

    `scores` are (n, anchors, classes), `places` (n, anchors, 4), `levels` and `by_class` as `candidates` takes them. NaN is never a
    detection. Scores are rounded to float32, in which other programs see them, so that the same scores are equal.
    """
    scores, places = np.nan_to_num(scores).astype(np.float32), np.nan_to_num(places)
    predictions = np.zeros((len(scores), limits.detections, 6))
    predictions[..., LABEL] = NONE
    for image, (score, place) in enumerate(zip(scores, places, strict=True)):
        chosen = candidates(score, levels, by_class=by_class, least=limits.least_score)
        kept = detections(*chosen, score, place, limits)
        predictions[image, : len(kept)] = kept
    return predictions


def candidates(scores: Array, levels: Sequence[int], *, by_class: bool, least: float) -> tuple[Array, Array]:
    """Return anchors and labels (m,) of the boxes that suppression considers, by score, from one image's scores (anchors, classes).

    SSD takes each class's best boxes above the `least` score, other heads each level's, over its classes (torchvision's
    postprocess_detections). Of equal scores the first counts as the best: in order of class and anchor for SSD, of anchor and class for
    the others.
    """
    anchors, classes = scores.shape
    flat = scores.T.ravel() if by_class else scores.ravel()
    parts = range(0, flat.size + 1, anchors) if by_class else [classes * first for first in levels]
    chosen = []
    for start, end in pairwise(parts):
        likely = start + np.flatnonzero(flat[start:end] > least)
        best = np.argsort(-flat[likely], kind="stable")[: OF_CLASS if by_class else OF_LEVEL]
        chosen.append(likely[np.sort(best)])
    index = np.concatenate(chosen)
    index = index[np.argsort(-flat[index], kind="stable")]
    return (index % anchors, index // anchors) if by_class else (index // classes, index % classes)


def detections(anchor: Array, label: Array, scores: Array, places: Array, limits: Limits = LIMITS) -> Array:
    """Return one image's detections (m, 6) from candidates (k,), scores (anchors, classes) and boxes (anchors, 4).

    Greedy: of two boxes of one class that overlap by more than is allowed, the first candidate stays (as torchvision's batched_nms).
    """
    place = places[anchor]
    alive, kept = np.ones(len(anchor), bool), list[int]()
    while len(kept) < limits.detections and alive.any():
        best = int(alive.argmax())
        kept.append(best)
        alive[best] = False
        rivals = np.flatnonzero(alive & (label == label[best]))
        alive[rivals] = overlap(place[best : best + 1], place[rivals])[0] <= limits.most_overlap
    return np.column_stack([label[kept], scores[anchor, label][kept], place[kept]])


def overlap(boxes: Array, others: Array, *, crowds: Array | None = None) -> Array:
    """Return the intersection over union (m, k) of boxes (m, 4) and others (k, 4); for a crowd, over the box's own area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(one[:, 2:] - one[:, :2], 0, None), axis=1) for one in (boxes, others)]
    union = areas[0][:, None] + areas[1] - shared
    if crowds is not None:
        union = np.where(crowds, areas[0][:, None], union)
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))
