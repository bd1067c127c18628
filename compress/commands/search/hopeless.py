"""End hopeless trials early: Optuna's percentile pruner on distillation scores, among students of at most the same cost."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from compress.artifact import read_meta
from compress.pipeline import plan_recipe
from compress.recipe.schema import Model, Recipe
from compress.recipe.stages import StudentStage
from export.errors import UserError
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


def follow_distillation(recipe: Recipe, stages: Path) -> Callable[[], Course | None]:
    """Return a function that reads the progress of a run's first distillation from its stages; None before the first epoch."""
    names = [section.stage for section in recipe.stages]
    index = names.index("distill") if "distill" in names else 0
    archs = [one.arch for one in (recipe.model, *recipe.stages[:index]) if isinstance(one, Model | StudentStage)]
    found: list[Path] = []  # the folders of the stage before distillation and of distillation

    def read() -> Course | None:
        if not any(stages.glob(f"*{index:02d}-distill-*")):
            return None  # planning waits for the run, which reads the images first and caches their digest
        with suppress(
            UserError, OSError, ValueError
        ):  # not there yet, just moved, or a line half written: try again later
            if not found:
                found.extend(line.directory for line in plan_recipe(recipe, stages=stages)[index - 1 : index + 1])
            before, place = found
            log = (place if place.exists() else place.with_name(f".{place.name}.partial")) / LOG_JSONL
            cost = read_meta(before).metrics
            epochs = [entry for entry in map(json.loads, log.read_text().splitlines()) if "epoch" in entry]
            if epochs:
                scores = [float(entry["score"]) for entry in epochs]
                return Course(archs[-1], epochs[0]["epochs"], cost["macs_m"] or 0, cost["params_m"] or 0, scores)
        return None

    return read
