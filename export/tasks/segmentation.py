"""Segmentation: one class per pixel. Outputs are logits (n, classes, height, width), predictions their argmax (n, height, width).

An image's row is its flattened confusion matrix in pixels: true classes in rows, predicted classes in columns. Rows add up, so the score
is that of the whole set: mIoU, the mean over classes of intersection over union of all pixels (Everingham 2010, The Pascal VOC Challenge,
section 4.3). Pixels whose truth is IGNORED are not counted.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from export.errors import BundleError, ContentError
from export.images.drawing import with_mask
from export.images.masks import list_masks, mask_examples
from export.images.preprocess import IGNORED, Preprocess
from export.images.size import Size
from export.tasks import classification
from export.tasks.paired import compare_classes
from export.tasks.task import Array, Classes, Comparison, FileClasses, Metric, OutputTask, Shown

EVERY = 8  # every eighth row and column is used for the divergence of two files


def output_shape(classes: int, size: Size) -> tuple[int, ...]:
    """Return the shape of one image's logits, which has the image's size."""
    return classes, *size


def check_output(file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
    """Raise BundleError if the model's output does not fit the number of labels."""
    if len(shape) != 4 or shape[1] != len(labels):
        raise BundleError(
            f"labels.txt: {file} has the output {shape}, expected (batch, {len(labels)}, height, width) for {len(labels)} classes: "
            "get the bundle again",
            defect="missing_class",
        )


def truths_json(truths: Array) -> Sequence[str]:
    """Return each mask as runs of equal pixels, row after row: `0x512 3x17 …` is 512 pixels of class 0, then 17 of class 3."""
    return [" ".join(f"{value}x{length}" for value, length in _runs(mask.ravel())) for mask in truths]


def _runs(values: Array) -> Iterator[tuple[int, int]]:
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        yield int(values[start]), int(end - start)


def truths(values: Sequence[Any], output: tuple[int, ...]) -> Array:
    """Return masks as bytes (n, height, width)."""
    if len(output) != 3:
        raise ContentError(f"bundle.json: output: must be maps of classes, got {output}")
    return np.stack([_mask(value, output) for value in values])


def _mask(value: object, output: tuple[int, ...]) -> Array:
    """Return the mask that runs of pixels describe, without allocating more pixels than the output has."""
    classes, height, width = output
    try:
        runs = [tuple(map(int, run.split("x"))) for run in str(value)[: 16 * height * width].split(" ")]
        lengths = [length for _, length in runs]
        known = all(0 <= index < classes or index == IGNORED for index, _ in runs)
    except ValueError:
        known, lengths = False, []
    if not known or min(lengths, default=0) < 1 or sum(lengths) != height * width:
        raise ContentError(
            f"bundle.json: golden.truths: must be runs of classes below {classes} over {height} x {width} pixels, got {value!r:.60}"
        )
    return np.repeat(np.array([index for index, _ in runs], np.uint8), lengths).reshape(height, width)


def decode(outputs: Array) -> Array:
    """Return the likeliest class of each pixel, uint8 (n, height, width)."""
    return np.asarray(outputs.argmax(axis=1).astype(np.uint8))


def finish(model: ModelProto) -> ModelProto:
    """Return the model with the output `mask`, uint8 (batch, height, width), instead of logits; ties as in `decode`."""
    (logits,) = model.graph.output
    batch, _, height, width = (dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim)
    finished: ModelProto = ModelProto.FromString(model.SerializeToString())
    finished.graph.node.extend(
        [
            helper.make_node("ArgMax", [logits.name], ["mask/index"], "mask/ArgMax", axis=1, keepdims=0),
            helper.make_node("Cast", ["mask/index"], ["mask"], "mask/Cast", to=TensorProto.UINT8),
        ]
    )
    del finished.graph.output[:]
    finished.graph.output.append(helper.make_tensor_value_info("mask", TensorProto.UINT8, [batch, height, width]))
    return finished


def statistics(predictions: Array, truths: Array, output: tuple[int, ...]) -> Array:
    """Return the confusion matrix of each image, integers (n, classes²)."""
    classes = output[0]
    rows = np.empty((len(predictions), classes * classes), np.int64)
    for row, prediction, truth in zip(rows, predictions, truths, strict=True):
        judged = truth != IGNORED
        pairs = truth[judged].astype(np.int64) * classes + prediction[judged]
        row[:] = np.bincount(pairs, minlength=classes * classes)
    return rows


def _sums(rows: Array) -> tuple[Array, Array, Array]:
    """Return right, true and predicted pixels of each class, (..., classes) each, from confusion matrices (..., classes²)."""
    classes = math.isqrt(rows.shape[-1])
    confusion = rows.reshape(*rows.shape[:-1], classes, classes)
    return np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)


def ious(right: Array, true: Array, answered: Array) -> Array:
    """Return each class's intersection over union; NaN if it has no pixels, true or predicted."""
    union = true + answered - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


