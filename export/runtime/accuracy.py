"""Score ONNX files in ONNX Runtime image by image, so that files can be compared on the same images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from export.errors import BundleError
from export.images.read import Labelled
from export.onnx_file.roles import TEACHER
from export.runtime.intervals import clopper_pearson, mean_interval, score_interval
from export.runtime.native import RUNTIME_ERRORS, first_line
from export.runtime.own import OwnMetric, means
from export.runtime.providers import PLAIN, Runtime, runtimes
from export.runtime.rows import AccuracyRow, OtherAccuracy
from export.runtime.session import infer, open_session
from export.tasks.paired import drawn_weights, mean_of_classes, resamples
from export.tasks.task import Array, OutputTask

DRAWS = 200  # resamples for the spread of a score, as Efron & Tibshirani (1993, section 6.4) advise; each sums over all detections


@dataclass(frozen=True)
class Score:
    """What agreements need of one file's predictions, the task's row of statistics for each image, and optionally the outputs' evidence."""

    task: OutputTask
    predictions: Array  # (n, ...), as the task keeps them
    rows: Array  # (n, k)
    evidence: Array | None = None  # (n, ...)
    own: Mapping[str, Array] = field(default_factory=dict)  # a person's own metrics (n,) by name

    @property
    def images(self) -> int:
        """The number of images."""
        return len(self.rows)

    @property
    def score(self) -> float:
        """The task's score, from 0 to 1."""
        return self.task.total(self.rows)

    @property
    def score_ci95(self) -> tuple[float, float]:
        """The score's interval, by resampling images; exact if the score counts them."""
        if self.task.metric.counts_images:
            return clopper_pearson(round(self.score * self.images), self.images)
        if self.task.resampled is None:
            drawn = np.array([self.task.total(self.rows[chosen]) for chosen in resamples(self.images)[:DRAWS]])
        else:
            drawn = mean_of_classes(self.task.resampled(self.rows, drawn_weights(self.images, DRAWS)))
        return score_interval(self.score, drawn, self.images)

    def part(self, numbers: Array) -> "Score":
        """Return the score on some of the images, by their numbers; without a person's own metrics."""
        evidence = None if self.evidence is None else self.evidence[numbers]
        return Score(self.task, self.predictions[numbers], self.rows[numbers], evidence)

    def agreement(self, other: "Score") -> float:
        """Return the agreement of both files' predictions, from 0 to 1."""
        return float(np.mean(self.task.agreement(self.predictions, other.predictions)))

    def divergence(self, reference: "Score") -> float:
        """Return the mean divergence of the evidence from the reference's, by the task's measure; 0 is equal."""
        assert self.evidence is not None
        assert reference.evidence is not None
        return float(np.mean(self.task.divergence(self.evidence, reference.evidence)))


def score_of(task: OutputTask, outputs: Iterable[Array], truths: Iterable[Array]) -> Score:
    """Score outputs that were computed elsewhere, batch by batch."""
    predictions, rows = [], []
    for part, true in zip(outputs, truths, strict=True):
        decoded = task.decode(part)
        predictions.append(task.kept(decoded))
        rows.append(task.statistics(decoded, true, part.shape[1:]))
    return Score(task, np.concatenate(predictions), np.concatenate(rows))


def predictions_of(path: Path, task: OutputTask) -> Callable[[Array], Array]:
    """Return a function from a batch of images to a file's predictions (n, ...); it raises BundleError if the file cannot run."""
    session = open_session(path)
    return lambda images: task.decode(_run(path.name, session, images))


def _run(name: str, session: InferenceSession, images: Array) -> Array:
    """Return the outputs (n, ...) for a batch of images."""
    try:
        return infer(session, images)
    except RUNTIME_ERRORS as error:
        raise BundleError(f"{name}: cannot run on {images.shape} ({first_line(error)}): export it again") from error


def score_files(
    files: Mapping[str, Path],
    batches: Iterable[Labelled],
    task: OutputTask,
    *,
    runs_in: Runtime = PLAIN,
    optimize: bool = True,
    keep_evidence: bool = False,
    own: OwnMetric | None = None,
    paths: Sequence[Path] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Score]:
    """Score every file on all batches, reading each batch once; `own` also gets the images' `paths`.

    Raises BundleError if there are no images or a file cannot run.
    """
    sessions = {name: open_session(path, runs_in=runs_in, optimize=optimize) for name, path in files.items()}
    predictions: dict[str, list[Array]] = {name: [] for name in files}
    rows: dict[str, list[Array]] = {name: [] for name in files}
    kept: dict[str, list[Array]] = {name: [] for name in files}
    numbers: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    images_seen = 0
    for images, truths in batches:
        these = paths[images_seen : images_seen + len(images)]
        images_seen += len(images)
        for name, session in sessions.items():
            outputs = _run(name, session, images)
            decoded = task.decode(outputs)
            predictions[name].append(task.kept(decoded))
            rows[name].append(task.statistics(decoded, truths, outputs.shape[1:]))
            if keep_evidence:
                kept[name].append(task.evidence(outputs).astype(np.float32))
            if own is not None:
                numbers[name] += map(own.row, task.split(outputs.astype(np.float32, copy=False)), these)
        progress(f"scored {images_seen} images")
    if not images_seen:
        raise BundleError("accuracy: no images to score: give a folder or file with at least one")
    return {
        name: Score(
            task,
            np.concatenate(predictions[name]),
            np.concatenate(rows[name]),
            np.concatenate(kept[name]) if keep_evidence else None,
            own.table(numbers[name]) if own else {},
        )
        for name in files
    }


def score_elsewhere(
    files: Mapping[str, Path],
    batches: Callable[[], Iterable[Labelled]],
    task: OutputTask,
    *,
    providers: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[Runtime, dict[str, Score]]]:
    """Yield every file's score in all of the `providers` (keys of PROVIDERS) and their arithmetics but the CPU provider in f32."""
    for runs_in in runtimes(providers):
        if runs_in != PLAIN:
            yield runs_in, score_files(files, batches(), task, runs_in=runs_in, progress=progress)


def accuracy_elsewhere(
    found: Mapping[Runtime, Mapping[str, Score]], *, reference: Score, folders: Sequence[str] = ()
) -> list[OtherAccuracy]:
    """Return the files' accuracy in each provider and arithmetic."""
    return [
        OtherAccuracy(
            provider=runs_in.provider.name,
            arithmetic=runs_in.arithmetic,
            files=accuracy(scores, reference=reference, folders=folders),
        )
        for runs_in, scores in found.items()
    ]


def accuracy(scores: Mapping[str, Score], *, reference: Score, folders: Sequence[str] = ()) -> dict[str, AccuracyRow]:
    """Return each file's score, further metrics, and agreement with the `reference`; `folders` are the images'."""
    rows = {
        name: AccuracyRow(
            score=found.score,
            further={**found.task.further(found.rows), **_together(found, scores.get(TEACHER), folders)},
            agreement=found.agreement(reference),
            images=found.images,
            score_ci95=found.score_ci95,
            agreement_ci95=mean_interval(found.task.agreement(found.predictions, reference.predictions)),
        )
        for name, found in scores.items()
    }
    for name, found in scores.items():
        if measures := {**found.task.measures(found.rows), **means(found.own)}:
            rows[name]["measures"] = measures
    return rows


def _together(found: Score, teacher: Score | None, folders: Sequence[str]) -> Mapping[str, float | None]:
    if found.task.together is None or teacher is None:
        return {}
    return found.task.together(found.predictions, teacher.predictions, folders)
