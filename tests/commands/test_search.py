"""Searches: what may stand in one, who runs which trial, what is found."""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from elsewhere.files import is_there
from elsewhere.postgresql import server, use_driver
from optuna._hypervolume import compute_hypervolume  # the independent one
from typer.testing import CliRunner
from workers import SEARCH, a_board, a_search, many, measured, worker

from compress.cli import app
from compress.commands.search import run as search_run
from compress.commands.search import trial
from compress.commands.search.board import Board, GivenUp, Measured, Taken, best, progress
from compress.commands.search.front import front, hypervolume
from compress.commands.search.hopeless import Course, is_hopeless
from compress.commands.search.measures import MEASURES, limits
from compress.commands.search.page import write_page
from compress.commands.search.run import open_boards, own_gpu, pick, work
from compress.commands.search.space import Search, axes, grid, probes
from compress.commands.search.trial import Setup, open_setup
from compress.errors import CompressError
from compress.recipe import strict_yaml
from compress.recipe.schema import Recipe
from compress.run import open_run

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((*ROOT.glob("recipes/studies/*.yaml"), *ROOT.glob("recipes/search/*.yaml")))
PAGE = ROOT / "docs" / "search.md"
RECIPE = """
name: a
data: {{dataset: digits, image_size: 16, limit_per_class: 10}}
model: {{arch: "{networks}:small"}}
stages:
  - {{stage: source, fit: {{epochs: 1, batch_size: 32}}}}
  - {{stage: prune, keep_macs: 0.5}}
  - {{stage: distill, fit: {{epochs: 1, batch_size: 32, lr: 0.02}}}}
"""


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.yaml").write_text(RECIPE.format(networks=ROOT / "tests" / "networks.py"))
    (folder / "search.yaml").write_text(strict_yaml.dump({**SEARCH, **changes}))
    return folder / "search.yaml"


# --- the file


