"""The training loop: schedules against formulas, a killed run against one that was not."""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import Residual
from pydantic import ValidationError
from several import ended, start
from torch import nn

from compress.data.batches import Batch
from compress.distillation.step import supervised_step
from compress.errors import CompressError
from compress.logs.stage_log import StageLog
from compress.recipe.stages import Fit
from compress.tasks import TASKS, evaluate
from compress.training import loop as train
from compress.training.held import Held, Losses
from compress.training.loop import Loop, fit, learning_rate, make_optimizer

CPU = torch.device("cpu")
STEP = supervised_step(TASKS["classification"], label_smoothing=0.0)
DATA = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = (DATA.mean((1, 2, 3)) > 0).long()


def batches(epoch: int) -> Iterator[Batch]:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
    for part in order.split(16):
        yield Batch(DATA[part], LABELS[part])


def loop(out: Path, *, seed: int = 0) -> Loop:
    out.mkdir(exist_ok=True)
    task = TASKS["classification"]
    return Loop(
        batches=batches,
        steps_per_epoch=4,
        evaluate=lambda model: evaluate(model, [Batch(DATA, LABELS)], task),
        metric="score",
        log=StageLog(out, stage="test"),
        checkpoint=out / "checkpoint.pt",
        summary=out / "training.json",
        device=CPU,
        ranks=1,
        seed=seed,
        phase="test",
    )


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Residual(2), nn.Dropout(0.3))


def test_the_rate_warms_up_linearly_and_falls_to_zero_by_a_cosine() -> None:
    settings = Fit(epochs=10, lr=0.4, warmup_epochs=2)
    rates = [learning_rate(settings, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[30] == pytest.approx(0.2)  # half of the cosine
    assert rates[49] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("warmup_epochs", [0.01, 0.06, 0.5, 1.3])
def test_a_warm_up_of_part_of_a_step_ends_at_the_peak(warmup_epochs: float) -> None:
    settings = Fit(epochs=3, lr=0.4, warmup_epochs=warmup_epochs)
    rates = [learning_rate(settings, step, 22) for step in range(66)]
    warm_up = warmup_epochs * 22
    rising = [0.4 * min(1.0, (step + 1) / warm_up) for step in range(math.ceil(warm_up))]
    assert rates[: len(rising)] == pytest.approx(rising)
    assert max(rates) <= 0.4


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_rate_falls_by_steps_as_torchs_own_schedule(warmup: int) -> None:
    settings = Fit(epochs=12, lr=0.4, warmup_epochs=warmup, schedule="step", milestones=(4, 7, 10), gamma=0.2)
    oracle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(oracle, [4, 7, 10], gamma=0.2)
    for epoch in range(12):
        found = [learning_rate(settings, 5 * epoch + step, 5) for step in range(5)]
        rising = [0.4 * (5 * epoch + step + 1) / 10 for step in range(5)]
        assert found == pytest.approx(rising if epoch < warmup else [schedule.get_last_lr()[0]] * 5)
        oracle.step()
        schedule.step()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "step"}, r"milestones: schedule step needs some and cosine takes none, got \[\]"),
        ({"milestones": [3]}, r"milestones: schedule step needs some and cosine takes none, got \[3\]"),
        ({"schedule": "step", "milestones": [3, 9]}, r"milestones: must rise and be < epochs \(9\), got \[3, 9\]"),
        ({"schedule": "step", "milestones": [5, 3]}, r"must rise and be < epochs \(9\), got \[5, 3\]"),
    ],
)
def test_steps_that_never_come_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Fit.model_validate({"epochs": 9, **settings})


def test_the_papers_optimizer_is_plain_sgd_on_all_parameters(tmp_path: Path) -> None:
    """Four steps of the loop against torch's SGD by hand."""
    model = Residual(2)
    twin = copy.deepcopy(model).train()
    settings = Fit(epochs=1, batch_size=16, lr=0.1, weight_decay=0.01, nesterov=False, decay_vectors=True, schedule="cosine")  # fmt: skip
    trained = fit(model, STEP, settings, loop(tmp_path))
    oracle = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for index, batch in enumerate(batches(0)):
        oracle.param_groups[0]["lr"] = learning_rate(settings, index, 4)
        oracle.zero_grad()
        nn.functional.cross_entropy(twin(batch.images), batch.targets).backward()
        oracle.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained.parameters(), twin.parameters(), strict=True))


def test_vectors_have_no_weight_decay() -> None:
    groups = make_optimizer(network(), Fit(epochs=1, weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], {p.dim() > 1 for p in group["params"]}) for group in groups] == [
        (0.1, {True}),
        (0.0, {False}),
    ]


NARROW = """
import torch
from torch import nn
from compress.training.device import place_
network = place_(nn.Conv2d(8, 24, 1, 2), torch.device("cpu")).train(TRAINING)
for _ in range(3):
    network(torch.randn(9, 8, 96, 96).to(memory_format=torch.channels_last)).square().mean().backward()
"""


