"""What a training does when a number is not finite, when memory runs out, and when it has gone on for long enough."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from test_train import LABELS, STEP, batches, loop, network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compress.data.batches import Batch
from compress.errors import CompressError
from compress.recipe.arguments import qat_fit
from compress.recipe.schema import Recipe
from compress.recipe.stages import Fit, QatStage, Stop
from compress.training import compilation
from compress.training import loop as train
from compress.training.checkpoint import Progress, State
from compress.training.guards import is_out_of_memory, stop_reason
from compress.training.loop import Loop, Step, fit

QUIET = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.1}


def plain_network() -> nn.Module:
    """A network without batch-norm or dropout, whose gradient is the sum over its images."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def summary(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "training.json").read_text())
    return found


def planted(step: Step, *, at: int, poison: float = math.nan) -> Step:
    """Return the step with one loss that is not finite: that of call number `at`."""
    calls = 0

    def changed(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        measured = step(model, batch, done)
        return {**measured, "loss": measured["loss"] * poison} if calls == at else measured

    return changed


def limited(step: Step, images: int, sizes: list[int] | None = None) -> Step:
    """Return the step on a device whose memory holds so many images."""

    def changed(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if sizes is not None:
            sizes.append(len(batch.images))
        measured = step(model, batch, done)
        if len(batch.images) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measured

    return changed


def scored(out: Path, scores: list[float]) -> Loop:
    """Return a loop whose evaluations give these scores."""
    left = iter(scores)
    return replace(loop(out), evaluate=lambda _: {"score": next(left), "val_loss": 1.0})


# --- a number that is not finite ---


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_after_a_loss_that_is_not_finite_the_epoch_is_trained_again_at_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, poison: float
) -> None:
    settings = Fit.model_validate({"epochs": 4, "batch_size": 16, "lr": 0.01, "ema_decay": 0.5, "optimizer": optimizer})
    guarded = fit(
        network(), planted(STEP, at=6, poison=poison), settings, loop(tmp_path / "guarded")
    )  # in the second epoch
    whole = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *given: whole(*given) * (0.5 if given[1] >= 4 else 1.0))
    assert equal(guarded, fit(network(), STEP, settings, loop(tmp_path / "expected")))
    log = (tmp_path / "guarded" / "log.jsonl").read_text()
    assert " in epoch 2: rolled back to its start, at half the rate (1 of 3)" in log
    assert log.count('"epoch": 2') == 1
    assert summary(tmp_path / "guarded")["rollbacks"] == 1


def test_weights_broken_by_the_last_step_are_seen_before_they_are_kept(tmp_path: Path) -> None:
    calls = 0

    def explode(model: nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the epoch's last, whose loss is finite
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(math.inf)

    result = fit(network(), STEP, Fit(epochs=1, batch_size=16), replace(loop(tmp_path), after_backward=explode))
    assert all(bool(parameter.isfinite().all()) for parameter in result.parameters())
    assert summary(tmp_path)["rollbacks"] == 1


def test_a_long_epoch_ends_soon_after_its_loss_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECK_EVERY_STEPS", 2)
    seen: list[int] = []

    def counted(epoch: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(epoch)):
            seen.append(number)
            yield batch

    fit(network(), planted(STEP, at=1), Fit(epochs=1, batch_size=16), replace(loop(tmp_path), batches=counted))
    assert seen == [0, 1, 0, 1, 2, 3]


def test_a_killed_run_remembers_its_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Fit(epochs=4, batch_size=16, lr=0.01)
    whole = fit(network(), planted(STEP, at=6), settings, loop(tmp_path / "whole"))
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)

    def killed(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if done >= 0.75:
            raise KeyboardInterrupt
        return poisoned(model, batch, done)

    poisoned = planted(STEP, at=6)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), killed, settings, loop(tmp_path / "killed"))
    assert equal(whole, fit(network(), STEP, settings, loop(tmp_path / "killed")))
    assert summary(tmp_path / "killed")["rollbacks"] == 1


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([1.0, 9.0, 8.0, 7.0, 6.0], False),  # still worse than the start, but falling
        ([1.0, 5.0, 8.0, 7.0, 6.0], True),
        ([1.0, 5.0, 8.0, 7.0], False),
        ([1.0, 5.0, 8.0, 7.0, 4.0], False),
        ([], False),
    ],
)
def test_a_judged_training_ends_after_half_of_its_epochs_without_a_gain(losses: list[float], stops: bool) -> None:
    progress = Progress(epoch=max(len(losses) - 1, 0), held_out=losses)
    assert bool(stop_reason(None, progress, 0.5, metric="top-1", epochs=6)) == stops


