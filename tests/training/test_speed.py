"""What a training on a CPU runs with: chosen by timing, kept by its checkpoint, and without a trace in the result."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from several import ended, start
from test_train import CPU, STEP, loop, network
from torch import Tensor, nn

from compress.data.batches import Batch
from compress.distillation.step import online_teacher
from compress.recipe.stages import Fit
from compress.training import loop as train
from compress.training import speed
from compress.training.checkpoint import Progress
from compress.training.loop import fit
from compress.training.speed import Pace, count_threads, fastest, precisions

SETTINGS = Fit(epochs=4, batch_size=16, lr=0.01)


class Clock:
    """A clock that only trials move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def trial(self, seconds: Callable[[Any], float]) -> Callable[[Any], None]:
        def run(choice: Any) -> None:
            self.now += seconds(choice)

        return run


@pytest.fixture
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with bfloat16, and trainings that are never too short for timing."""
    monkeypatch.setattr(speed, "host_instruction_sets", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(speed, "PAYS_STEPS", 0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def planted(monkeypatch: pytest.MonkeyPatch, wanted: set[object]) -> list[tuple[object, ...]]:
    """Let timing find what is wanted, each choice run once; return what was asked."""
    asked: list[tuple[object, ...]] = []

    def find(
        choices: Sequence[Any], trial: Callable[[Any], None], _clock: Callable[[], float]
    ) -> tuple[Any, dict[Any, float]]:
        asked.append(tuple(choices))
        for choice in choices:
            trial(choice)
        found = next((choice for choice in choices if choice in wanted), choices[0])
        return found, dict.fromkeys(choices, 0.1)

    monkeypatch.setattr(speed, "fastest", find)
    return asked


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "training.json").read_text())
    return found


def killed_at(done_at: float) -> Callable[[nn.Module, Batch, float], dict[str, Tensor]]:
    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if done >= done_at:
            raise KeyboardInterrupt
        return STEP(model, batch, done)

    return step


# --- timing ---


@pytest.mark.parametrize(("gain", "expected"), [(0.5, "b"), (0.85, "b"), (0.95, "a"), (1.5, "a")])
def test_another_choice_must_be_a_tenth_faster(gain: float, expected: str) -> None:
    clock = Clock()
    found, seconds = fastest(("a", "b"), clock.trial(lambda choice: {"a": 1.0, "b": gain}[choice]), clock)
    assert found == expected
    assert seconds == pytest.approx({"a": 1.0, "b": gain})


def test_the_first_turn_is_a_warm_up_and_one_slow_step_decides_nothing() -> None:
    clock = Clock()
    spans = {"a": iter([9.0, 1.0, 5.0, 1.0]), "b": iter([0.1, 2.0, 0.1, 2.0])}
    assert fastest(("a", "b"), clock.trial(lambda choice: next(spans[choice])), clock)[0] == "a"


@pytest.mark.parametrize(
    ("seconds", "usual", "expected"),
    [
        ({8: 1.0, 4: 2.0}, 8, 8),
        ({8: 4.0, 4: 2.0, 2: 1.0, 1: 2.0}, 8, 2),
        ({8: 4.0, 4: 2.0, 2: 1.0, 1: 0.5}, 8, 1),
        ({8: 1.0, 4: 0.98}, 8, 8),
        ({8: 0.98, 4: 1.0, 2: 2.0}, 4, 4),  # no reason to change
        ({8: 0.5, 4: 1.0}, 4, 8),
    ],
)
def test_threads_are_halved_as_long_as_that_gains(
    seconds: dict[int, float], usual: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, running = Clock(), 0

    def run_with(threads: int) -> None:
        nonlocal running
        running = threads

    def run_step() -> None:
        clock.now += seconds[running]

    monkeypatch.setattr("compress.training.speed.torch.set_num_threads", run_with)
    monkeypatch.setattr("compress.training.speed.time.perf_counter", clock)
    assert count_threads(8, usual, run_step) == expected


# --- precision ---


def test_only_auto_on_a_processor_with_bfloat16_is_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (("amx_bf16", ("fp32", "bf16")), ("avx512_bf16", ("fp32", "bf16")), ("avx2", ("fp32",))):
        monkeypatch.setattr(speed, "host_instruction_sets", lambda flags=flags: frozenset({flags}))
        assert precisions(Fit(epochs=1), CPU) == expected
        assert precisions(Fit(epochs=1, precision="fp32"), CPU) == ("fp32",)
        assert precisions(Fit(epochs=1, precision="bf16"), CPU) == ("bf16",)


@pytest.mark.parametrize("wanted", ["fp32", "bf16"])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_precision_found_by_timing_trains_as_one_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_bf16: None, wanted: str, ema: float
) -> None:
    asked = planted(monkeypatch, {wanted})
    settings = SETTINGS.model_copy(update={"ema_decay": ema})
    found = fit(network(), STEP, settings, loop(tmp_path / "found"))
    given = settings.model_copy(update={"precision": wanted})
    assert equal(found, fit(network(), STEP, given, loop(tmp_path / "given")))
    assert asked == [("fp32", "bf16")]
    assert summary(tmp_path / "found")["precision"] == wanted
    assert f"computes in {wanted}: a step takes 100 ms in fp32" in (tmp_path / "found" / "log.jsonl").read_text()
    assert summary(tmp_path / "found")["events"] == []


def test_bfloat16_is_not_float32(tmp_path: Path) -> None:
    """Else the tests here would say nothing."""
    one, other = (
        fit(network(), STEP, Fit(epochs=1, batch_size=16, precision=precision), loop(tmp_path / precision))
        for precision in ("fp32", "bf16")
    )
    assert not equal(one, other)


@pytest.mark.parametrize("every_s", [-1.0, 1000.0])
def test_a_killed_run_keeps_its_precision_whatever_is_faster_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_bf16: None, every_s: float
) -> None:
    """Also where it was killed before its first epoch's end."""
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", every_s)
    planted(monkeypatch, {"bf16"})
    whole = fit(network(), STEP, SETTINGS, loop(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        fit(network(), killed_at(0.6), SETTINGS, loop(tmp_path / "killed"))
    asked = planted(monkeypatch, {"fp32"})
    assert equal(whole, fit(network(), STEP, SETTINGS, loop(tmp_path / "killed")))
    assert asked == []
    assert summary(tmp_path / "killed")["precision"] == "bf16"


def test_a_training_too_short_for_timing_takes_the_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_bf16: None
) -> None:
    monkeypatch.setattr(speed, "PAYS_STEPS", 17)
    asked = planted(monkeypatch, {"bf16"})
    fit(network(), STEP, SETTINGS, loop(tmp_path))
    assert asked == []
    assert (summary(tmp_path)["precision"], summary(tmp_path)["threads"]) == ("fp32", torch.get_num_threads())


def test_a_teacher_that_is_asked_online_answers_in_float32_on_a_cpu() -> None:
    teacher = network().eval()
    batch = Batch(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))
    with torch.autocast("cpu", torch.bfloat16):
        logits = online_teacher(teacher, ())(batch).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, teacher(batch.images))


