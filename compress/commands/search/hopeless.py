"""End hopeless trials early: Optuna's percentile pruner on distillation scores, among students of at most the same cost."""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from compress.artifact import read_meta
from compress.errors import ArtifactError
from compress.pipeline import PLANNED
from compress.recipe.schema import Model, Recipe
from compress.recipe.stages import StudentStage
from export.names import LOG_JSONL

KEPT = 75.0  # percent of trials that go on
LEAST = 4  # finished trials to compare with
UNJUDGED = 3  # never end a trial in the first third of its epochs


class Course(NamedTuple):
    """A student's distillation: its network, its MACs and parameters in millions, its score after each epoch so far."""

    arch: str
    epochs: int
    macs_m: float
    params_m: float
    scores: Sequence[float]

    def is_no_dearer(self, other: "Course") -> bool:
        """Tell whether this student has the same network and number of epochs, and no more MACs or parameters."""
        is_alike = (self.arch, self.epochs) == (other.arch, other.epochs)
        return is_alike and self.macs_m <= other.macs_m and self.params_m <= other.params_m


def is_hopeless(own: Course, finished: Iterable[Course]) -> bool:
    """Tell whether a student's best score is in the lowest quarter, at this epoch, of finished students that cost no more."""
    import optuna

    def trial(course: Course) -> optuna.trial.FrozenTrial:
        return optuna.trial.create_trial(value=0.0, intermediate_values=dict(enumerate(course.scores, start=1)))

    study = optuna.create_study(direction="maximize")
    study.add_trials([trial(other) for other in finished if other.is_no_dearer(own)])
    pruner = optuna.pruners.PercentilePruner(KEPT, n_startup_trials=LEAST, n_warmup_steps=own.epochs // UNJUDGED + 1)
    return pruner.prune(study, trial(own))


def course_of(recipe: Recipe, run: Path) -> Course | None:
    """Read the progress of a run's first distillation; None before its first epoch."""
    names = [section.stage for section in recipe.stages]
    if "distill" not in names or not (run / PLANNED).exists():  # or the run still reads its images
        return None
    index = names.index("distill")
    archs = [one.arch for one in (recipe.model, *recipe.stages[:index]) if isinstance(one, Model | StudentStage)]
    before, place = (Path(path) for path in json.loads((run / PLANNED).read_bytes())[index - 1 : index + 1])
    lines: list[str] = []
    for folder in (place.with_name(f".{place.name}.partial"), place):
        with suppress(FileNotFoundError):  # not there yet, or just renamed
            lines = (folder / LOG_JSONL).read_text().splitlines(keepends=True)
    epochs = [entry for line in lines if line.endswith("\n") and "epoch" in (entry := json.loads(line))]
    if not epochs:
        return None
    scores = [float(entry["score"]) for entry in epochs]
    with suppress(ArtifactError):  # it is being made anew, and the log is of a run that was killed
        cost = read_meta(before).metrics
        return Course(archs[-1], epochs[0]["epochs"], cost["macs_m"] or 0, cost["params_m"] or 0, scores)
    return None