def test_the_page_shows_legal_searches_and_names_every_field_and_measure() -> None:
    page = PAGE.read_text()
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for number, example in enumerate(examples):
        search = Search.model_validate(strict_yaml.load(example))
        setup = Setup(ROOT / "recipes/search/example.yaml", search, Path("runs"), None, None, False)
        drawn = [setup.recipe(point, mode="full") for _, points in probes(search) for point in points]
        assert len({recipe.model_dump_json() for recipe in drawn}) == (5, 4)[number]
    assert [field for field in Search.model_fields if f"| `{field}` |" not in page] == []
    assert [name for name in MEASURES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_choice_of_a_shipped_search_is_a_legal_recipe(path: Path, tmp_path: Path) -> None:
    data = None if "quickstart" in path.name else "/data/images"
    open_setup(path, data=data, weights=None, out=str(tmp_path), trust_code=False)
    assert "Command:" in path.read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"space": {}}, "space: is empty: give a path of the recipe with values, or variants"),
        ({"space": {"prune.criterion": []}}, "space.prune.criterion: is empty"),
        ({"space": {"prun.keep_macs": [0.5]}}, "prun.keep_macs: --set prun.keep_macs=0.5: unknown path prun.keep_macs"),
        ({"space": {"prune.keep_macs": [0.5, 2]}}, "stages.1.keep_macs: must be < 1, got 2"),
        ({"space": {"prune.keep_macs": {"low": 0.9, "high": 0.1}}}, "high: must be > low (0.9), got 0.1"),
        ({"space": {"prune.keep_macs": {"low": 0.1, "high": 0.9}}, "sampler": "grid"}, "a range with a step"),
        ({"objectives": ["score", "speed"]}, "objectives: nothing measures speed; did you mean speedup?"),
        ({"objectives": ["score", "latency"]}, "no stage measures latency: add `- stage: bench`"),
        ({"constraints": ["macs under 5"]}, "'macs under 5' is not a limit; write it as `latency < 5`"),
        ({"budget": {}}, "budget: give trials, hours or patience"),
        ({"mode": "no_training", "space": {"distill.fit.lr": [0.1, 0.2]}}, "mode no_training leaves out the stage that it changes"),
        ({"recipes": ["b.yaml"]}, "b.yaml: no such file; "),
    ],
)  # fmt: skip
def test_a_wrong_search_is_told_in_a_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    done = CliRunner().invoke(app, ["search", str(written(tmp_path, **changes)), "--out", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:////nowhere/at/all.db", "cannot be reached"),
        ("postgresql://me:secret@127.0.0.1:1/none", "cannot be reached|needs a driver"),
        ("nonsense", "cannot be reached"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_told_without_its_password(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(CompressError, match=words) as caught:
        Board(a_search(), tmp_path, name="two", storage=url)
    assert "secret" not in str(caught.value)


def test_a_search_whose_recipe_changed_under_it_is_refused_and_a_larger_budget_is_not(tmp_path: Path) -> None:
    path = written(tmp_path)

    def opened(**changes: Any) -> list[Board]:
        written(tmp_path, **changes)
        return open_boards(open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=False), storage=None)

    opened()
    opened(budget={"trials": 9})
    with pytest.raises(CompressError, match="another space; start it as it was, or give this one another"):
        opened(space={"prune.keep_macs": [0.5, 0.6]})
    setup = open_setup(written(tmp_path), data=None, weights=None, out=str(tmp_path), trust_code=False)
    (board,) = open_boards(setup, storage=None)
    (tmp_path / "a.yaml").write_text((tmp_path / "a.yaml").read_text().replace("lr: 0.02", "lr: 0.01"))
    with pytest.raises(CompressError, match="started with another recipe a; start it as it was"):
        open_boards(setup, storage=None)
    with pytest.raises(CompressError, match="started with another recipe a"):  # also under a worker's hands
        work(board, lambda taken: trial.run_trial(setup, board, taken, "full"))
    assert [row.state for row in board.rows()] == ["running"]  # to be taken up when the recipe is as it was


def test_a_database_that_belongs_to_another_folder_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/all.db"
    for _ in range(2):
        Board(a_search(), tmp_path / "one", name="two", storage=url).hold({})
    other = Board(a_search(), tmp_path / "other", name="two", storage=url)
    with pytest.raises(CompressError, match="started with another --out"):
        other.hold({})


# --- what is best


def test_front_and_hypervolume_agree_with_brute_force_and_with_optunas_own() -> None:
    rng = random.Random(0)
    for dimensions in (1, 2, 3):
        points = [tuple(float(rng.randrange(6)) for _ in range(dimensions)) for _ in range(30)]
        dominated = {a for a, b in itertools.permutations(points, 2) if a != b and all(y <= x for x, y in zip(a, b, strict=True))}  # fmt: skip
        assert {points[index] for index in front(points)} == set(points) - dominated
        assert len(front(points)) == len(set(points) - dominated)
        import numpy as np

        volume = compute_hypervolume(np.array(points, float), np.full(dimensions, 6.5))
        assert hypervolume(points, (6.5,) * dimensions) == pytest.approx(volume)


def test_a_limit_is_met_on_its_own_side_and_its_excess_says_by_how_much() -> None:
    below, above = limits("latency < 5, score >= 0.9")
    assert [below.is_met(value) for value in (4.9, 5.0)] == [True, False]
    assert [above.is_met(value) for value in (0.9, 0.89)] == [True, False]
    assert below.excess(7.0) == pytest.approx(2)
    assert above.excess(0.8) == pytest.approx(0.1)
    assert below.excess(5.0) > 0 > below.excess(4.0)


def test_a_constraint_keeps_a_trial_off_the_front_and_pick_names_the_best_within_limits(tmp_path: Path) -> None:
    search = a_search(space={**SEARCH["space"], "prune.keep_macs": [0.2, 0.4, 0.6, 0.8]}, sampler="grid", constraints=["macs < 70"])  # fmt: skip
    board = a_board(tmp_path, search)
    work(board, measured)
    setup = Setup(tmp_path / "s.yaml", search, tmp_path, None, None, False)
    assert [row.point["prune.keep_macs"] for row in best(board.rows(), search)] == ["0.6", "0.4", "0.2"]
    assert {row.point["prune.criterion"] for row in best(board.rows(), search)} == {"l2"}
    assert pick(setup, [board], "macs < 50").point == {"prune.keep_macs": "0.4", "prune.criterion": "l2"}
    with pytest.raises(CompressError, match=r"none of 6 trials has macs < 5; the closest has 20\.0"):
        pick(setup, [board], "macs < 5")


# --- who runs what


def test_a_grid_tries_every_combination_once_and_a_second_command_none(tmp_path: Path) -> None:
    search = a_search(space={"prune.keep_macs": {"low": 0.1, "high": 0.9, "step": 0.4}, "prune.criterion": ["l1", "l2"]}, sampler="grid")  # fmt: skip
    work(a_board(tmp_path, search), measured)
    points = [row.point for row in a_board(tmp_path, search).rows()]
    assert sorted(map(str, points)) == sorted(map(str, grid(search)))
    assert len(points) == 6
    work(a_board(tmp_path, search), lambda _: pytest.fail("everything is done"))


@pytest.mark.parametrize(("sampler", "database"), [("tpe", False), ("nsga2", False), ("tpe", True)])
def test_a_sampler_draws_until_the_budget_is_spent_and_goes_on_where_it_is_raised(
    tmp_path: Path, sampler: str, database: bool
) -> None:
    storage = f"sqlite:///{tmp_path}/all.db" if database else None
    search = a_search(sampler=sampler, constraints=["macs < 80"])
    work(a_board(tmp_path, search, storage), measured)
    more = a_board(tmp_path, a_search(sampler=sampler, constraints=["macs < 80"], budget={"trials": 9}), storage)
    work(more, measured)
    drawn = [float(row.point["prune.keep_macs"]) for row in more.rows()]
    assert (len(drawn), len(set(drawn))) == (9, 9)
    assert all(0.1 <= value <= 0.9 for value in drawn)
    assert [row.is_allowed for row in more.rows()] == [value < 0.8 for value in drawn]


def test_the_page_says_which_axis_matters_once_more_than_one_trial_tells(tmp_path: Path) -> None:
    search = a_search(budget={"trials": 20})
    work(few := a_board(tmp_path / "few", a_search(budget={"trials": 1})), measured)
    assert few.importance() == {}
    work(board := a_board(tmp_path, search), measured)
    assert {name: max(shares, key=shares.__getitem__) for name, shares in board.importance().items()} == {
        "score": "prune.keep_macs",
        "macs": "prune.keep_macs",
    }


def test_patience_ends_a_search_that_gains_nothing(tmp_path: Path) -> None:
    search = a_search(budget={"patience": 3})
    work(board := a_board(tmp_path, search), lambda _: {"score": [0.5], "macs": [1.0]})
    assert len(board.rows()) == 4
    assert progress(board.rows(), search)[0] > 0

    with pytest.raises(CompressError, match="none of 3 trials"):
        work(a_board(tmp_path / "refused", search), lambda _: GivenUp("refused", "no"))


def test_a_refused_trial_counts_and_a_crashed_one_is_made_up_for(tmp_path: Path) -> None:
    def run(taken: Taken) -> Measured | GivenUp:
        lost = {1: GivenUp("refused", "the cut takes everything"), 2: GivenUp("crashed", "killed")}
        return lost.get(taken.trial.number) or measured(taken)

    work(board := a_board(tmp_path, a_search()), run)
    assert [row.state for row in board.rows()] == ["done", "refused", "crashed", *4 * ["done"]]
    assert board.rows()[1].error == "the cut takes everything"


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (GivenUp("crashed", "out of memory"), "3 trials in a row crashed; the last: out of memory"),
        (GivenUp("refused", "no"), "none of 6 trials"),
    ],
)
def test_a_search_in_which_nothing_works_ends_with_a_sentence(tmp_path: Path, lost: GivenUp, words: str) -> None:
    with pytest.raises(CompressError, match=words):
        work(a_board(tmp_path, a_search()), lambda _: lost)


Start = Callable[[Path, str | None], multiprocessing.process.BaseProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["compress.commands.search.run", "optuna", "optuna.storages._rdb.storage"])
    started = []

    def one(folder: Path, storage: str | None) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=worker, args=(folder, storage))
        process.start()
        started.append(process)
        return process

    yield one
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(params=["journal", pytest.param("postgresql", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "journal":
        yield None
        return
    if not is_there("postgresql"):
        pytest.skip("run `make elsewhere`")
    use_driver()
    with server() as url:
        yield url


def test_workers_that_are_killed_leave_every_trial_done_once_and_no_stage_made_twice(
    tmp_path: Path, storage: str | None, start: Start
) -> None:
    def made() -> list[Path]:
        return list((tmp_path / "stages").glob("[!.]*"))

    rng = random.Random(0)
    workers = [start(tmp_path, storage) for _ in range(3)]
    for stages in range(3, 33, 3):  # kill one of them each time that three more stages are made
        while len(made()) < stages and any(worker.is_alive() for worker in workers):
            time.sleep(0.005)
        index = rng.randrange(3)
        workers[index].kill()
        workers[index].join()
        workers[index] = start(tmp_path, storage)
    for process in workers:
        process.join(300)
        assert process.exitcode == 0, "a worker that finds a stage made by another meanwhile ends with an error"
    rows = a_board(tmp_path, many(), storage).rows()
    assert [row.state for row in rows] == 24 * ["done"]
    assert len({json.dumps(row.point, sort_keys=True) for row in rows}) == 24
    assert len(made()) == 1 + 12 + 24


def test_a_run_that_outlives_its_killed_worker_is_left_to_end_first(tmp_path: Path) -> None:
    board = a_board(tmp_path, a_search())
    taken = board.take(may_start=True)
    assert taken is not None
    run = subprocess.Popen(["sleep", "60"], pass_fds=[taken.lock.fileno()])
    taken.lock.close()  # as the kernel does with a killed worker's
    try:
        assert board.take(may_start=False) is None
        assert not board.is_over()
    finally:
        run.kill()
        run.wait()
    again = board.take(may_start=False)
    assert again is not None
    again.lock.close()
    assert (again.trial.number, again.point) == (taken.trial.number, taken.point)


def test_the_first_seed_draws_the_split_and_trains_the_teacher_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def run(_: Setup, __: Board, recipe: Recipe, ___: Taken) -> Any:
        seen.append(recipe)
        stages = [
            {"stage": "source", "directory": "../../stages/00-source-1", "metrics": {"score": 0.9}, "seconds": 1.0}
        ]
        stages.append(
            {
                "stage": "prune",
                "directory": "",
                "metrics": {"score": 0.7 + len(seen) / 100, "macs_m": 2.0},
                "seconds": 3.0,
            }
        )
        rest: dict[str, Any] = {"deployed": [], "recommendation": None, "environment": {"target": "cpu_avx2"}}
        return {"stages": stages, "recipe": recipe.model_dump(), **rest}

    monkeypatch.setattr(trial, "_run", run)
    path = written(
        tmp_path, space={"prune.criterion": ["l1", "l2"]}, sampler="grid", seeds=[5, 6], budget={"trials": 1}
    )
    setup = open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=False)
    (board,) = open_boards(setup, storage=None)
    taken = board.take(may_start=True)
    assert taken is not None
    with taken.lock:
        board.finish(taken, trial.run_trial(setup, board, taken, "full"))
    assert [(recipe.seed, recipe.data.split_seed, recipe.data.judge_by) for recipe in seen] == [
        (5, 5, "tuning"),
        (6, 5, "tuning"),
    ]
    assert [recipe.model and recipe.model.weights for recipe in seen] == [
        None,
        str(tmp_path / "two/stages/00-source-1/weights.safetensors"),
    ]
    (row,) = board.rows()
    assert row.measured["score"] == pytest.approx([0.71, 0.72])
    assert row.shown(["score", "macs", "latency"]) == [
        "71.50\xa0% (71.00\xa0% to 72.00\xa0%)",
        "2.00\xa0M (2.00\xa0M to 2.00\xa0M)",
        "–",
    ]


def test_a_refused_run_and_a_crashed_one_leave_their_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, set=["data.dataset=imagefolder", f"data.path={tmp_path}/gone"])
    setup = open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=False)
    (board,) = open_boards(setup, storage=None)
    taken = board.take(may_start=True)
    assert taken is not None
    with taken.lock:
        refused = trial.run_trial(setup, board, taken, "full")
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        crashed = trial.run_trial(setup, board, taken, "full")
    assert isinstance(refused, GivenUp)
    assert isinstance(crashed, GivenUp)
    assert (refused.why, crashed.why) == ("refused", "crashed")
    assert "gone: " in refused.error
    assert re.search(r"two-000 ended with exit code 1: it printed nothing; .*two-000\.log", crashed.error)