def total(rows: Array) -> float:
    """Return mIoU: the mean over the classes that have pixels; 0 if there are none."""
    found = ious(*_sums(rows.sum(axis=0)))
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def further(rows: Array) -> Mapping[str, float | None]:
    """Return the fraction of right pixels, and the mean recall of the classes that have pixels."""
    right, true, _ = _sums(rows.sum(axis=0))
    there = true > 0
    return {
        "pixel accuracy": float(right.sum() / max(true.sum(), 1)),
        "mean class accuracy": float(np.mean(right[there] / true[there])) if there.any() else None,
    }


def by_class(rows: Mapping[str, Array], labels: Sequence[str], confused: Collection[str]) -> Classes:
    """Return the files' predictions class by class, in pixels, with the mistakes of the files in `confused`."""
    sums = {name: found.sum(axis=0) for name, found in rows.items()}
    parts = {name: _sums(found) for name, found in sums.items()}
    return Classes(
        names=list(labels),
        images=next(iter(parts.values()))[1].tolist(),
        files={
            name: FileClasses(
                correct=right.tolist(),
                answered=answered.tolist(),
                mistakes=_mistakes(sums[name], len(labels)) if name in confused else None,
                scores=[None if math.isnan(one) else one for one in ious(right, true, answered).tolist()],
            )
            for name, (right, true, answered) in parts.items()
        },
        counted="pixels",
        measure="IoU",
    )


def _mistakes(confusion: Array, classes: int) -> list[tuple[int, int, int]]:
    square = confusion.reshape(classes, classes)
    return [(int(a), int(b), int(square[a, b])) for a, b in np.argwhere(square) if a != b]


def agreement(predictions: Array, others: Array) -> Array:
    """Return the fraction of pixels for which both predict the same class, (n,)."""
    return np.asarray((predictions == others).mean(axis=(1, 2)))


def evidence(outputs: Array) -> Array:
    """Return the outputs at every EVERY-th row and column."""
    return outputs[:, :, EVERY // 2 :: EVERY, EVERY // 2 :: EVERY]


def divergence(outputs: Array, reference: Array) -> Array:
    """Return the mean over pixels of the Kullback-Leibler divergence in nats from the reference's distribution, (n,)."""
    pixels, true = (np.moveaxis(part, 1, -1).reshape(-1, part.shape[1]) for part in (outputs, reference))
    return np.asarray(classification.divergence(pixels, true).reshape(len(outputs), -1).mean(axis=1))


def resampled(rows: Array, weights: Array) -> Array:
    """Return each class's IoU (draws, classes) if the images count as often as weights (draws, n) say."""
    return ious(*(weights @ part.astype(np.float64) for part in _sums(rows)))


def compare(before: Array, now: Array, labels: Sequence[str]) -> Comparison:
    """Compare by resampling images: mIoU, and the IoU of single classes."""
    changed = np.any(before != now, axis=1)
    how = "segmented differently"
    return compare_classes(before, now, labels, resampled=resampled, measure="IoU", changed=changed, how=how)


def truth_text(row: Array, labels: Sequence[str]) -> str:
    """Return the number of pixels of each class in the mask, in words."""
    true = _sums(row)[1]
    return ", ".join(f"{label} {int(pixels)}" for label, pixels in zip(labels, true, strict=True) if pixels)


def show(output: Array, labels: Sequence[str], lines: int) -> Shown:
    """Return the classes that cover most of the image, with the fractions that they cover."""
    areas = np.bincount(decode(output[None]).ravel(), minlength=len(labels)) / output[0].size
    best = [index for index in np.argsort(-areas, kind="stable")[:lines] if areas[index]]
    return ("label", "area"), [(labels[index], float(areas[index])) for index in best]


def of_whole(task: OutputTask, preprocess: Preprocess, image: Size) -> OutputTask:
    """Return the task whose masks are of an image of this size (height, width)."""
    return replace(
        task, decode=lambda outputs: np.stack([preprocess.whole_mask(one, image) for one in decode(outputs)])
    )


def draw(image: Array, mask: Array, _labels: Sequence[str]) -> Array:
    """Return the image under the mask's colours."""
    return with_mask(image, mask)


def legend(mask: Array) -> Sequence[int]:
    """Return the classes in a mask, the largest first."""
    areas = np.bincount(mask[mask != IGNORED], minlength=1)
    return [int(label) for label in np.argsort(-areas, kind="stable") if areas[label]]


SEGMENTATION = OutputTask(
    name="segmentation",
    metric=Metric("miou", "mIoU", "pixels for which both predict the same class", counts_images=False),
    output_shape=output_shape,
    check_output=check_output,
    truths=truths,
    truths_json=truths_json,
    listing=list_masks,
    examples=mask_examples,
    decode=decode,
    finish=finish,
    of_whole=of_whole,
    statistics=statistics,
    total=total,
    further=further,
    by_class=by_class,
    agreement=agreement,
    evidence=evidence,
    divergence=divergence,
    compare=compare,
    resampled=resampled,
    truth_text=truth_text,
    show=show,
    draw=draw,
    draw_truth=draw,
    legend=legend,
    hub=("image-segmentation", "mean_iou"),
    meaning="logits of every pixel, one for each line of `labels.txt`",
    reading="masks = outputs.argmax(axis=1)  # (batch, height, width): lines of labels.txt, counted from 0",
)
