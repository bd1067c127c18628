"""The trials of a search in Optuna's storage, which all workers share: which are taken, and their results.

A worker holds a trial's lock file while it runs the trial. A running trial whose lock is free was left by a killed worker, and the next
worker resumes it. The run's own process inherits the lock, so that no one resumes a trial that still runs.
"""

import fcntl
import json
import secrets
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from compress.commands.search.front import Losses, covered, front
from compress.commands.search.hopeless import Course
from compress.commands.search.measures import MEASURES, limits
from compress.commands.search.space import Axis, Point, Search, axes
from compress.errors import CompressError

if TYPE_CHECKING:
    import optuna

MOST_STARTUP = 10  # random trials before TPE starts to model
Measured = Mapping[str, Sequence[float]]  # each measure by seed
Why = Literal["ended", "refused", "crashed"]  # "ended" means early


class GivenUp(NamedTuple):
    """Why a trial has no measures. Ended early and refused are final; for a crashed one, another trial is started."""

    why: Why
    error: str


class Taken(NamedTuple):
    """A trial that this worker holds."""

    trial: "optuna.Trial"
    point: Point
    lock: IO[str]


@dataclass(frozen=True)
class Row:
    """One trial: its measures for each seed, or the reason why it has none."""

    number: int
    point: Point
    state: Literal["done", "running"] | Why
    measured: Measured
    error: str
    is_allowed: bool
    course: Course | None

    def mean(self, name: str) -> float | None:
        """Return a measure's mean over the seeds."""
        return statistics.fmean(self.measured[name]) if self.measured.get(name) else None

    def shown(self, names: Iterable[str]) -> list[str]:
        """Return measures as means over the seeds, with the range if there are several."""
        return [MEASURES[name].show_all(self.measured.get(name, ())) for name in names]

    @property
    def where(self) -> str:
        """The point in words."""
        return ", ".join(f"{name} {value}" for name, value in self.point.items())


def losses(row: Row, search: Search) -> Losses:
    """Return a finished trial's objectives, with signs so that less is better."""
    return tuple((-1 if MEASURES[name].is_gain else 1) * (row.mean(name) or 0.0) for name in search.objectives)


def best(rows: Sequence[Row], search: Search) -> list[Row]:
    """Return the Pareto front of the finished trials within all constraints, the best in the first objective first."""
    done = [row for row in rows if row.state == "done" and row.is_allowed]
    found = [done[index] for index in front([losses(row, search) for row in done])]
    return sorted(found, key=lambda row: losses(row, search))


def progress(rows: Sequence[Row], search: Search) -> list[float]:
    """Return the hypervolume after each finished trial, as a fraction of the box around all of them."""
    done = [row for row in rows if row.state == "done"]
    return covered([losses(row, search) for row in done], [row.is_allowed for row in done])


def idle(rows: Sequence[Row], search: Search) -> int:
    """Return the number of trials, also ended early or refused, since the last that gained hypervolume."""
    done = [row.number for row in rows if row.state == "done"]
    gained = [0.0, *progress(rows, search)]
    last = max((n for n, own, before in zip(done, gained[1:], gained, strict=False) if own > before), default=-1)
    return sum(row.number > last and row.state not in ("running", "crashed") for row in rows)


