"""The error that is left without a channel, against least squares solved anew for every choice."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.architectures import build
from compress.pruning.plan import find_groups
from compress.pruning.surgeon import RIDGE, input_covariances


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)
    )
    return layers.eval()


def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def scores_of(model: nn.Module) -> Tensor:
    covariances = input_covariances(model, images().split(32))
    groups = find_groups(model, images()[:1], "obs", exclude=("5",), covariances=covariances)
    return next(group.scores for group in groups if group.root == "0")


def left_without(gone: Iterable[int], square: Tensor, weight: Tensor) -> float:
    """Return the squared error of the best weights for all other inputs, with the ridge, over the energy of the outputs."""
    kept = torch.ones(len(square), dtype=torch.bool)
    kept[list(gone)] = False
    damped = square + RIDGE * square.diagonal().mean() * torch.eye(len(square))
    wanted = weight @ damped  # (outputs, d)
    solved = torch.linalg.solve(damped[kept][:, kept], wanted[:, kept].T).T
    difference = weight.clone()
    difference[:, kept] -= solved
    return float((difference @ damped * difference).sum() / (weight @ square * weight).sum())


def in_order(error: Callable[[list[int]], float], channels: int) -> list[float]:
    """Return each channel's score by brute force: the error of least squares without it and all that went before, the least first."""
    gone, scores = list[int](), [0.0] * channels
    while len(gone) < channels:
        after = {channel: error([*gone, channel]) for channel in range(channels) if channel not in gone}
        best = min(after, key=after.__getitem__)
        gone.append(best)
        scores[best] = after[best]
    return scores


def test_the_first_channel_to_go_leaves_the_least_error_by_least_squares() -> None:
    model = network()
    square = input_covariances(model, images().split(32))[model[2]].double()
    weight = model.get_parameter("2.weight").detach().permute(0, 2, 3, 1).flatten(0, 2).double()
    by_hand = [left_without([channel], square, weight) for channel in range(6)]
    scores = scores_of(model)
    assert int(scores.argmin()) == min(range(6), key=by_hand.__getitem__)
    assert float(scores.min()) == pytest.approx(min(by_hand), rel=1e-4)


def test_a_few_images_of_huge_inputs_do_not_decide_the_scores() -> None:
    model, usual = network(), images()
    few = usual.clone()
    few[7::16] *= 100.0
    by_usual, by_few = (input_covariances(model, shown.split(32))[model[2]] for shown in (usual, few))
    assert float((by_few - by_usual).norm()) < 0.2 * float(by_usual.norm())


class Joined(nn.Module):
    """Two maps of other sizes, flattened and joined before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3), nn.Linear(4 * 9 + 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 5)."""
        wide = self.wide(x).relu()
        out: Tensor = self.head(torch.cat([wide.flatten(1), self.narrow(wide).relu().flatten(1)], 1))
        return out


def test_channels_of_flattened_branches_leave_the_error_of_least_squares_in_all_that_reads_them() -> None:
    torch.manual_seed(0)
    model = Joined().eval()
    covariances = input_covariances(model, [images()])
    found = find_groups(model, images()[:1], "obs", exclude=("head",), covariances=covariances)
    scores = {group.root: group.scores.tolist() for group in found}
    head, narrow = (model.get_parameter(f"{name}.weight").detach().double() for name in ("head", "narrow"))
    squares = covariances[model.head].double(), covariances[model.narrow].double()

    def without_narrow(gone: Sequence[int]) -> float:
        return left_without([36 + channel for channel in gone], squares[0], head)

    def without_wide(gone: Sequence[int]) -> float:
        flat = left_without([9 * channel + pixel for channel in gone for pixel in range(9)], squares[0], head)
        return flat + left_without(gone, squares[1], narrow.permute(0, 2, 3, 1).flatten(0, 2))

    assert scores["narrow"] == pytest.approx(in_order(without_narrow, 6), rel=1e-3)
    assert scores["wide"] == pytest.approx(in_order(without_wide, 4), rel=1e-3)


def test_covariances_are_those_of_the_inputs() -> None:
    model = network()
    pixels = model[:2](images()).permute(0, 2, 3, 1).flatten(0, 2).detach()
    found = input_covariances(model, [images()])[model[2]]
    assert torch.dist(found, torch.cov(pixels.T)) < 0.1 * torch.linalg.norm(found)


def test_one_of_two_equal_channels_is_worth_nothing_and_the_other_what_both_give() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight")[4] = model.get_parameter("0.weight")[1]
        model.get_parameter("0.bias")[4] = model.get_parameter("0.bias")[1]
    scores = scores_of(model)
    twins = scores[[1, 4]].sort().values
    assert float(twins[0]) == float(scores.min())
    assert float(twins[0]) < 0.2 * float(twins[1])


def test_covariances_of_inputs_far_from_zero_are_those_of_the_centred_ones() -> None:
    model = network()
    wanted = input_covariances(model, [images()])[model[2]]
    with torch.no_grad():
        model[2].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1e4,))  # float32 has steps of 0.001 there
    found = input_covariances(model, [images()])[model[2]]
    assert torch.dist(found, wanted) < 0.02 * torch.linalg.norm(wanted)


