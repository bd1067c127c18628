"""Take a trial, run it and record its result, until the budget is spent; then show the front."""

import fcntl
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from compress.commands.search.board import Board, GivenUp, Measured, Row, Taken, best, losses
from compress.commands.search.measures import MEASURES, limits
from compress.commands.search.page import pick_name, write_page
from compress.commands.search.show import front_table, write_scores
from compress.commands.search.space import grid
from compress.commands.search.trial import Mode, Setup, run_trial
from compress.errors import CompressError
from compress.pipeline import run_recipe
from compress.recipe.read import write_recipe
from compress.report.bundling import publish
from compress.report.page.screen import screen
from export.names import BUNDLE

POLL_S = 1.0
MOST_CRASHES = 3  # in a row; then the machine is at fault, not the trials
MODES: dict[Mode, list[Mode]] = {"full": ["full"], "no_training": ["no_training", "full"]}  # of each board


@contextmanager
def own_gpu() -> Iterator[None]:
    """Reserve one of several GPUs for this worker's runs; raise CompressError if this machine's other workers hold them all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else sorted(path.name[6:] for path in Path("/dev").glob("nvidia[0-9]*"))
    if len(gpus) < 2:
        yield
        return
    for gpu in gpus:
        with Path(tempfile.gettempdir(), f"compress-search-{os.getuid()}-gpu-{gpu}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            yield
            return
    raise CompressError(
        f"all {len(gpus)} GPUs are in use by other workers; to share one, set CUDA_VISIBLE_DEVICES to it"
    )


def search(setup: Setup, *, storage: str | None, picked: str | None, to: Path | None, verbose: bool) -> Path | int:
    """Run a search and return its page, or publish its best trial within the limits `picked` and return that run's exit code.

    Raises CompressError if it cannot be run.
    """
    if picked is not None:
        return publish_pick(setup, open_boards(setup, storage=storage), picked, to=to, verbose=verbose)
    if to is not None:
        raise CompressError(f"--to {to}: a search publishes nothing by itself: say which trial with --pick LIMITS")
    return run_search(setup, storage=storage)


@own_gpu()
def run_search(setup: Setup, *, storage: str | None) -> Path:
    """Run a search until its budget is spent, together with other workers of the same command, and return its page.

    Raises CompressError if it cannot be run.
    """
    boards, console = open_boards(setup, storage=storage), Console(stderr=True)
    for board, mode in zip(boards, MODES[setup.search.mode], strict=True):
        if board is not boards[0]:
            board.points = [row.point for row in best(boards[0].rows(), setup.search)]
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def told(row: Row, board: Board = board, live: Live = live) -> None:
                write_page(setup, boards)
                if console.is_interactive:
                    live.update(front_table(board, is_over=False), refresh=True)
                said = row.error or ", ".join(row.shown(setup.search.objectives))
                console.print(Text(f"{board.name} {row.number:03d}: {said} ({row.where})"), soft_wrap=True)

            work(board, partial(run_trial, setup, board, mode=mode), told=told)
        write_scores(setup, board)
        screen().print(front_table(board, is_over=True))
    return write_page(setup, boards)


def open_boards(setup: Setup, *, storage: str | None) -> list[Board]:
    """Open or join the search's board, and a second one for trained trials if the first ranks without training.

    Raises CompressError if the search was started with another recipe or space.
    """
    search = setup.search
    names = [search.name] if search.mode == "full" else [search.name, f"{search.name}-trained"]
    boards = [Board(search, setup.folder, name=name, storage=storage) for name in names]
    for board in boards:
        board.hold(setup.content())
    boards[0].points = grid(search) if search.sampler == "grid" else None
    return boards


def work(
    board: Board,
    run: Callable[[Taken], Measured | GivenUp],
    *,
    told: Callable[[Row], None] = lambda _: None,
    poll_s: float = POLL_S,
) -> None:
    """Take and run trials until none is left or running; `run` returns each measure by seed, `told` is called after each trial.

    Raises CompressError if several runs in a row crash, or no trial's recipe can be run.
    """
    hours = board.search.budget.hours
    started_s, crashes = time.monotonic(), 0
    while True:
        may_start = hours is None or time.monotonic() - started_s < 3600 * hours
        if (taken := board.take(may_start=may_start)) is None:
            if board.is_over() or not may_start:
                break
            time.sleep(poll_s)
            continue
        with taken.lock:
            found = run(taken)
            board.finish(taken, found)
        if not isinstance(found, GivenUp):
            crashes = 0
        elif found.why == "crashed":
            crashes += 1
            if crashes == MOST_CRASHES:
                raise CompressError(f"{crashes} trials in a row crashed; the last: {found.error}")
        told(next(row for row in board.rows() if row.number == taken.trial.number))
    rows = board.rows()
    if rows and all(row.state == "refused" for row in rows):
        raise CompressError(f"none of {len(rows)} trials could be run; the first: {rows[0].error}")


def publish_pick(setup: Setup, boards: Sequence[Board], text: str, *, to: Path | None, verbose: bool) -> int:
    """Run the best trial within the limits on all training images, score it once on the validation images, and publish it.

    Returns the run's exit code. Raises CompressError if no trial is within the limits, or validation images scored the trials.
    """
    search = setup.search
    if search.judge_by == "validation":
        raise CompressError("--pick: the validation images scored every trial, so they cannot judge a pick; "
                            "set judge_by: tuning, and give the search another name")  # fmt: skip
    row = pick(setup, boards, text)
    recipe = setup.recipe(row.point, mode="full", further=["data.judge_by=validation"])
    recipe = recipe.model_copy(update={"name": pick_name(search, f"{row.number:03d}"), "out": str(setup.folder)})
    root, stages = setup.folder / recipe.name, setup.folder / "stages"
    file = root.with_suffix(".yaml")
    write_recipe(recipe, file)
    command = f"compress run {file} --stages {stages}"
    code = run_recipe(recipe, trust_code=setup.trust_code, until=None, verbose=verbose, command=command, stages=stages)
    if (root / BUNDLE).exists():
        publish(root, to or setup.folder / "published", key=None)
    write_page(setup, boards)
    return code


def pick(setup: Setup, boards: Sequence[Board], text: str) -> Row:
    """Return the best trial, by the objectives in order, within the limits in a text such as `latency < 5`.

    Raises CompressError if there is none.
    """
    try:
        wanted = limits(text)
    except ValueError as error:
        raise CompressError(f"--pick: {str(error).removeprefix('constraints: ')}") from error
    done = [row for row in boards[-1].rows() if row.state == "done" and row.is_allowed]
    met = [row for row in done if all(limit.is_met(row.mean(limit.measure)) for limit in wanted)]
    if not met:
        limit = wanted[0]
        near = min(done, key=lambda row: limit.excess(row.mean(limit.measure) or math.inf), default=None)
        closest = f"; the closest has {MEASURES[limit.measure].show(near.mean(limit.measure))}" if near else ""
        raise CompressError(f"--pick: none of {len(done)} trials has {text}{closest}")
    return min(met, key=lambda row: losses(row, setup.search))
