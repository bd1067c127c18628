"""Whole residual blocks: which they are, what is left without them, and when they go."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Mobile, Residual, lively
from planning import options_of
from torch import Tensor, nn

import compress
from compress.models.architectures import build
from compress.models.saved import Architecture, load_float, read_architecture, save_network
from compress.pruning.branches import find_branches
from compress.pruning.latency.knapsack import most_value
from compress.pruning.latency.predict import ladders
from compress.pruning.plan import Branch, Cut, cut_, find_groups, widths
from compress.pruning.recovery.reconstruction import kept_outputs, number_outputs, reconstruct

SIZE = 32
IMAGE = torch.zeros(1, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("torchvision:resnet18", ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("torchvision:mobilenet_v2", [f"features.{n}" for n in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]),
    ],
)
def test_residual_blocks_are_found_innermost(arch: str, expected: list[str]) -> None:
    model = lively(build(arch, num_classes=5, trust_code=False))
    assert [
        branch.path for branch in find_branches(model, find_groups(model, IMAGE, "l2", exclude=()), (3, SIZE, SIZE))
    ] == expected


def test_a_layer_between_two_of_one_width_is_no_block() -> None:
    model = lively(Mobile(5))
    assert find_branches(model, find_groups(model, IMAGE, "l2", exclude=()), (3, SIZE, SIZE)) == ()


@torch.no_grad()
def test_without_a_block_the_shortcut_is_left() -> None:
    model, images = lively(Residual(5)), torch.rand(2, 3, SIZE, SIZE)
    silent = copy.deepcopy(model)
    for name in ("weight", "bias"):
        silent.state_dict()[f"block1.bn2.{name}"].zero_()
    layers = options_of(model, SIZE).layers
    cut_(model, IMAGE, [Cut("block1", ())])
    assert torch.equal(model(images), silent(images))
    gone = {width.name: (width.in_after, width.out_after) for width in widths(layers, model)}
    assert gone["block1.conv1"] == gone["block1.conv2"] == (0, 0)


def test_a_network_without_a_block_is_solved_saved_and_read_again(tmp_path: Path) -> None:
    whole, images = lively(Residual(5)), torch.randn(60, 3, SIZE, SIZE)
    student, numbered = copy.deepcopy(whole), number_outputs(whole)
    cuts = (Cut("stem.0", (0, 1, 2, 3)), Cut("block1", ()))
    for network in (student, numbered):
        cut_(network, IMAGE, cuts)
    solved, method = reconstruct(student, whole, kept_outputs(numbered), images, "least_squares", views=images)
    assert method == "least_squares"
    arch = f"{Path(__file__).parents[1] / 'networks.py'}:small"
    save_network(solved, Architecture(arch, 5, (3, SIZE, SIZE)).pruned(cuts), tmp_path)
    assert asdict(read_architecture(tmp_path))["cuts"] == ((asdict(cuts[0]), asdict(cuts[1])),)
    with torch.no_grad():
        assert torch.equal(load_float(tmp_path, trust_code=True)(images), solved(images))


def test_the_last_step_of_a_group_inside_is_none_at_all_and_loses_the_rest_of_its_importance() -> None:
    model = lively(Residual(5))
    options = options_of(model, SIZE)
    branches = find_branches(model, options.groups, (3, SIZE, SIZE))
    options = replace(options, branches=branches)
    ((inside,),) = (branch.groups for branch in branches)
    for index, (ladder, group) in enumerate(zip(ladders(options), options.groups, strict=True)):
        assert (ladder.removed[-1] == group.channels) == (index == inside)
    ladder, group = ladders(options)[inside], options.groups[inside]
    kept = [channel for channel in range(group.channels) if all(channel not in b.channels for b in ladder.blocks[-2])]
    rest = float(group.scores[kept].sum() / group.scores.sum())
    assert ladder.lost[-1] - ladder.lost[-2] == pytest.approx(rest)
    assert options.removed_by([Cut("block1", ())]).tolist() == [
        group.channels if index == inside else 0 for index, group in enumerate(options.groups)
    ]
    assert Cut("block1", ()) in options.narrowest


@pytest.mark.parametrize("seed", range(6))
def test_groups_of_one_block_go_together_or_not_at_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, costs = [-np.sort(rng.random(3)) for _ in range(3)], [np.sort(rng.random(3))[::-1] for _ in range(3)]

    def total(tables: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
        return sum(float(table[index]) for table, index in zip(tables, chosen, strict=True))

    legal = [chosen for chosen in itertools.product(range(3), repeat=3) if (chosen[0] == 2) == (chosen[2] == 2)]
    budget = float(np.median([total(costs, chosen) for chosen in legal]))
    best = max(total(values, chosen) for chosen in legal if total(costs, chosen) <= budget)
    found = most_value(values, costs, {}, budget, together=[Branch("a", (0, 2)).groups])
    assert found is not None
    assert tuple(found) in legal
    assert total(values, found) == pytest.approx(best, rel=2e-3)


class Detached(nn.Module):
    """Two convolutions, between which gradients may be held up."""

    def __init__(self, *, detach: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 5)
        self.detach = detach

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images).relu()
        return self.head(self.second(maps.detach() if self.detach else maps).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_channels_are_followed_through_detach() -> None:
    widths = []
    for detach in (False, True):
        torch.manual_seed(0)
        images = torch.randn(8, 3, 12, 12)
        cut = compress.prune(Detached(detach=detach).eval(), images, keep_macs=0.3)
        assert cut(images).shape == (8, 5)
        widths.append({name: tuple(weight.shape) for name, weight in cut.state_dict().items()})
    assert widths[0] == widths[1]
    assert widths[0]["first.weight"][0] < 16