def test_heads_are_scored_by_the_error_that_their_output_projection_keeps() -> None:
    model, batches = build("timm:test_vit", num_classes=5).eval(), torch.randn(2, 4, 3, 160, 160)
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.proj.weight")[:, 32:] = 0  # the second of two heads
    groups = find_groups(model, batches[0, :1], "obs", exclude=["head"], covariances=input_covariances(model, batches))
    heads = next(group.scores for group in groups if group.root == "blocks.0.attn")
    assert int(heads.argmin()) == 1
    assert float(heads.min()) == pytest.approx(0.0, abs=1e-9)
    assert 1.0 <= float(heads.max()) < 1.05  # all of the energy, and the ridge's part


def grouped() -> nn.Sequential:
    torch.manual_seed(0)
    first, reader = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
    return nn.Sequential(first, nn.ReLU(), reader, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def test_channels_of_a_grouped_layer_leave_the_error_of_least_squares_in_each_group() -> None:
    model = grouped()
    covariances = input_covariances(model, [images()])
    found = find_groups(model, images()[:1], "obs", exclude=("4",), covariances=covariances)
    scores = {group.root: group.scores.tolist() for group in found}
    reader, behind = (model.get_parameter(f"{name}.weight").detach().double() for name in (2, 4))
    square = covariances[model[2]].double()
    apart = square * torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))  # a group's outputs read its inputs alone
    whole = torch.zeros(8, 8, 3, 3).double()  # the same layer without groups
    whole[:4, :4], whole[4:, 4:] = reader[:4], reader[4:]

    def without_read(gone: Sequence[int]) -> float:
        """Lose the same place of both groups, as pruning does."""
        return left_without(
            [place + half for place in gone for half in (0, 4)], apart, whole.movedim(1, -1).flatten(0, 2)
        )

    def without_made(gone: Sequence[int]) -> float:
        every = [place + half for place in gone for half in (0, 4)]
        return left_without(every, covariances[model[4]].double(), behind[:, :, 0, 0])

    assert scores["0"] == pytest.approx(in_order(without_read, 4) * 2, rel=1e-3)
    assert scores["2"] == pytest.approx(in_order(without_made, 4) * 2, rel=1e-3)


def test_the_error_of_a_grouped_layer_is_what_each_groups_least_squares_leaves_on_the_images() -> None:
    model = grouped()
    covariances = input_covariances(model, [images()])
    found = find_groups(model, images()[:1], "obs", exclude=("4",), covariances=covariances)
    first = next(group for group in found if group.root == "0").scores[:4].argmin()
    pixels = model[:2](images()).movedim(1, -1).flatten(0, 2).detach().double()
    weight = model.get_parameter("2.weight").detach().double().movedim(1, -1)  # (8, 3, 3, 4)
    left = []
    for place in range(4):
        error = energy = 0.0
        for half in range(2):
            inputs, taps = pixels[:, 4 * half : 4 * half + 4], weight[4 * half : 4 * half + 4].flatten(0, 2)
            wanted = inputs @ taps.T
            wanted = wanted - wanted.mean(0)
            kept = inputs[:, [other for other in range(4) if other != place]]
            kept = kept - kept.mean(0)
            error += float((wanted - kept @ torch.linalg.lstsq(kept, wanted).solution).square().sum())
            energy += float(wanted.square().sum())
        left.append(error / energy)
    assert int(first) == min(range(4), key=left.__getitem__)


def test_channels_that_only_layers_too_wide_for_a_covariance_read_compete_on_the_same_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    monkeypatch.setattr("compress.pruning.surgeon.MAX_CHANNELS", 6)
    covariances = input_covariances(model.eval(), [images()])
    groups = {
        group.root: group.scores
        for group in find_groups(model, images()[:1], "obs", exclude=("4",), covariances=covariances)
    }
    assert model[2] not in covariances
    alone = {group.root: group.scores for group in find_groups(model, images()[:1], "l2", exclude=("4",))}["0"]
    shares = [float(alone[alone <= one].sum() / alone.sum()) for one in alone]
    assert groups["0"].tolist() == pytest.approx(shares, rel=1e-5)
    assert 1.0 <= float(groups["2"].max()) < 1.05


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.bias")[0] = float("nan")
    with pytest.raises(CompressError, match=r"^2: its inputs are not finite"):
        input_covariances(model, images().split(32))


def test_heads_leave_the_error_of_least_squares_in_their_output_projection() -> None:
    model, batches = build("timm:test_vit", num_classes=5).eval(), torch.randn(2, 4, 3, 160, 160)
    covariances = input_covariances(model, batches)
    groups = find_groups(model, batches[0, :1], "obs", exclude=["head"], covariances=covariances)
    heads = next(group.scores for group in groups if group.root == "blocks.0.attn")
    projection = model.get_submodule("blocks.0.attn.proj")
    square, weight = (
        covariances[projection].double(),
        model.get_parameter("blocks.0.attn.proj.weight").detach().double(),
    )

    def without(gone: Sequence[int]) -> float:
        return left_without([32 * head + place for head in gone for place in range(32)], square, weight)

    assert heads.tolist() == pytest.approx(in_order(without, 2), rel=1e-3)