CODE = """
import itertools, types
from compress import cli
from compress.training import speed

class Clock:
    now, calls, spans = 0.0, 0, itertools.cycle([1.0, 0.5] if rank == 0 else [0.5, 1.0])

    def __call__(self):
        self.calls += 1
        self.now += 0 if self.calls % 2 else next(self.spans)
        return self.now

def begin(pace):
    timed = whole(pace)
    assert (timed, pace.progress.precision) == (True, "bf16"), pace.progress
    return timed

speed.PAYS_STEPS, whole, speed.Pace.begin_ = 0, speed.Pace.begin_, begin
speed.time = types.SimpleNamespace(process_time=Clock())
speed.host_instruction_sets = lambda: {"avx512_bf16"} if rank == 0 else set()
cli.main()
"""


@pytest.mark.acceptance
def test_all_ranks_compute_in_what_rank_0_finds_faster(tmp_path: Path) -> None:
    recipe = tmp_path / "ranks.yaml"
    recipe.write_text(
        "name: ranks\nmodel: {arch: 'cifar:resnet8x4'}\ndata: {limit_per_class: 4}\n"
        "stages: [{stage: source, fit: {epochs: 1, batch_size: 16}}]\n"
    )
    given = f"import sys\nsys.argv = ['compress', 'run', {str(recipe)!r}, '--out', {str(tmp_path)!r}]\n"
    said = ended(start(given + CODE), within_s=300)
    assert [code for code, _ in said] == [0, 0], said
    (found,) = tmp_path.glob("ranks/*/training-source.json")
    assert json.loads(found.read_text())["precision"] == "bf16"


