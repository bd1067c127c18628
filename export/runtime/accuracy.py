"""Score ONNX files in ONNX Runtime, image by image, so that two files can be compared on the same ones."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError
from export.images.read import Labelled
from export.runtime.rows import AccuracyRow, Classes, FileClasses
from export.runtime.session import CPU, DTYPES, RUNTIME_ERRORS, first_line, open_session

TOP = 5  # with no more classes than these, every answer would be among them


@dataclass(frozen=True)
class Score:
    """What one file answered: the arg-max for each image, whether its label is among the five largest (None: unknown), and the logits if kept."""

    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    in_top5: NDArray[np.bool_] | None = None
    logits: NDArray[np.float32] | None = None

    @property
    def images(self) -> int:
        """How many images were scored."""
        return len(self.labels)

    @property
    def top1(self) -> float:
        """The fraction of images whose arg-max is their label."""
        return float(np.mean(self.predictions == self.labels))

    @property
    def top5(self) -> float | None:
        """The fraction of images whose label is among the five largest outputs."""
        return None if self.in_top5 is None else float(np.mean(self.in_top5))

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have images."""
        images = np.bincount(self.labels)
        correct = np.bincount(self.labels[self.predictions == self.labels], minlength=len(images))
        return float(np.mean(correct[images > 0] / images[images > 0]))

    def agreement(self, other: "Score") -> float:
        """Return the fraction of images that both answer alike."""
        return float(np.mean(self.predictions == other.predictions))

    def divergence(self, reference: "Score") -> float:
        """Return the mean Kullback-Leibler divergence in nats of the kept logits' distribution from the reference's."""
        assert self.logits is not None
        assert reference.logits is not None
        true, found = log_probabilities(reference.logits), log_probabilities(self.logits)  # (n, classes)
        return float(np.mean(np.sum(np.exp(true) * (true - found), axis=1)))


def score(
    files: Mapping[str, Path],
    batches: Iterable[Labelled],
    *,
    provider: str = CPU,
    threads: int = 0,
    optimize: bool = True,
    keep_logits: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Score]:
    """Run every batch through every file, its graph optimized or as it is; each batch is decoded once.

    Raises BundleError where there is no image or a file cannot run.
    """
    sessions = {
        name: open_session(path, provider=provider, threads=threads, optimize=optimize) for name, path in files.items()
    }
    answers: dict[str, list[NDArray[np.int64]]] = {name: [] for name in files}
    in_top5: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in files}
    kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in files}
    labels: list[NDArray[np.int64]] = []
    for images, targets in batches:
        labels.append(targets)
        for name, session in sessions.items():
            given = session.get_inputs()[0]
            try:
                (logits,) = session.run(None, {given.name: images.astype(DTYPES[given.type], copy=False)})
            except RUNTIME_ERRORS as error:
                raise BundleError(
                    f"{name}: cannot run on {images.shape} ({first_line(error)}): export it again"
                ) from error
            answers[name].append(np.argmax(logits, axis=1))  # (batch,)
            if logits.shape[1] > TOP:
                in_top5[name].append(ranks(logits, targets) < TOP)
            if keep_logits:
                kept[name].append(logits.astype(np.float32))
        progress(f"scored {sum(map(len, labels))} images")
    if not labels:
        raise BundleError("accuracy: no images to score: give a folder or file with at least one")
    truth = np.concatenate(labels)
    return {
        name: Score(
            np.concatenate(parts),
            truth,
            np.concatenate(in_top5[name]) if in_top5[name] else None,
            np.concatenate(kept[name]) if keep_logits else None,
        )
        for name, parts in answers.items()
    }


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logarithm of the softmax (n, classes); what is not finite counts as a number far outside of any logit's range."""
    finite = np.nan_to_num(logits.astype(np.float64), nan=0.0, posinf=1e4, neginf=-1e4)
    shifted = finite - finite.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def ranks(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many classes come before each image's label (n,); equal outputs come in the order of their classes, as for arg-max."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)  # (n, 1)
    lower = np.arange(logits.shape[1]) < labels[:, None]
    before = ~(logits <= own) | ((logits == own) & lower)  # what is no number comes before all
    found: NDArray[np.int64] = before.sum(axis=1)
    return found


def accuracy(scores: Mapping[str, Score], *, reference: str) -> dict[str, AccuracyRow]:
    """Return each file's accuracy and its agreement with the arg-max of the `reference` file."""
    return {
        name: AccuracyRow(
            top1=found.top1,
            top5=found.top5,
            balanced_accuracy=found.balanced_accuracy,
            agreement=found.agreement(scores[reference]),
            images=found.images,
        )
        for name, found in scores.items()
    }


def by_class(scores: Mapping[str, Score], names: Sequence[str], *, confused: Collection[str]) -> Classes:
    """Return what the files answer class by class, and the mistakes of the files in `confused`."""

    def count(classes: NDArray[np.int64]) -> list[int]:
        return np.bincount(classes, minlength=len(names)).tolist()  # type: ignore[no-any-return]

    truth = next(iter(scores.values())).labels
    return Classes(
        names=list(names),
        images=count(truth),
        files={
            name: FileClasses(
                correct=count(truth[found.predictions == truth]),
                answered=count(found.predictions),
                mistakes=_mistakes(found) if name in confused else None,
            )
            for name, found in scores.items()
        },
    )


def _mistakes(found: Score) -> list[tuple[int, int, int]]:
    pairs = zip(found.labels.tolist(), found.predictions.tolist(), strict=True)
    counts = Counter((label, answer) for label, answer in pairs if label != answer)
    return [(label, answer, images) for (label, answer), images in sorted(counts.items())]
