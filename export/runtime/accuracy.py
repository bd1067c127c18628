"""Score ONNX files in ONNX Runtime, image by image, so that two files can be compared on the same ones."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError
from export.images.read import Labelled
from export.runtime.rows import AccuracyRow
from export.runtime.session import CPU, DTYPES, RUNTIME_ERRORS, first_line, open_session


@dataclass(frozen=True)
class Score:
    """What one file answered: the arg-max for each image, and the fraction that is right."""

    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def images(self) -> int:
        """How many images were scored."""
        return len(self.labels)

    @property
    def top1(self) -> float:
        """The fraction of images whose arg-max is their label."""
        return float(np.mean(self.predictions == self.labels))

    def agreement(self, other: "Score") -> float:
        """Return the fraction of images that both answer alike."""
        return float(np.mean(self.predictions == other.predictions))


def score(
    files: Mapping[str, Path],
    batches: Iterable[Labelled],
    *,
    provider: str = CPU,
    threads: int = 0,
    optimize: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Score]:
    """Run every batch through every file, its graph optimized or as it is; each batch is decoded once.

    Raises BundleError where there is no image or a file cannot run.
    """
    sessions = {
        name: open_session(path, provider=provider, threads=threads, optimize=optimize) for name, path in files.items()
    }
    answers: dict[str, list[NDArray[np.int64]]] = {name: [] for name in files}
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
        progress(f"scored {sum(map(len, labels))} images")
    if not labels:
        raise BundleError("accuracy: no images to score: give a folder or file with at least one")
    truth = np.concatenate(labels)
    return {name: Score(np.concatenate(parts), truth) for name, parts in answers.items()}


def accuracy(scores: Mapping[str, Score], *, reference: str) -> dict[str, AccuracyRow]:
    """Return each file's top-1 and its agreement with the arg-max of the `reference` file."""
    return {
        name: AccuracyRow(top1=found.top1, agreement=found.agreement(scores[reference]), images=found.images)
        for name, found in scores.items()
    }