# --- threads ---


def test_a_training_runs_with_the_threads_that_timing_finds_and_gives_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(speed, "PAYS_STEPS", 16)
    asked, seen = planted(monkeypatch, {1}), set[int]()

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if done:  # past the rehearsal
            seen.add(torch.get_num_threads())
        return STEP(model, batch, done)

    settings = SETTINGS.model_copy(update={"precision": "fp32"})
    one = fit(network(), step, settings, loop(tmp_path / "one"))
    assert (seen, torch.get_num_threads()) == ({1}, 2)
    assert (summary(tmp_path / "one")["threads"], summary(tmp_path / "one")["events"]) == (1, [])
    assert asked == [(2, 1)]
    monkeypatch.setattr(speed, "PAYS_STEPS", 1000)
    two = fit(network(), STEP, settings, loop(tmp_path / "two"))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    assert equal(one, fit(network(), STEP, settings, loop(tmp_path / "alone")))


def test_a_resumed_run_goes_on_with_its_threads_and_says_where_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)
    whole = fit(network(), STEP, SETTINGS, loop(tmp_path / "whole"))
    for name in ("same", "fewer"):
        with pytest.raises(KeyboardInterrupt):
            fit(network(), killed_at(0.6), SETTINGS, loop(tmp_path / name))
    assert equal(whole, fit(network(), STEP, SETTINGS, loop(tmp_path / "same")))
    assert summary(tmp_path / "same")["events"] == []
    torch.set_num_threads(1)
    fit(network(), STEP, SETTINGS, loop(tmp_path / "fewer"))
    assert summary(tmp_path / "fewer")["events"] == ["resumed with 1 of its 2 threads: the last digits will differ"]


def pace(progress: Progress, told: list[str], *, limit: int = 2, compile_: bool = False) -> Pace:
    class Rehearsal:
        def __enter__(self) -> Callable[[], None]:
            return lambda: None

        def __exit__(self, *_: object) -> None:
            pass

    settings = Fit(epochs=100, compile=compile_)
    return Pace(progress, settings, CPU, 100, limit, Rehearsal, told.append, told.append)


def after(epochs: Sequence[float], *, threads: int, compile_: bool = False) -> list[int]:
    """Return after which epochs of so many images a second the threads are timed anew."""
    progress, timed = Progress(threads=threads, precision="fp32"), []
    one = pace(progress, [], compile_=compile_)
    for number, images_per_s in enumerate(epochs, start=1):
        progress.epoch = number
        before = progress.timed_epoch
        one.after_epoch_(images_per_s)
        if progress.timed_epoch != before:
            timed.append(number)
    return timed


def test_threads_are_timed_anew_after_an_epoch_that_was_slower_than_it_had_been(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    planted(monkeypatch, {2})
    assert after([100, 101, 99, 90, 80], threads=2) == []
    assert after([100, 101, 70, 70, 70, 70, 50], threads=2) == [3, 7]  # what it found is the new measure
    assert after([100, 50, 50], threads=2) == [2]  # 200 steps after the first timing
    assert after([100, 101, 70], threads=2, compile_=True) == []


def test_idle_threads_are_tried_again_every_200_steps(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    planted(monkeypatch, {1})
    assert after([100] * 6, threads=1) == [2, 4, 6]


def test_a_change_of_threads_is_told(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    planted(monkeypatch, {1})
    told: list[str] = []
    progress = Progress(epoch=7, threads=2, precision="fp32", images_per_s=100)
    pace(progress, told).after_epoch_(60)
    assert (progress.threads, torch.get_num_threads()) == (1, 1)
    assert told == ["1 of 2 threads from epoch 8 on: faster at the moment"]


def test_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    asked = planted(monkeypatch, {1})
    progress = Progress(threads=0)
    one = replace(pace(progress, []), device=torch.device("cuda"), settings=Fit(epochs=100, precision="bf16"))
    one.begin_()
    progress.epoch = 5
    one.after_epoch_(1.0)
    assert (asked, progress.threads, progress.precision, torch.get_num_threads()) == ([], 0, "bf16", 2)