def test_a_student_is_hopeless_in_the_lowest_quarter_of_those_that_cost_no_more() -> None:
    finished = [Course("a", 6, macs, macs, [0.1, 0.2, score]) for macs, score in ((1, 0.5), (1, 0.6), (2, 0.7), (2, 0.8), (3, 0.9))]  # fmt: skip
    lowest_quarter_of_four = 0.575  # a quarter of the way from the first to the last: 0.5 + 0.75 * 0.1
    low, high = ([0.1, 0.2, lowest_quarter_of_four + more] for more in (-0.001, 0.001))
    assert is_hopeless(Course("a", 6, 2, 2, low), finished)
    assert not is_hopeless(Course("a", 6, 2, 2, high), finished)
    assert is_hopeless(Course("a", 6, 3, 3, high), finished)  # 0.6 is the quarter of all five
    assert not is_hopeless(Course("a", 6, 2, 1, low), finished)  # only two have no more parameters
    assert not is_hopeless(Course("a", 6, 2, 2, low[:2]), finished)  # a third of the epochs is let alone
    assert not is_hopeless(Course("b", 6, 2, 2, low), finished)
    assert not is_hopeless(Course("a", 7, 2, 2, low), finished)


def test_a_trial_without_hope_is_ended_and_its_way_is_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    setup = open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=False)
    (board,) = open_boards(setup, storage=None)

    def run(taken: Taken) -> Measured | GivenUp:
        if taken.trial.number == 4:
            monkeypatch.setattr(trial, "course_of", lambda *_: Course("a", 3, 9.0, 9.0, [0.2, 0.3]))
            return trial.run_trial(setup, board, taken, "full")
        taken.trial.set_user_attr("course", Course("a", 3, 1.0, 1.0, [0.5, 0.6, 0.7])._asdict())
        return measured(taken)

    work(board, run)
    rows = board.rows()
    assert [row.state for row in rows] == [*4 * ["done"], "ended", "done"]
    assert rows[4].error == "ended after epoch 2 of 3 with a score of 30.00%"
    page = write_page(setup, [board]).read_text()
    assert page.count('<circle class="ended"') == page.count('<polyline class="way ended"') == 1
    assert page.count("is in the lowest quarter of") == 1
    assert not list(tmp_path.glob("two/trials/*/report.json"))