class Board:
    """The trials of one search; `points` are the points to try if no sampler chooses."""

    def __init__(self, search: Search, folder: Path, *, name: str, storage: str | None) -> None:
        """Open the search or join it; raise CompressError if the storage cannot be reached."""
        self.search, self.folder, self.name = search, folder, name
        self.points: Sequence[Point] | None = None
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        with self.alone():
            self._study = _open(search, folder, name, storage)

    def hold(self, content: Mapping[str, Any]) -> None:
        """Store the trials' settings and folder; raise CompressError if the search was started with others."""
        mark = self.folder / ".search"
        with self.alone():
            if not mark.exists():
                mark.write_text(secrets.token_hex(8))
            own = json.loads(json.dumps({**content, "--out": mark.read_text()}))
            before = self._study.user_attrs.get("content")
            if before is None:
                self._study.set_user_attr("content", own)
            elif changed := [key for key in own if before.get(key) != own[key]]:
                raise CompressError(
                    f"{self.folder}: the search {self.name} was started with another {' and '.join(changed)}; "
                    "start it as it was, or give this one another name"
                )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the board against all other workers."""
        with (self.folder / ".board").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def rows(self) -> list[Row]:
        """Return all trials by number."""
        own = axes(self.search)
        return [_row(trial, own) for trial in self._study.get_trials(deepcopy=False) if trial.state.name != "WAITING"]

    @property
    def clocks(self) -> dict[str, float]:
        """The reference time of each teacher, in ms."""
        return dict(self._study.user_attrs.get("clocks", {}))

    def set_clock(self, teacher: str, ms: float | None) -> None:
        """Set a teacher's reference time, if it was measured and has none yet."""
        with self.alone():
            if ms is not None and teacher not in self.clocks:
                self._study.set_user_attr("clocks", {**self.clocks, teacher: ms})

    def take(self, *, may_start: bool) -> Taken | None:
        """Return a trial that a killed worker left, or a new one if the budget allows, or else None."""
        import optuna

        with self.alone():
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state.name == "RUNNING" and (lock := self._lock(trial.number)):
                    return self._taken(optuna.trial.Trial(self._study, trial._trial_id), lock)
            known = [t for t in trials if t.state.name != "FAIL" or "refused" in t.user_attrs]
            if not may_start or (not any(t.state.name == "WAITING" for t in known) and not self._propose(known)):
                return None
            self._study.sampler = _sampler(self.search, len(trials))
            new = self._study.ask()
            lock = self._lock(new.number)
            assert lock is not None
            return self._taken(new, lock)

    def is_over(self) -> bool:
        """Tell whether no trial is running."""
        return all(row.state != "running" for row in self.rows())

    def finish(self, taken: Taken, found: Measured | GivenUp) -> None:
        """Store a trial's measures, or why it has none, and end it."""
        import optuna

        trial = taken.trial
        if isinstance(found, GivenUp):
            trial.set_user_attr(found.why, found.error)
            state = optuna.trial.TrialState.PRUNED if found.why == "ended" else optuna.trial.TrialState.FAIL
            self._study.tell(trial, state=state)
            return
        means = {name: statistics.fmean(values) for name, values in found.items()}
        trial.set_user_attr("measured", dict(found))
        for text in self.search.constraints:
            trial.set_constraint(text, max(limit.excess(means[limit.measure]) for limit in limits(text)))
        self._study.tell(trial, [means[name] for name in self.search.objectives])

    def importance(self) -> dict[str, dict[str, float]]:
        """Return each axis's importance for each objective, by Optuna's PED-ANOVA; empty if there are too few trials."""
        import optuna

        def loss(index: int, sign: int) -> Callable[["optuna.trial.FrozenTrial"], float]:
            return lambda trial: sign * (trial.values or [])[index]

        found = {}
        for index, name in enumerate(self.search.objectives):
            with warnings.catch_warnings(), suppress(ValueError, RuntimeError, UserWarning):
                warnings.simplefilter("error")  # with too few trials, Optuna warns and calls all axes equally important
                warnings.filterwarnings("ignore", ".*to achieve low `target` values")
                target = loss(index, -1 if MEASURES[name].is_gain else 1)
                found[name] = optuna.importance.get_param_importances(self._study, target=target)
        return found

    def _propose(self, known: Sequence["optuna.trial.FrozenTrial"]) -> bool:
        """Tell whether one more trial is wanted; queue a grid's next combination."""
        budget = self.search.budget
        if self.points is None:
            is_spent = budget.trials is not None and len(known) >= budget.trials
            is_idle = budget.patience is not None and idle(self.rows(), self.search) >= budget.patience
            return not (is_spent or is_idle)
        tried = [trial.params for trial in known]
        point = next((point for point in self.points if point not in tried), None)
        if point is not None:
            self._study.enqueue_trial(dict(point))
        return point is not None

    def _taken(self, trial: "optuna.Trial", lock: IO[str]) -> Taken:
        return Taken(trial, {axis.name: _suggest(trial, axis) for axis in axes(self.search)}, lock)

    def _lock(self, number: int) -> IO[str] | None:
        """Return a trial's lock, or None if another worker holds it."""
        file = (self.folder / "trials" / f".{self.name}-{number:03d}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


def _suggest(trial: "optuna.Trial", axis: Axis) -> str | float:
    span = axis.span
    if span is None:
        return str(trial.suggest_categorical(axis.name, list(axis.choices)))
    low, high = span.low, span.values()[-1]
    if span.is_whole:
        return int(trial.suggest_int(axis.name, int(low), int(high), step=int(span.step or 1), log=span.log))
    return span.rounded(trial.suggest_float(axis.name, low, high, step=span.step, log=span.log))


def _row(trial: "optuna.trial.FrozenTrial", own: Sequence[Axis]) -> Row:
    attrs, params = trial.user_attrs, trial.params
    ended: Why = next((why for why in get_args(Why) if why in attrs), "crashed")
    drawn = [axis for axis in own if axis.name in params]  # a trial that was just taken may still lack some
    return Row(
        number=trial.number,
        point={axis.name: axis.span.rounded(params[axis.name]) if axis.span else params[axis.name] for axis in drawn},
        state="done" if trial.state.name == "COMPLETE" else "running" if trial.state.name == "RUNNING" else ended,
        measured=attrs.get("measured", {}),
        error=attrs.get(ended, ""),
        is_allowed=all(excess <= 0 for excess in trial.constraints.values()),
        course=Course(**attrs["course"]) if "course" in attrs else None,
    )


def _sampler(search: Search, trials: int) -> "optuna.samplers.BaseSampler":
    """Return a new sampler for the next trial, seeded by the number of trials, so that a resumed search does not repeat draws."""
    import optuna

    seed = search.seed * 100_003 + trials
    if search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    startup = max(2, min(MOST_STARTUP, (search.budget.trials or 3 * MOST_STARTUP) // 3))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


class _JournalLock:
    """Optuna's lock of the journal, which the system frees if its worker is killed; others wait 30 s for Optuna's own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Free the lock."""
        self._file.close()


def _open(search: Search, folder: Path, name: str, storage: str | None) -> "optuna.Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    gains = [MEASURES[measure].is_gain for measure in search.objectives]
    directions: list[Literal["minimize", "maximize"]] = ["maximize" if gain else "minimize" for gain in gains]
    if storage is None:
        lock = _JournalLock(folder / ".journal")
        kept: optuna.storages.BaseStorage = JournalStorage(JournalFileBackend(str(folder / "journal.log"), lock))  # type: ignore[arg-type]
    else:
        kept = _database(storage)
    return optuna.create_study(study_name=name, storage=kept, directions=directions, load_if_exists=True)


def _database(url: str) -> "optuna.storages.BaseStorage":
    import optuna
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    shown = url.partition("://")[0]
    try:
        shown = make_url(url).render_as_string(hide_password=True)
        # Close each connection after use: one that idles through an hour's trial may be dropped.
        return optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
    except (ImportError, SQLAlchemyError) as error:
        said = str(getattr(error, "orig", None) or error).partition("\n")[0]
        repair = "install the driver" if isinstance(error, ImportError) else "start it"
        raise CompressError(
            f"STORAGE={shown}: cannot be reached ({said}); {repair}, or leave it out: workers that share OUT do not need it"
        ) from error
