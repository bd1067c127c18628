"""Which network a training gives: the last epoch's that none before is clearly better than, if it is clearly better than the start."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.training.checkpoint import Progress, State
from compress.training.held import Held, Losses

IMAGES = 100
NOISE = torch.randn(3, IMAGES, generator=torch.Generator().manual_seed(0)) * 0.5


def epoch(mean: float, noise: int = 0) -> Losses:
    """Losses of a mean, with a network's own luck on each image."""
    own = NOISE[noise] - NOISE[noise].mean()
    return Losses(tuple((1 + mean + own).tolist()))


def trained(*epochs: Losses) -> tuple[float, int]:
    """Judge networks of one weight, the epoch's number; return the chosen one's, and the kept epoch."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 0.0)
    first = nn.Linear(1, 1)
    nn.init.constant_(first.weight, 0.0)
    held = Held(first, (), lambda network: epoch(0))
    state = State(model, torch.optim.SGD(model.parameters(), lr=1.0), None, Progress())
    held.begin_(state)
    for number, losses in enumerate(epochs, start=1):
        nn.init.constant_(model.weight, float(number))
        held.judge_(state, losses)
    chosen, _ = held.chosen_(state)
    return float(chosen.get_parameter("weight").detach()), state.progress.kept_epoch


@pytest.mark.parametrize(
    ("epochs", "chosen"),
    [
        ([epoch(-0.30, 1), epoch(-0.24, 2)], 2),  # a difference of 0.06 with a standard error of 0.07: luck
        ([epoch(-0.70, 1), epoch(-0.24, 2)], 1),  # of 0.46: none
        ([epoch(-0.70, 1), epoch(-0.24, 2), epoch(-0.65, 0)], 3),
        ([epoch(-0.30, 1), epoch(-0.10, 2)], 1),  # 0.10 below the start is luck, too
        ([epoch(-0.10, 1), epoch(-0.10, 2)], 0),
        ([epoch(0.10, 1), epoch(0.30, 2)], 0),
        ([epoch(-0.3, 1), Losses((math.inf,) * IMAGES)], 1),
    ],
)
def test_an_earlier_epoch_is_given_only_where_it_is_clearly_better(epochs: list[Losses], chosen: int) -> None:
    assert trained(*epochs)[0] == chosen


def test_a_difference_on_every_image_is_clear_however_small() -> None:
    best = Losses(tuple((1 + NOISE[0]).tolist()))
    assert Losses(tuple((1.001 + NOISE[0]).tolist())).clearly_above(best)
    assert not best.clearly_above(best)


def test_a_few_unbounded_losses_decide_nothing() -> None:
    base = (1 + NOISE[0]).tolist()
    wild = [1e6, math.inf, *base[2:]]
    assert Losses(tuple(base), unbounded=True).value == pytest.approx(
        Losses(tuple(wild), unbounded=True).value, abs=0.1
    )
    assert not Losses(tuple(wild), unbounded=True).clearly_above(Losses(tuple(base), unbounded=True))
    assert Losses(tuple(x + 0.1 for x in wild), unbounded=True).clearly_above(Losses(tuple(base), unbounded=True))


def test_what_was_kept_survives_a_checkpoint(tmp_path: Path) -> None:
    def state() -> State:
        model = nn.Linear(1, 1)
        return State(model, torch.optim.SGD(model.parameters(), lr=1.0), None, Progress())

    before, after = state(), state()
    held = Held(nn.Linear(1, 1), (), lambda network: epoch(0))
    held.begin_(before)
    held.judge_(before, epoch(-0.7, 1))
    before.save(tmp_path / "checkpoint.pt")
    after.resume_(tmp_path / "checkpoint.pt")
    for one in (before, after):
        held.judge_(one, epoch(-0.24, 2))
    assert (after.first, after.least) == (before.first, before.least)
    assert after.progress == before.progress
    assert after.progress.kept_epoch == 1
