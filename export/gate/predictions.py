"""A file's prediction for each image, by the image's digest, so that another file's can be paired with it later."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle.read import Bundle
from export.errors import BundleError
from export.runtime.accuracy import score_files
from export.runtime.own import OwnMetric
from export.runtime.providers import PLAIN, Runtime
from export.tasks.task import Array, Comparison, OutputTask


@dataclass(frozen=True)
class Predictions:
    """For each image, by digest, its truth in words and the task's row of statistics; `notes` are not recorded."""

    task: OutputTask
    labels: tuple[str, ...]
    rows: dict[str, tuple[str, tuple[float, ...]]]
    own: dict[str, dict[str, float]] = field(default_factory=dict)  # a person's own metrics by digest, if any
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def score(self) -> float:
        """The task's score on all images."""
        return self.task.total(self.table(list(self.rows)))

    def table(self, digests: list[str]) -> Array:
        """Return the rows (n, k) of some images."""
        return np.array([self.rows[digest][1] for digest in digests])

    def to_json(self) -> dict[str, list[Any]]:
        """Return each image's truth and row, by digest."""
        return {digest: [truth, *row] for digest, (truth, row) in self.rows.items()}


def predictions_from_json(
    task: OutputTask,
    labels: tuple[str, ...],
    document: dict[str, list[Any]],
    own: dict[str, dict[str, float]] | None = None,
) -> Predictions:
    """Read what `to_json` wrote, and a person's own metrics."""
    return Predictions(
        task, labels, {digest: (truth, tuple(row)) for digest, (truth, *row) in document.items()}, own or {}
    )


def pair(before: Predictions, now: Predictions) -> Comparison | None:
    """Compare both on their common images; None if there are none."""
    both = [digest for digest in before.rows if digest in now.rows]
    return now.task.compare(before.table(both), now.table(both), now.labels) if both else None


def predict_all(
    bundle: Bundle, file: str, data: Path, own: OwnMetric | None = None, *, runs_in: Runtime = PLAIN
) -> Predictions:
    """Run one file of the bundle on every image of `data`; duplicate images count once.

    Raises BundleError for data that do not fit the bundle, and where a person's own metric is not finite.
    """
    examples = bundle.examples(data)
    paths, one = examples.paths() if own else [], {file: bundle.files[file]}
    found = score_files(one, examples.batches(), bundle.task, runs_in=runs_in, own=own, paths=paths)[file]
    if bad := [name for name, values in found.own.items() if not np.isfinite(values).all()]:
        raise BundleError(
            f"--score: {bad[0]} of {file} is not finite on {paths[int(np.argmin(np.isfinite(found.own[bad[0]])))]}"
        )
    numbers: dict[str, dict[str, float]] = {}
    for index, digest in enumerate(examples.digests() if own else ()):
        numbers.setdefault(digest, {name: float(values[index]) for name, values in found.own.items()})
    rows: dict[str, tuple[str, tuple[float, ...]]] = {}
    for digest, row in zip(examples.digests(), found.rows, strict=True):
        rows.setdefault(digest, (bundle.task.truth_text(row, bundle.labels), tuple(row.tolist())))
    return Predictions(bundle.task, bundle.labels, rows, numbers, examples.notes)
