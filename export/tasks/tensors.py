"""Any network that maps an image to a tensor: an embedding (n, channels), tokens (n, tokens, channels), or a map (n, channels, height, width).

What the values mean need not be known: the truth is the uncompressed network's output for the same image, and the score is how much
of its variance an output explains, 1 - Σ(y - t)² / Σ(t - t̄)², with t̄ the mean of each channel over images and positions, and never
below 0. `labels.txt` has a name for each channel.

A row is an image's number of positions, Σ(y - t)², Σt², the cosine similarity of y and t, and Σt of each channel.

Several outputs lie side by side, (n, values): each has its own rows and its own score, and the network's is their weighted mean.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import BundleError, ContentError
from export.images.drawing import as_rgb
from export.images.preprocess import Preprocess
from export.images.read import Examples
from export.images.size import Size
from export.onnx_file.outputs import Output, matched, unpacked
from export.tasks.paired import compare_classes
from export.tasks.task import Array, Comparison, Metric, OutputTask, Shown
from export.tasks.unlabelled import list_images, without_labels

ERROR, ENERGY, COSINE, SUMS = 1, 2, 3, slice(4, None)  # columns of a row; the first is the number of positions
NEAR = 5  # neighbours
BLOCK_VALUES = 2**22
BLOCK = 1024  # images whose similarities to all are in memory
KEPT = 4096  # values of an output that are kept for its divergence


def channels_last(outputs: Array) -> Array:
    """Return outputs with one row for each position, (n, positions, channels)."""
    if outputs.ndim == 4:  # (n, channels, height, width)
        outputs = np.moveaxis(outputs, 1, -1)
    return outputs.reshape(len(outputs), -1, outputs.shape[-1])


def channels_of(shape: Sequence[int | None]) -> int | None:
    """Return the number of channels of one image's output of this shape."""
    return shape[0] if len(shape) == 3 else shape[-1]


def output_shape(_channels: int, _size: Size) -> tuple[int | None, ...]:
    """Return no sizes: the network alone knows them."""
    return ()