def test_without_training_first_only_the_fronts_trials_are_then_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def run(_: Setup, __: Board, taken: Taken, mode: str) -> dict[str, list[float]]:
        seen.append(mode)
        return measured(taken)

    monkeypatch.setattr(search_run, "run_trial", run)
    space = {"prune.keep_macs": [0.2, 0.4, 0.6], "prune.criterion": ["l1", "l2"]}
    path = written(tmp_path, space=space, sampler="grid", mode="no_training")
    setup = open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=False)
    page = search_run.run_search(setup, storage=None).read_text()
    assert seen == [*6 * ["no_training"], *3 * ["full"]]
    assert "two-trained: 3 on the front of 3 trials" in capsys.readouterr().out
    first, second = (page.index(f"<h2>{name}</h2>") for name in ("two-trained", "two"))
    assert first < second
    assert page.count('<circle class="front"') == 2 * (3 + 3)
    assert "prune.criterion l1" in page


def test_a_place_to_publish_to_without_a_pick_is_refused_before_a_trial_runs(tmp_path: Path) -> None:
    setup = open_setup(written(tmp_path), data=None, weights=None, out=str(tmp_path), trust_code=False)
    with pytest.raises(CompressError, match=r"--to .*: say which trial with --pick LIMITS"):
        search_run.search(setup, storage=None, picked=None, to=tmp_path / "published", verbose=False)