# --- memory ---


@pytest.mark.parametrize("images", [8, 3])
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path, images: int) -> None:
    settings = Fit(epochs=1, batch_size=16, **QUIET)
    sizes: list[int] = []
    whole = fit(plain_network(), STEP, settings, loop(tmp_path / "whole"))
    halved = fit(plain_network(), limited(STEP, images, sizes), settings, loop(tmp_path / "halved"))
    for a, b in zip(whole.parameters(), halved.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    parts = 2 ** math.ceil(math.log2(16 / images))
    assert summary(tmp_path / "halved")["micro_batches"] == parts
    assert sizes[-4 * parts :] == [16 // parts] * 4 * parts


def test_running_out_of_memory_changes_nothing_but_the_size_of_the_parts(tmp_path: Path) -> None:
    settings = Fit(epochs=2, batch_size=16, lr=0.05)
    ran_out = fit(network(), limited(STEP, 4), settings, loop(tmp_path / "ran-out"))
    split = settings.model_copy(update={"micro_batches": 4})
    assert equal(ran_out, fit(network(), STEP, split, loop(tmp_path / "split")))
    events = summary(tmp_path / "ran-out")["events"]
    assert events == [
        "out of memory in epoch 1 with 16 images at a time: restarted, from now on with 2 micro-batches for each batch",
        "out of memory in epoch 1 with 8 images at a time: restarted, from now on with 4 micro-batches for each batch",
    ]


def test_measurements_of_micro_batches_are_means_over_the_images(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        measured = STEP(model, batch, done)
        assert batch.share is not None
        share = batch.share(lambda part: torch.tensor([len(part.targets)]))[0]
        return {**measured, "ones": batch.targets.float().mean() * share}

    fit(plain_network(), step, Fit(epochs=1, batch_size=16, micro_batches=3, **QUIET), loop(tmp_path))
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["ones"] == pytest.approx(float(LABELS.float().mean()), abs=1e-6)


def test_one_image_that_does_not_fit_is_an_error_with_a_repair(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"with 1 image at a time; take smaller images \(data\.image_size\)"):
        fit(plain_network(), limited(STEP, 0), Fit(epochs=1, batch_size=2), loop(tmp_path))


def test_an_evaluation_that_does_not_fit_is_an_error_with_a_repair(tmp_path: Path) -> None:
    def evaluate(_: nn.Module) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CompressError, match=r"in the evaluation; lower data\.eval_batch_size"):
        fit(plain_network(), STEP, Fit(epochs=1, batch_size=16), replace(loop(tmp_path), evaluate=evaluate))


def test_several_ranks_are_told_to_split_their_batches(tmp_path: Path) -> None:
    ranks = replace(loop(tmp_path), ranks=2)
    with pytest.raises(CompressError, match=r"with 8 images at a time; set fit\.micro_batches: 2"):
        train._Training(STEP, Fit(epochs=1, batch_size=16), ranks, _state()).within_memory(_out_of_memory, {})


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError


def _state() -> State:
    model = plain_network()
    return State(model, train.make_optimizer(model, Fit(epochs=1)), None, Progress(precision="fp32"))


def test_a_cpu_without_memory_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(plain_network(), broken, Fit(epochs=1, batch_size=16), loop(tmp_path))


def test_ranks_share_gradients_once_for_all_micro_batches(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        state = _state()
        wrapped = DistributedDataParallel(state.model)
        state.progress.micro_batches = 4
        shared: list[Tensor] = []

        def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            shared.append(bucket.buffer().clone())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, hook)
        batch = next(batches(0))
        expected = torch.autograd.grad(STEP(state.model, batch, 0.0)["loss"], list(state.model.parameters()))
        train._Training(STEP, Fit(epochs=1, batch_size=16), loop(tmp_path), state).train_step(wrapped, batch, 0)
    finally:
        dist.destroy_process_group()
    assert len(shared) == 1
    assert float(shared[0].norm()) == pytest.approx(float(torch.cat([part.flatten() for part in expected]).norm()))


def test_a_batch_norm_with_one_value_per_channel_is_a_sentence(tmp_path: Path) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(
        CompressError, match=r"^test: a batch-norm cannot train on 1 image of 16 x 16, .* fit\.batch_size"
    ):
        fit(model, STEP, Fit(epochs=1, batch_size=16, micro_batches=16), loop(tmp_path))
    fit(model, STEP, Fit(epochs=1, batch_size=16, micro_batches=8), loop(tmp_path))


# --- the end ---


@pytest.mark.parametrize(
    ("stop", "epochs", "reason"),
    [
        (None, 8, None),
        (Stop(patience=2), 6, "score has not risen by more than 0 over epoch 4's 0.7000 for 2 epochs"),
        (
            Stop(patience=2, min_delta=0.15),
            4,
            "score has not risen by more than 0.15 over epoch 2's 0.6000 for 2 epochs",
        ),
        (Stop(patience=3), 7, "score has not risen by more than 0 over epoch 4's 0.7000 for 3 epochs"),
        (Stop(patience=4), 8, "score has not risen by more than 0 over epoch 4's 0.7000 for 4 epochs"),
        (Stop(score=0.6), 2, "score 0.6000 has reached 0.6"),
        (Stop(score=0.9, patience=2), 6, "score has not risen by more than 0 over epoch 4's 0.7000 for 2 epochs"),
    ],
)
def test_a_training_ends_when_its_score_says_so(
    tmp_path: Path, stop: Stop | None, epochs: int, reason: str | None
) -> None:
    scores = [0.4, 0.6, 0.5, 0.7, 0.65, 0.7, 0.6, 0.7]
    fit(network(), STEP, Fit(epochs=8, batch_size=16, stop=stop), scored(tmp_path, scores))
    found = summary(tmp_path)
    assert (found["epoch"], found["stopped"]) == (epochs, reason)
    assert (reason is None) == ("stopped after" not in (tmp_path / "log.jsonl").read_text())


def test_no_epoch_is_begun_that_would_end_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("compress.training.loop.time.monotonic", lambda: 0.0)
    settings = Fit(epochs=8, batch_size=16, stop=Stop(max_minutes=3.5))

    def evaluate(_: nn.Module) -> dict[str, float]:
        minute = 60.0 * (next(clock) + 1)  # an epoch takes a minute
        monkeypatch.setattr("compress.training.loop.time.monotonic", lambda: minute)
        return {"score": 0.5, "val_loss": 1.0}

    fit(network(), STEP, settings, replace(loop(tmp_path), evaluate=evaluate))
    assert summary(tmp_path)["epoch"] == 3
    assert "it took 3.0 minutes, 1.0 an epoch" in str(summary(tmp_path)["stopped"])


def test_the_last_epochs_network_is_kept(tmp_path: Path) -> None:
    settings = Fit(epochs=8, batch_size=16, stop=Stop(patience=2))
    weights: list[Tensor] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        weights.append(model.get_parameter("0.head.weight").detach().clone())
        return {"score": 0.5, "val_loss": 1.0}

    result = fit(network(), STEP, settings, replace(loop(tmp_path), evaluate=evaluate))
    assert len(weights) == 3
    assert torch.equal(result.get_parameter("0.head.weight"), weights[-1])


def test_a_killed_run_waits_no_longer_for_a_rise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Fit(epochs=9, batch_size=16, lr=0.01, stop=Stop(patience=4))
    whole = fit(network(), STEP, settings, scored(tmp_path / "whole", [0.5] * 9))
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)

    def killed(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if done >= 3 / 9:
            raise KeyboardInterrupt
        return STEP(model, batch, done)

    with pytest.raises(KeyboardInterrupt):
        fit(network(), killed, settings, scored(tmp_path / "killed", [0.5] * 9))
    resumed = fit(network(), STEP, settings, scored(tmp_path / "killed", [0.5] * 9))
    assert summary(tmp_path / "killed")["epoch"] == summary(tmp_path / "whole")["epoch"] == 5
    assert equal(whole, resumed)


@pytest.mark.parametrize(
    ("fields", "said"), [({}, "give at least one of"), ({"min_delta": 0.1, "score": 0.9}, "set patience, too")]
)
def test_a_stop_without_a_condition_is_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Stop.model_validate(fields)


def test_qat_does_not_inherit_when_the_float_training_stops() -> None:
    stages = [
        {"stage": "source", "fit": {"epochs": 20, "stop": {"score": 0.9}}},
        {"stage": "ptq"},
        {"stage": "qat"},
    ]
    recipe = Recipe.model_validate({"name": "a", "model": {"arch": "torchvision:resnet18"}, "stages": stages})
    (qat,) = (section for section in recipe.stages if isinstance(section, QatStage))
    assert (qat_fit(qat, recipe).epochs, qat_fit(qat, recipe).stop) == (2, None)


# --- compiling ---


@pytest.mark.parametrize(
    ("compiled_s", "expected"),
    [
        (
            0.031,
            "compiled in 85 s; a step takes 31 ms instead of 45: pays after 6,072 steps, and this training has 10,000 left",
        ),
        (
            0.040,
            "compiled in 85 s; a step takes 40 ms instead of 45: pays after 17,001 steps, but this training has 10,000 left",
        ),
        (0.045, "compiled in 85 s; a step takes 45 ms instead of 45: never pays here, fit.compile: false is faster"),
    ],
)
def test_compiling_says_when_it_pays(compiled_s: float, expected: str) -> None:
    assert compilation.describe(0.045, compiled_s, 85.0, 10_000) == expected


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    from torch._inductor import config

    with config.patch("cpp.cxx", (None, "no-such-compiler")), pytest.raises(CompressError) as caught:
        fit(plain_network(), STEP, Fit(epochs=1, batch_size=16, compile=True), loop(tmp_path))
    assert "fit.compile: torch cannot compile this network here" in str(caught.value)
    assert "install" in str(caught.value)


@pytest.mark.acceptance
def test_a_compiled_training_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Fit(epochs=3, batch_size=16, lr=0.01)
    eager = fit(plain_network(), STEP, settings, loop(tmp_path / "eager"))
    compiled = settings.model_copy(update={"compile": True})
    whole = fit(plain_network(), STEP, compiled, loop(tmp_path / "whole"))
    for a, b in zip(eager.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)
    assert "compiled in" in (tmp_path / "whole" / "log.jsonl").read_text()
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)

    def killed(model: nn.Module, batch: Batch, done: float) -> dict[str, Tensor]:
        if done >= 2 / 3:
            raise KeyboardInterrupt
        return STEP(model, batch, done)

    with pytest.raises(KeyboardInterrupt):
        fit(plain_network(), killed, compiled, loop(tmp_path / "killed"))
    assert equal(whole, fit(plain_network(), STEP, compiled, loop(tmp_path / "killed")))