def check_output(file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
    """Raise BundleError unless the output has a channel for each label."""
    if len(shape) < 2 or channels_of(shape[1:]) != len(labels):
        raise BundleError(
            f"labels.txt: {file} has the output {shape}, got {len(labels)} names of channels: get the bundle again",
            defect="missing_class",
        )


def truths(values: Sequence[Any], output: tuple[int, ...]) -> Array:
    """Return NaN for every value: a bundle does not store truths, its teacher computes them."""
    if any(value is not None for value in values):
        raise ContentError(f"bundle.json: golden.truths: must be null for each image, got {list(values)[:9]!r:.100}")
    return np.broadcast_to(np.float32(np.nan), (len(values), *output))


def truths_json(truths: Array) -> Sequence[None]:
    """Return null for each image."""
    return [None] * len(truths)


def find_images(data: Path, preprocess: Preprocess, _labels: Sequence[str]) -> Examples:
    """Find the images of a folder (of its validation split, if it has one), whose truths are not known; DataError if there are none."""
    return without_labels(data, preprocess)


def as_numbers(outputs: Array) -> Array:
    """Return the outputs in float32."""
    return outputs.astype(np.float32, copy=False)


def cosine(outputs: Array, others: Array) -> Array:
    """Return the cosine similarity of two networks' outputs for each image, (n,); 1 where both are 0, 0 where one is."""
    one, other = (part.reshape(len(part), -1).astype(np.float64) for part in (outputs, others))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found = np.divide((one * other).sum(axis=1), norms, out=np.zeros(len(one)), where=norms > 0)
    return np.asarray(np.where(norms > 0, found, (one == other).all(axis=1)))


def statistics(predictions: Array, truths: Array, _output: tuple[int, ...]) -> Array:
    """Return the rows (n, 4 + channels); an output that is not finite is infinitely wrong."""
    some = max(1, BLOCK_VALUES // max(1, truths[0].size))  # images whose values are in memory in float64
    if len(truths) > some:
        parts = (slice(start, start + some) for start in range(0, len(truths), some))
        return np.concatenate([statistics(predictions[part], truths[part], _output) for part in parts])
    true = channels_last(truths).astype(np.float64)
    wrong = np.square(channels_last(predictions) - true).sum(axis=(1, 2))
    columns = (
        np.full(len(true), true.shape[1]),
        np.where(np.isfinite(wrong), wrong, np.finfo(np.float64).max / 1e9),
        np.square(true).sum(axis=(1, 2)),
        np.nan_to_num(cosine(predictions, truths)),
    )
    return np.column_stack([*columns, true.sum(axis=1)])


def total(rows: Array) -> float:
    """Return the explained variance, 1 - Σ(y - t)² / Σ(t - t̄)², at least 0."""
    error, energy, spread = float(rows[:, ERROR].sum()), float(rows[:, ENERGY].sum()), variance(rows)
    if spread <= 1e-12 * energy:  # constant outputs: right or wrong
        return float(error <= 1e-12 * energy)
    return max(0.0, 1 - error / spread)


def variance(rows: Array) -> float:
    """Return Σ(t - t̄)², which is Σt² - Σ_channels (Σt)² / positions."""
    sums = rows[:, SUMS].sum(axis=0)
    return float(rows[:, ENERGY].sum() - np.square(sums).sum() / rows[:, 0].sum())


def further(rows: Array) -> Mapping[str, float | None]:
    """Return the mean cosine similarity."""
    return {"cosine similarity": float(rows[:, COSINE].mean())}


def measures(rows: Array) -> Mapping[str, float | None]:
    """Return the signal-to-noise ratio 10 log10(Σt² / Σ(y - t)²); None where nothing differs."""
    error, energy = rows[:, ERROR].sum(), rows[:, ENERGY].sum()
    return {"SNR dB": float(10 * np.log10(energy / error)) if error > 0 < energy else None}


def together(predictions: Array, taught: Array, folders: Sequence[str]) -> Mapping[str, float | None]:
    """Return of embeddings (n, channels) how many keep their nearest neighbour, and how well neighbours tell the folders.

    The first is the fraction of images whose nearest image among the teacher's embeddings is one of the NEAR nearest among these; the
    second the fraction whose folder is the most frequent one of their NEAR nearest, where there are several folders.
    """
    if predictions.ndim != 2 or len(predictions) <= NEAR:
        return {}
    near, nearest = nearest_images(predictions, NEAR), nearest_images(taught, 1)
    found: dict[str, float | None] = {"nearest neighbour kept": float((near == nearest).any(axis=1).mean())}
    names, of = np.unique(np.array(folders), return_inverse=True)
    if len(names) > 1:
        votes = np.stack([np.bincount(one, minlength=len(names)) for one in of[near]])
        found["k-NN accuracy"] = float((votes.argmax(axis=1) == of).mean())
    return found


def nearest_images(embeddings: Array, count: int) -> Array:
    """Return for each image the `count` others with the highest cosine similarity, the nearest first, (n, count)."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = np.nan_to_num(embeddings / np.maximum(norms, 1e-12)).astype(np.float32)
    found = np.empty((len(unit), count), np.int64)
    for start in range(0, len(unit), BLOCK):
        alike = unit[start : start + BLOCK] @ unit.T
        alike[np.arange(len(alike)), start + np.arange(len(alike))] = -np.inf
        found[start : start + BLOCK] = np.argsort(-alike, axis=1, kind="stable")[:, :count]
    return found


def by_class(_rows: Mapping[str, Array], _labels: Sequence[str], _confused: Collection[str]) -> None:
    """Return None: there are no classes."""


def agreement(predictions: Array, others: Array) -> Array:
    """Return the cosine similarity of two files' outputs, at least 0, (n,)."""
    return np.asarray(np.clip(np.nan_to_num(cosine(predictions, others)), 0, 1))


def evidence(outputs: Array) -> Array:
    """Return at most KEPT values of each output, evenly spaced, (n, values)."""
    flat = outputs.reshape(len(outputs), -1)
    return flat[:, :: -(-flat.shape[1] // KEPT)].copy()  # a view would keep the whole output


def kept(predictions: Array) -> Array:
    """Return the same values; those of maps are (n, values, 1), which are no embeddings."""
    return evidence(predictions) if predictions.ndim == 2 else evidence(predictions)[:, :, None]


def divergence(outputs: Array, reference: Array) -> Array:
    """Return Σ(y - r)² / Σr² for each image, (n,)."""
    outputs, reference = (part.reshape(len(part), -1).astype(np.float64) for part in (outputs, reference))
    return np.asarray(np.square(outputs - reference).sum(axis=1) / np.maximum(np.square(reference).sum(axis=1), 1e-12))


def resampled(rows: Array, weights: Array) -> Array:
    """Return the explained variance (draws, 1) if the images count as often as weights (draws, n) say."""
    return np.array([[total(one[None] @ rows)] for one in weights])


def compare(
    before: Array, now: Array, _labels: Sequence[str], *, resampled: Callable[[Array, Array], Array] = resampled
) -> Comparison:
    """Compare the explained variance by resampling images."""
    changed, how = np.any(before != now, axis=1), "with other outputs"
    found = compare_classes(
        before, now, ("all",), resampled=resampled, measure="explained variance", changed=changed, how=how
    )
    return replace(found, lost=(), worse=())


def truth_text(_row: Array, _labels: Sequence[str]) -> str:
    """Return the same for all images: other truths come with another teacher, whose digest a baseline has."""
    return "the uncompressed network's output"


def show(output: Array, labels: Sequence[str], lines: int) -> Shown:
    """Return each channel's mean, standard deviation, least and largest value; of an embedding, one line for all."""
    values = channels_last(output[None])[0].astype(np.float64)  # (positions, channels)
    if len(values) == 1:
        values, labels = values.T, (f"all {len(labels)}",)
    columns = zip(values.mean(0), values.std(0), values.min(0), values.max(0), strict=True)
    return ("channel", "mean", "deviation", "least", "largest"), [
        (label, *map(float, column)) for label, column in zip(labels[:lines], columns, strict=False)
    ]


def worst(rows: Array) -> Array:
    """Return each image's squared error, (n,)."""
    return np.asarray(rows[:, ERROR])


def pictures(outputs: Array) -> Mapping[str, Array]:
    """Return images that networks give (files, n, 1 or 3, height, width) in uint8, channels last, black to white as the first file's; else none."""
    if outputs.ndim != 5 or outputs.shape[2] not in (1, 3):
        return {}
    low, high = (of(outputs[0], axis=(1, 2, 3), keepdims=True) for of in (np.min, np.max))
    shown = np.nan_to_num((outputs - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return {"": np.moveaxis(np.rint(255 * shown).astype(np.uint8), 2, -1)}


def _rows_of(rows: Array, outputs: Sequence[Output]) -> list[Array]:
    """Return each output's rows."""
    ends = np.cumsum([SUMS.start + (channels_of(one.shape) or 0) for one in outputs])
    return np.split(rows, ends[:-1], axis=1)


def _mean(values: Sequence[Array], outputs: Sequence[Output]) -> Array:
    """Return the mean of each output's values, by their weights."""
    return np.asarray(np.average(values, axis=0, weights=[one.weight for one in outputs]))


def _by_output(
    function: Callable[[Array, Array], Array], one: Array, other: Array, outputs: Sequence[Output]
) -> list[Array]:
    """Return a function's result for each output of two packed arrays."""
    parts, others = unpacked(matched(one, other, outputs), outputs), unpacked(other, outputs)
    return [function(parts[name], others[name]) for name in parts]


def _some(values: Array, output: Output) -> Array:
    """Return at most KEPT values of an output (n, ...): of a set all rows, of which fewer channels."""
    if output.unordered:
        return values[..., :: max(1, -(-output.size // KEPT))]
    return kept(values)


def several(outputs: Sequence[Output]) -> OutputTask:
    """Return the task for several outputs side by side: what the functions above do, for each by itself."""
    names, channels = [one.name for one in outputs], [channels_of(one.shape) or 0 for one in outputs]
    # As `sampled` lays them side by side.
    samples = [replace(one, shape=_some(np.zeros((1, *one.shape)), one).shape[1:]) for one in outputs]

    def each_shown(output: Array, labels: Sequence[str], lines: int) -> Shown:
        parts, found, start = unpacked(output[None], outputs), list[Sequence[str | float | None]](), 0
        for one, count in zip(outputs, channels, strict=True):
            columns, rows = show(parts[one.name][0], labels[start : start + count], lines)
            found += [(one.name, *row) for row in rows]
            start += count
        return ("output", *columns), found

    def score(rows: Array) -> float:
        return float(_mean([np.asarray(total(part)) for part in _rows_of(rows, outputs)], outputs))

    def drawn(rows: Array, weights: Array) -> Array:
        return np.array([[score(one[None] @ rows)] for one in weights])

    def all_together(predictions: Array, taught: Array, folders: Sequence[str]) -> Mapping[str, float | None]:
        found, true = unpacked(predictions, samples), unpacked(taught, samples)
        return {
            f"{metric}, {name}": value
            for name in names
            for metric, value in together(found[name], true[name], folders).items()
        }

    def check_channels(file: str, shape: tuple[int | None, ...], labels: Sequence[str]) -> None:
        wanted = (sum(one.size for one in outputs),)
        if shape[1:] != wanted or len(labels) != sum(channels):
            raise BundleError(
                f"labels.txt: {file} has {sum(channels)} channels in {', '.join(names)}, got {len(labels)} names: get the bundle again",
                defect="missing_class",
            )

    def statistics_of(predictions: Array, truths: Array, _output: tuple[int, ...]) -> Array:
        return np.column_stack(_by_output(lambda one, true: statistics(one, true, ()), predictions, truths, outputs))

    def sampled(values: Array) -> Array:
        parts = unpacked(values, outputs)
        return np.column_stack([_some(parts[one.name], one).reshape(len(values), -1) for one in outputs])

    def all_pictures(packed: Array) -> Mapping[str, Array]:
        parts = unpacked(packed.reshape(-1, packed.shape[-1]), outputs)
        shown = {name: pictures(part.reshape(*packed.shape[:2], *part.shape[1:])) for name, part in parts.items()}
        return {name: found[""] for name, found in shown.items() if found}

    def apart(values: Array, reference: Array) -> Array:
        return _mean(_by_output(divergence, values, reference, samples), outputs)

    return replace(
        TENSORS,
        check_output=check_channels,
        statistics=statistics_of,
        total=score,
        further=lambda rows: {
            **{name: total(part) for name, part in zip(names, _rows_of(rows, outputs), strict=True)},
            "cosine similarity": float(_mean([part[:, COSINE] for part in _rows_of(rows, outputs)], outputs).mean()),
        },
        measures=lambda rows: {
            f"{metric}, {name}": value
            for name, part in zip(names, _rows_of(rows, outputs), strict=True)
            for metric, value in measures(part).items()
        },
        together=all_together,
        kept=sampled,
        split=lambda packed: [{name: part[0] for name, part in unpacked(one[None], outputs).items()} for one in packed],
        agreement=lambda predictions, others: _mean(_by_output(agreement, predictions, others, samples), outputs),
        evidence=sampled,
        divergence=apart,
        compare=partial(compare, resampled=drawn),
        resampled=drawn,
        show=each_shown,
        drawn=all_pictures,
        worst=lambda rows: _mean(
            [worst(part) / max(variance(part), 1e-12) for part in _rows_of(rows, outputs)], outputs
        ),
        meaning=f"{', '.join(names)}, as the network computes them; `labels.txt` numbers their channels",
        reading="print({one.name: array.shape for one, array in zip(session.get_outputs(), outputs)})",
    )


TENSORS = OutputTask(
    name="tensors",
    metric=Metric(
        "explained_variance", "explained variance", "cosine similarity of the outputs of two files", counts_images=False
    ),
    output_shape=output_shape,
    check_output=check_output,
    truths=truths,
    truths_json=truths_json,
    listing=list_images,
    examples=find_images,
    decode=as_numbers,
    statistics=statistics,
    total=total,
    further=further,
    measures=measures,
    together=together,
    by_class=by_class,
    agreement=agreement,
    evidence=evidence,
    kept=kept,
    divergence=divergence,
    compare=compare,
    resampled=resampled,
    truth_text=truth_text,
    show=show,
    several=several,
    exclusive=False,
    by_class_axis=False,
    labelled=False,
    has_classes=False,
    taught=as_numbers,
    draw=lambda _image, picture, _labels: as_rgb(picture),
    drawn=pictures,
    worst=worst,
    hub=("image-feature-extraction", "explained variance"),
    meaning="what the network computes; `labels.txt` numbers its channels",
    reading="print(outputs.shape)",
)
