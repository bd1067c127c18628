"""Run one trial: a point of the space as a recipe, in an ordinary run, measured by its report."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.commands.search.board import Board, GivenUp, Measured, Taken
from compress.commands.search.hopeless import Course, course_of, is_hopeless
from compress.commands.search.measures import MEASURES, limits, measure, teacher_ms, teacher_of
from compress.commands.search.space import Point, Search, axes, probes, read_search
from compress.data.teachers import foreign
from compress.errors import CompressError, RecipeError
from compress.pipeline import PLANNED
from compress.recipe.read import read_recipe, write_recipe
from compress.recipe.schema import Recipe
from compress.recipe.stages import DistillStage, PruneStage, QatStage
from compress.report.shape import Report
from export.command.main import MISTAKE
from export.names import REPORT_JSON

Mode = Literal["full", "no_training"]
POLL_S = 0.5


@dataclass(frozen=True)
class Setup:
    """One search as it was started: its file, its folder, and the options of every run."""

    path: Path
    search: Search
    folder: Path
    data: str | None
    weights: str | None
    trust_code: bool

    @property
    def wanted(self) -> list[str]:
        """The measures that every trial must have."""
        limited = [limit.measure for text in self.search.constraints for limit in limits(text)]
        return list(dict.fromkeys((*self.search.objectives, *limited)))

    @property
    def may_end_early(self) -> bool:
        """Whether a trial with a low score may be ended early."""
        return self.search.end_early and not {"score", "drop"}.isdisjoint(self.search.objectives)

    @property
    def files(self) -> dict[str, Path]:
        """The recipe files by label."""
        return {Path(name).stem: self.path.parent / name for name in self.search.recipes}

    def place(self, board: str, number: int, seed: int) -> Path:
        """Return the folder of a trial's run, whose name is the run's."""
        several = f"-s{seed}" if len(self.search.seeds) > 1 else ""
        return self.folder / "trials" / f"{board[:48]}-{number:03d}{several}"

    def content(self) -> dict[str, object]:
        """Return everything that defines the trials, read again from the files: all but the budget."""
        found = self.search.model_dump(mode="json", exclude={"budget"})
        for name, file in self.files.items():
            recipe = read_recipe(file, self.search.set, data=self.data, weights=self.weights)
            found[f"recipe {name}"] = recipe.model_dump(mode="json", exclude={"out"})
        return found

    def recipe(self, point: Point, *, mode: Mode, further: Sequence[str] = ()) -> Recipe:
        """Return a trial's recipe, with the first seed unless `further` changes set another; raise RecipeError if it is invalid."""
        search, seed = self.search, self.search.seeds[0]
        file = self.files.get(str(point.get("recipe")), next(iter(self.files.values())))
        changes = [*search.set, f"seed={seed}", f"data.split_seed={seed}", f"data.judge_by={search.judge_by}"]
        changes += [change for axis in axes(search) for change in axis.changes(point[axis.name])]
        recipe = read_recipe(file, [*changes, *further], data=self.data, weights=self.weights)
        if recipe.students:
            raise RecipeError(f"{file}: has students; a search tries one student at a time, so give its stages instead")
        return _without_training(recipe) if mode == "no_training" else recipe


def open_setup(path: Path, *, data: str | None, weights: str | None, out: str, trust_code: bool) -> Setup:
    """Read a search, and check every choice as a recipe, so that no trial fails for it later."""
    search = read_search(path)
    setup = Setup(path, search, Path(out).expanduser() / search.name, data, weights, trust_code)
    for axis, points in probes(search):
        try:
            recipes = [setup.recipe(point, mode=search.mode) for point in points]
        except RecipeError as error:
            raise CompressError(f"{path}: {axis}: {error}") from error
        if len(recipes) > 1 and axis not in ("recipe", "variant") and all(recipe == recipes[0] for recipe in recipes):
            raise CompressError(
                f"{path}: space.{axis}: mode {search.mode} leaves out the stage that it changes; remove it"
            )
        for name in setup.wanted:
            stage = MEASURES[name].stage
            if stage and not all(stage in [section.stage for section in recipe.stages] for recipe in recipes):
                raise CompressError(
                    f"{path}: objectives: no stage measures {name}: add `- stage: {stage}` to the recipe, or leave it out"
                )
    return setup