def test_a_pick_is_judged_by_images_that_no_trial_saw(tmp_path: Path) -> None:
    path = written(tmp_path, set=["data.limit_per_class=null"])
    setup = open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=True)
    point = {axis.name: axis.values()[0] for axis in axes(setup.search)}
    choosing, judging = (
        open_run(setup.recipe(point, mode="full", further=further), trust_code=True, verbose=False).dataset
        for further in ([], ["data.judge_by=validation"])
    )
    assert set(choosing.validation_digests()).isdisjoint(judging.validation_digests())
    assert len(choosing.train) + len(choosing.val) == len(judging.train)
    assert setup.recipe(point, mode="full").data.judge_by == "tuning"


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def start(visible: str = "4,6") -> AbstractContextManager[None]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return own_gpu()

    with start():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
        with start():
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
            with pytest.raises(CompressError, match="all 2 GPUs are in use"), start():
                pass
            with start("4"):
                pass
    with start():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"


# --- all of it


@pytest.mark.slow
def test_a_search_shares_stages_chooses_on_its_own_images_and_publishes_what_validation_judged(tmp_path: Path) -> None:
    def command(*more: str) -> str:
        done = CliRunner().invoke(app, ["search", str(path), "--out", str(tmp_path), "--trust-code", *more])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    path = written(tmp_path, space={"prune.criterion": ["l1", "l2"]}, sampler="grid")
    text = command()
    root = tmp_path / "two"
    assert "2 trials" in text
    reports = {file.parent.name: json.loads(file.read_text()) for file in root.glob("trials/*/report.json")}
    assert set(reports) == {"two-000", "two-001"}
    assert len(list(root.glob("stages/00-source-*"))) == 1
    assert {one["recipe"]["data"]["judge_by"] for one in reports.values()} == {"tuning"}
    page = (root / "index.html").read_text()
    # From the front, the gain, the end of distillation (one epoch is no curve), the parallel coordinates, the table:
    assert [page.count(f'<a href="trials/{name}/report/index.html">') for name in sorted(reports)] == [5, 5]
    assert "Recommended: the best score" in page
    assert "| source (PyTorch) |" in (root / "two.md").read_text()
    assert page.count("Scores while distilling") == 1
    command("--pick", "score > 0")
    picked = json.loads(next(root.glob("two-pick-*/report.json")).read_text())
    assert picked["recipe"]["data"]["judge_by"] == "validation"
    assert picked["data_digest"] not in {one["data_digest"] for one in reports.values()}
    assert "trained anew on all training images" in (root / "index.html").read_text()


