"""The error that is left without a channel, against least squares solved anew for every choice."""

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.pruning.plan import find_groups
from compress.pruning.surgeon import RIDGE, second_moments


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)
    )
    return layers.eval()


def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def residual(rows: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Return the squared error of the best weights for the kept inputs, with the ridge, over the energy of the outputs."""
    square = torch.cov(rows.T, correction=0)
    damped = square + RIDGE * square.diagonal().mean() * torch.eye(len(square))
    wanted = weight @ damped  # (outputs, d)
    solved = torch.linalg.solve(damped[kept][:, kept], wanted[:, kept].T).T
    difference = weight.clone()
    difference[:, kept] -= solved
    return float((difference @ damped * difference).sum() / (weight @ square * weight).sum())


def test_the_first_channel_to_go_leaves_the_least_error_by_least_squares() -> None:
    model = network()
    patches = nn.functional.unfold(model[:2](images()), 3).transpose(1, 2).flatten(0, 1).detach()
    weight = model.get_parameter("2.weight").detach().flatten(1)
    by_hand = []
    for channel in range(6):
        kept = torch.ones(54, dtype=torch.bool)
        kept[9 * channel : 9 * channel + 9] = False
        by_hand.append(residual(patches.double(), weight.double(), kept))
    groups = find_groups(model, images()[:1], "obs", exclude=("5",), moments=second_moments(model, images()))
    scores = next(group.scores for group in groups if group.root == "0")
    least = int(scores.argmin())
    assert least == min(range(6), key=by_hand.__getitem__)
    assert abs(float(scores.min()) - min(by_hand)) < 1e-3 * min(by_hand)


def test_one_of_two_equal_channels_is_worth_nothing_and_the_other_what_both_give() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight")[4] = model.get_parameter("0.weight")[1]
        model.get_parameter("0.bias")[4] = model.get_parameter("0.bias")[1]
    groups = find_groups(model, images()[:1], "obs", exclude=("5",), moments=second_moments(model, images()))
    scores = next(group.scores for group in groups if group.root == "0")
    twins = scores[[1, 4]].sort().values
    assert float(twins[0]) == float(scores.min())
    assert float(twins[0]) < 0.2 * float(twins[1])


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.bias")[0] = float("nan")
    with pytest.raises(CompressError, match=r"^2: its inputs are not finite"):
        second_moments(model, images())