def run_trial(setup: Setup, board: Board, taken: Taken, mode: Mode) -> Measured | GivenUp:
    """Run a trial once for each seed, as ordinary runs that share stages; return each measure by seed, or the last line of a run without.

    Raises CompressError if the recipe changed meanwhile.
    """
    board.hold(setup.content())
    found: list[dict[str, float]] = []
    teacher: list[str] = []
    for seed in setup.search.seeds:
        place = setup.place(board.name, taken.trial.number, seed)
        try:
            recipe = setup.recipe(taken.point, mode=mode, further=[f"seed={seed}", *teacher])
        except RecipeError as error:
            return GivenUp("refused", str(error))
        recipe = recipe.model_copy(update={"name": place.name, "out": str(place.parent)})
        report = _run(setup, board, recipe, taken)
        if isinstance(report, GivenUp):
            return report
        # All seeds share the first seed's teacher, so that the spread over seeds is the student's.
        if recipe.model is not None and not (recipe.model.weights or foreign(recipe.model.arch)):
            source = place / report["stages"][0]["directory"]
            teacher = [f"model.weights={json.dumps(str((source / 'weights.safetensors').resolve()))}"]
        board.set_clock(teacher_of(report), teacher_ms(report))
        found.append(measure(report, board.clocks))
    if lacking := [name for name in setup.wanted if not all(name in one for one in found)]:
        return GivenUp("refused", f"its run measured no {' and no '.join(lacking)}")
    return {name: [one[name] for one in found] for name in MEASURES if all(name in one for one in found)}


def _run(setup: Setup, board: Board, recipe: Recipe, taken: Taken) -> Report | GivenUp:
    """Run a recipe in its own process, with its output in a log beside its folder, and return its report."""
    place = Path(recipe.out) / recipe.name
    file, log_file = place.with_suffix(".yaml"), place.with_suffix(".log")
    write_recipe(recipe, file)
    made = _report(place)
    if made is not None and made["recipe"] == recipe.model_dump(mode="json"):
        return made  # the run of a killed worker finished
    for name in (REPORT_JSON, PLANNED):
        (place / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "compress.cli", "run", str(file), "--stages", str(setup.folder / "stages")]
    command += ["--trust-code"] if setup.trust_code else []
    with (
        log_file.open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[taken.lock.fileno()]) as process,
    ):
        if (hopeless := _watch(process, setup, board, recipe, taken)) is not None:
            return hopeless
    if (made := _report(place)) is not None:
        return made
    said = (log_file.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
    if process.returncode == MISTAKE:
        return GivenUp("refused", said)
    why = f"{recipe.name} ended with exit code {process.returncode}: {said}; its output is in {log_file}"
    return GivenUp("crashed", why)


def _watch(
    process: subprocess.Popen[bytes], setup: Setup, board: Board, recipe: Recipe, taken: Taken
) -> GivenUp | None:
    """Wait for a run to end; if its distillation scores are hopeless, terminate it.

    The first seed's scores are stored with the trial, for comparison with later trials.
    """
    seen: Course | None = None
    while process.returncode is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
        course = course_of(recipe, Path(recipe.out) / recipe.name) if recipe.seed == setup.search.seeds[0] else None
        if course is None or course == seen:
            continue
        seen = course
        taken.trial.set_user_attr("course", course._asdict())
        others = [row.course for row in board.rows() if row.state == "done" and row.course is not None]
        if process.returncode is None and setup.may_end_early and is_hopeless(course, others):
            process.terminate()
            process.wait()
            score = f"{course.scores[-1]:.2%}"
            return GivenUp(
                "ended", f"ended after epoch {len(course.scores)} of {course.epochs} with a score of {score}"
            )
    return None


def _report(place: Path) -> Report | None:
    try:
        found: Report = json.loads((place / REPORT_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _without_training(recipe: Recipe) -> Recipe:
    """Return a recipe that only prunes, reconstructs, calibrates and measures; raise RecipeError if that is invalid."""
    kept = [
        section.model_copy(update={"recover": None, "sparsity": None}) if isinstance(section, PruneStage) else section
        for section in recipe.stages
        if not isinstance(section, DistillStage | QatStage)
    ]
    try:
        return Recipe.model_validate(recipe.model_copy(update={"stages": tuple(kept)}).model_dump())
    except ValueError as error:
        raise RecipeError(f"no_training: {error}") from error