@pytest.mark.acceptance
def test_commands_that_are_killed_with_their_runs_or_without_leave_every_trial_done_once(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = written(
        tmp_path, space={"prune.keep_macs": [0.3, 0.5, 0.7], "prune.criterion": ["l1", "l2"]}, sampler="grid"
    )
    command = [sys.executable, "-m", "compress.cli", "search", str(path), "--out", str(tmp_path), "--trust-code"]
    made: dict[str, set[int]] = {}  # each stage, and when its artifact was finished
    begun: set[str] = set()  # the stages that some run has begun

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)

    def look() -> bool:
        """Note the finished stages, and tell whether another one was begun."""
        for meta in tmp_path.glob("two/stages/[0-9]*/meta.json"):
            made.setdefault(meta.parent.name, set()).add(meta.stat().st_mtime_ns)
        before = len(begun)
        begun.update(partial.name for partial in tmp_path.glob("two/stages/.*.partial"))
        return len(begun) > before

    workers, left = [start() for _ in range(3)], 10
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.02)
            if look() and left:
                left -= 1
                index = rng.randrange(3)
                (os.killpg if left % 2 else os.kill)(workers[index].pid, signal.SIGKILL)
                workers[index].wait()
                workers[index] = start()
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    look()
    assert left == 0
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    setup = open_setup(path, data=None, weights=None, out=str(tmp_path), trust_code=True)
    (board,) = open_boards(setup, storage=None)
    rows = board.rows()
    assert [row.state for row in rows] == 6 * ["done"]
    assert len({json.dumps(row.point) for row in rows}) == 6
    assert {stage: len(times) for stage, times in made.items() if len(times) > 1} == {}
    assert len(made) == 1 + 6 + 6