@pytest.mark.parametrize("training", [True, False])  # `taylor` wants gradients of a network in eval mode
def test_a_convolution_that_onednn_cannot_train_in_channels_last_is_trained(training: bool) -> None:
    """In a process of its own, as it was a segmentation fault on a CPU with AVX-512."""
    assert ended(start(NARROW.replace("TRAINING", str(training)), ranks=1)) == [(0, "")]


def test_training_learns(tmp_path: Path) -> None:
    model = fit(network(), STEP, Fit(epochs=8, batch_size=16, lr=0.05), loop(tmp_path))
    assert evaluate(model, [Batch(DATA, LABELS)], TASKS["classification"])["score"] > 0.9
    assert not model.training


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, ema: float
) -> None:
    settings = Fit.model_validate({"epochs": 4, "batch_size": 16, "lr": 0.01, "optimizer": optimizer, "ema_decay": ema})
    whole = fit(network(), STEP, settings, loop(tmp_path / "whole"))
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)
    calls = 0

    def killed(model: nn.Module, batch: Batch, done: float) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 11:  # in the middle of the third epoch
            raise KeyboardInterrupt
        return STEP(model, batch, done)

    with pytest.raises(KeyboardInterrupt):
        fit(network(), killed, settings, loop(tmp_path / "killed"))
    torch.manual_seed(99)  # a new process has another random state
    resumed = fit(network(), STEP, settings, loop(tmp_path / "killed"))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("best", [0, 1, 3])
def test_the_network_of_the_least_held_out_loss_is_the_result_also_of_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    def held(kill_at: int = 9) -> tuple[Held, list[dict[str, torch.Tensor]]]:
        seen: list[dict[str, torch.Tensor]] = []

        def losses(model: nn.Module) -> Losses:
            seen.append(copy.deepcopy(model.state_dict()))
            if len(seen) == kill_at:
                raise KeyboardInterrupt
            return Losses((abs(best - len(before) - len(seen) + 1) + 1.0,))

        return Held(network().eval(), (), losses), seen

    settings, before = Fit(epochs=3, batch_size=16, lr=0.05, ema_decay=0.5), list[dict[str, torch.Tensor]]()
    judged, seen = held()
    whole = fit(network(), STEP, settings, replace(loop(tmp_path / "whole"), held=judged))
    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", -1.0)
    killed, lost = held(kill_at=4)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), STEP, settings, replace(loop(tmp_path / "killed"), held=killed))
    before = lost[:-1]
    resumed = fit(network(), STEP, settings, replace(loop(tmp_path / "killed"), held=held()[0]))
    for result in (whole, resumed):
        assert not result.training
        assert all(torch.equal(value, result.state_dict()[name]) for name, value in seen[best].items())


def test_the_moving_average_is_the_result(tmp_path: Path) -> None:
    settings = Fit(epochs=1, batch_size=16, lr=0.1, ema_decay=0.5)
    seen: list[torch.Tensor] = []

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, torch.Tensor]:
        seen.append(model.get_parameter("0.head.weight").detach().clone())
        return STEP(model, batch, done)

    model = network()
    result = fit(model, step, settings, loop(tmp_path))
    weights = [*seen[1:], model.get_parameter("0.head.weight").detach()]  # after each step
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.5 * expected + 0.5 * weight
    assert torch.allclose(result.get_parameter("0.head.weight"), expected, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_with_a_repair(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Batch, done: float) -> dict[str, torch.Tensor]:
        return {"loss": STEP(model, batch, done)["loss"] * math.nan}

    with pytest.raises(CompressError, match=r"the loss is nan in epoch 1, also at 1/8 of the rate; lower fit\.lr"):
        fit(network(), broken, Fit(epochs=2, batch_size=16), loop(tmp_path))


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    settings = Fit(epochs=1, batch_size=16, lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-3)
    after = fit(model, STEP, settings, loop(tmp_path))
    moved = math.sqrt(
        sum(float((a.detach() - b).square().sum()) for a, b in zip(after.parameters(), before, strict=True))
    )
    assert 0 < moved <= 4 * 1e-3 * 1.01  # four steps


def test_every_measurement_of_the_step_is_logged_as_its_mean(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, torch.Tensor]:
        return {**STEP(model, batch, done), "extra": torch.tensor(2.5)}

    fit(network(), step, Fit(epochs=1, batch_size=16), loop(tmp_path))
    assert '"extra": 2.5' in (tmp_path / "log.jsonl").read_text()


def test_the_step_is_told_how_much_of_the_training_is_done(tmp_path: Path) -> None:
    seen: list[float] = []

    def step(model: nn.Module, batch: Batch, done: float) -> dict[str, torch.Tensor]:
        seen.append(done)
        return STEP(model, batch, done)

    fit(network(), step, Fit(epochs=2, batch_size=16), loop(tmp_path))
    assert seen == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
