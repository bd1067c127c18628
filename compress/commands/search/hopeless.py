"""Which trials end early: by Optuna's percentile pruner, on the scores while distilling, among students that cost no more."""

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

KEPT = 75.0  # percent
LEAST = 4  # finished trials to compare with
UNJUDGED = 3  # the first third of the epochs


class Course(NamedTuple):
    """A student's distillation: of which network, what it costs in millions, its score after each epoch so far."""

    arch: str
    epochs: int
    macs_m: float
    params_m: float
    scores: Sequence[float]

    def is_no_dearer(self, other: "Course") -> bool:
        """Tell whether this is a student of the same network, distilled as long, with no more of anything."""
        is_alike = (self.arch, self.epochs) == (other.arch, other.epochs)
        return is_alike and self.macs_m <= other.macs_m and self.params_m <= other.params_m


def is_hopeless(own: Course, finished: Iterable[Course]) -> bool:
    """Tell whether a student's best score so far is in the lowest quarter of what those which cost no more had after as many epochs."""
    import optuna

    def trial(course: Course) -> optuna.trial.FrozenTrial:
        return optuna.trial.create_trial(value=0.0, intermediate_values=dict(enumerate(course.scores, start=1)))

    study = optuna.create_study(direction="maximize")
    study.add_trials([trial(other) for other in finished if other.is_no_dearer(own)])
    pruner = optuna.pruners.PercentilePruner(KEPT, n_startup_trials=LEAST, n_warmup_steps=own.epochs // UNJUDGED + 1)
    return pruner.prune(study, trial(own))


def follow_distillation(recipe: Recipe, stages: Path) -> Callable[[], Course | None]:
    """Return what reads how far a run's first distillation is in the folder of stages; None before its first epoch."""
    names = [section.stage for section in recipe.stages]
    index = names.index("distill") if "distill" in names else 0
    archs = [one.arch for one in (recipe.model, *recipe.stages[:index]) if isinstance(one, Model | StudentStage)]
    found: list[Path] = []  # the folder before it, and its own

    def read() -> Course | None:
        if not any(
            stages.glob(f"*{index:02d}-distill-*")
        ):  # by then the run knows the images: planning reads them no second time
            return None
        with suppress(UserError, OSError, ValueError):  # not there yet, moved, or a line half written: soon
            if not found:
                found.extend(line.directory for line in plan_recipe(recipe, stages=stages)[index - 1 : index + 1])
            before, place = found
            log = (place if place.exists() else place.with_name(f".{place.name}.partial")) / "log.jsonl"
            cost = read_meta(before).metrics
            epochs = [entry for entry in map(json.loads, log.read_text().splitlines()) if "epoch" in entry]
            if epochs:
                scores = [float(entry["score"]) for entry in epochs]
                return Course(archs[-1], epochs[0]["epochs"], cost["macs_m"] or 0, cost["params_m"] or 0, scores)
        return None

    return read
