"""Pruning against independent computations: masks, Torch-Pruning's own scores, brute force."""

import copy
import itertools
import json

import pytest
import torch
import torch_pruning as tp
from networks import Mobile, Residual, lively
from torch import nn

from compress.errors import CompressError
from compress.models.architectures import build
from compress.pruning.criteria import CRITERIA, score
from compress.pruning.layers import CostModel, measure_layers
from compress.pruning.plan import Cut, Goal, Scope, choose, cut_, find_groups, smallest_widths, widths

IMAGE = torch.zeros(1, 3, 16, 16)
SCOPES = ("global", "local", "isomorphic")


def planned(
    model: nn.Module, *, keep: float, goal: Goal = "macs", scope: Scope = "global", round_to: int = 8
) -> list[Cut]:
    layers = measure_layers(model, IMAGE)
    groups = find_groups(model, IMAGE, "l2", exclude=["head"])
    full = sum(layer.macs if goal == "macs" else layer.weights + layer.vectors for layer in layers)
    return choose(
        groups,
        layers,
        goal=goal,
        budget=keep * full,
        scope=scope,
        round_to=round_to,
        min_channels=smallest_widths(groups, 0.1),
    )


def macs(model: nn.Module) -> int:
    return sum(layer.macs for layer in measure_layers(model, IMAGE))


def test_pruned_model_equals_masked_model() -> None:
    model = lively(Residual(5))
    cuts = planned(model, keep=0.5)
    masked, pruned = copy.deepcopy(model), copy.deepcopy(model)
    norm_of = {"stem.0": ["stem.1", "block1.bn2"], "block1.conv1": ["block1.bn1"], "block2.conv1": ["block2.bn1"],
               "block2.conv2": ["block2.bn2", "block2.down.1"], "block2.down.0": ["block2.bn2", "block2.down.1"],
               "block1.conv2": ["stem.1", "block1.bn2"]}  # fmt: skip
    for cut in cuts:
        for name in norm_of[cut.root]:  # a channel whose batch-norm gives 0 says nothing to the layers behind
            norm = masked.get_submodule(name)
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.data[list(cut.remove)] = norm.bias.data[list(cut.remove)] = 0.0
    cut_(pruned, IMAGE, cuts)
    images = torch.randn(4, 3, 16, 16)
    assert macs(pruned) < macs(model)
    assert torch.allclose(pruned(images), masked(images), atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("goal", ["macs", "params"])
@pytest.mark.parametrize("factory", [Residual, Mobile])
def test_a_cut_network_costs_at_most_its_budget_and_no_more_than_one_block_less(
    factory: type[nn.Module], goal: Goal, scope: Scope
) -> None:
    model = lively(factory(5))
    before = macs(model) if goal == "macs" else sum(p.numel() for p in model.parameters())
    cut_(model, IMAGE, planned(model, keep=0.6, goal=goal, scope=scope))
    after = macs(model) if goal == "macs" else sum(p.numel() for p in model.parameters())
    assert 0.3 * before < after <= 0.6 * before
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_widths_stay_multiples_of_eight_and_the_classifier_keeps_its_outputs() -> None:
    model = lively(Mobile(5))
    layers = measure_layers(model, IMAGE)
    cut_(model, IMAGE, planned(model, keep=0.6))
    table = {width.name: width for width in widths(layers, model)}
    assert table["head"].out_after == 5
    assert any(width.out_after < width.out_before for width in table.values())
    assert all(width.out_after % 8 == 0 for name, width in table.items() if name != "head")


def by_blocks(model: nn.Module) -> list[tuple[str, list[int]]]:
    """All removable blocks of eight in the order of their mean score: the ranking by brute force."""
    blocks = []
    for group in find_groups(model, IMAGE, "l2", exclude=["head"]):
        order = torch.argsort(group.scores, stable=True).tolist()
        for start in range(0, group.channels - 8, 8):
            members = order[start : start + 8]
            blocks.append((float(group.scores[members].mean()), group.root, members))
    return [(root, members) for _, root, members in sorted(blocks, key=lambda block: block[0])]


def cost_without(model: nn.Module, blocks: list[tuple[str, list[int]]]) -> int:
    removed: dict[str, list[int]] = {}
    for root, members in blocks:
        removed.setdefault(root, []).extend(members)
    candidate = copy.deepcopy(model)
    cut_(candidate, IMAGE, [Cut(root, tuple(members)) for root, members in removed.items()])
    return macs(candidate)


@pytest.mark.parametrize("keep", [0.4, 0.55, 0.7])
def test_the_cut_is_the_shortest_prefix_of_the_ranking_less_what_the_budget_spares(keep: float) -> None:
    """Brute force over all prefixes, on networks that are really cut."""
    model = lively(Residual(5))
    budget = keep * macs(model)
    blocks = by_blocks(model)
    prefix = next(blocks[:n] for n in range(len(blocks) + 1) if cost_without(model, blocks[:n]) <= budget)
    cuts = {cut.root: set(cut.remove) for cut in planned(model, keep=keep)}
    chosen = [(root, members) for root, members in prefix if set(members) <= cuts.get(root, set())]
    assert sum(len(members) for _, members in chosen) == sum(
        map(len, cuts.values())
    )  # nothing beyond the prefix is cut
    assert cost_without(model, chosen) <= budget
    last = {root: (root, members) for root, members in chosen}  # of each group, the most important block that is cut
    assert all(cost_without(model, [block for block in chosen if block != one]) > budget for one in last.values())


def test_a_plan_replays_from_json_to_identical_weights() -> None:
    model = lively(Mobile(5))
    cuts = planned(model, keep=0.6)
    replayed = [
        Cut(entry["root"], tuple(entry["remove"])) for entry in json.loads(json.dumps([cut.to_json() for cut in cuts]))
    ]
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    cut_(first, IMAGE, cuts)
    cut_(second, IMAGE, replayed)
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unreachable_budget_names_the_narrowest_plan() -> None:
    with pytest.raises(CompressError, match=r"the narrowest plan keeps 0\.\d+: raise keep_macs"):
        planned(lively(Residual(5)), keep=0.01)


def test_excluded_layers_keep_their_width() -> None:
    model = lively(Residual(5))
    groups = find_groups(model, IMAGE, "l2", exclude=["head", "block2.*"])
    assert {group.root for group in groups} == {"stem.0", "block1.conv1"}


ORACLES = {
    "l1": tp.importance.GroupMagnitudeImportance(p=1),
    "l2": tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": tp.importance.BNScaleImportance(),
}


@pytest.mark.parametrize("criterion", sorted(ORACLES))
def test_scores_equal_torch_prunings(criterion: str) -> None:
    model = lively(Residual(5))
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGE)
    compared = 0
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        ours, theirs = score(group, criterion), ORACLES[criterion](group)
        assert ours is not None
        assert torch.allclose(ours, theirs / theirs.mean(), rtol=1e-4)
        compared += 1
    assert compared == 4


def test_taylor_adds_weight_times_gradient_over_the_coupled_layers() -> None:
    """By hand: Torch-Pruning 1.6 leaves batch-norms out of its Taylor score."""
    model = lively(Residual(5))
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    block = model.get_submodule("block1")
    products = {name: (p * p.grad).detach().abs() for name, p in block.named_parameters() if p.grad is not None}
    expected = (
        products["conv1.weight"].sum((1, 2, 3)) + products["bn1.weight"] + products["conv2.weight"].sum((0, 2, 3))
    )
    groups = {group.root: group for group in find_groups(model, IMAGE, "taylor", exclude=["head"])}
    assert torch.allclose(groups["block1.conv1"].scores, expected / expected.mean(), rtol=1e-4)


def test_fpgm_scores_the_most_replaceable_filter_lowest() -> None:
    model = Residual(5)
    with torch.no_grad():
        model.block1.conv1.weight[3] = model.block1.conv1.weight.mean(0)  # the centre of all filters
    groups = {group.root: group for group in find_groups(model, IMAGE, "fpgm", exclude=["head"])}
    assert int(groups["block1.conv1"].scores.argmin()) == 3


def test_every_criterion_scores_every_channel_with_mean_one() -> None:
    model = lively(Mobile(5))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    for criterion in CRITERIA:
        for group in find_groups(model, IMAGE, criterion, exclude=["head"]):
            assert group.scores.shape == (group.channels,)
            assert float(group.scores.mean()) == pytest.approx(1.0, rel=1e-4)


def test_the_cost_model_equals_the_measured_network() -> None:
    model = lively(Mobile(5))
    layers = measure_layers(model, IMAGE)
    cost = CostModel(layers, "params")
    assert cost.cost(cost.outputs, cost.inputs) == sum(p.numel() for p in model.parameters())
    half = nn.Conv2d(8, 24, 3, padding=1)
    full = measure_layers(nn.Sequential(nn.Conv2d(16, 48, 3, padding=1)), torch.zeros(1, 16, 8, 8))
    assert CostModel(full, "params").cost(*(torch.tensor([n]).numpy() for n in (24, 8))) == sum(
        p.numel() for p in half.parameters()
    )


def test_local_scope_keeps_the_same_part_everywhere() -> None:
    model = lively(Residual(5, width=64))
    cuts = planned(model, keep=0.45, scope="local")
    groups = {group.root: group.channels for group in find_groups(model, IMAGE, "l2", exclude=["head"])}
    parts = [len(cut.remove) / groups[cut.root] for cut in cuts]
    assert len(parts) == len(groups)
    assert all(abs(a - b) <= 8 / 64 + 1e-9 for a, b in itertools.pairwise(parts))


def test_a_network_whose_channels_cannot_be_followed_is_refused_in_a_sentence() -> None:
    with pytest.raises(CompressError, match="ShuffleNetV2: Torch-Pruning cannot follow its channels"):
        find_groups(build("torchvision:shufflenet_v2_x0_5", num_classes=5), torch.zeros(1, 3, 32, 32), "l2", exclude=[])


def test_attention_keeps_its_width_and_the_mlp_is_cut() -> None:
    model = build("timm:test_vit", num_classes=5)
    size = 160
    groups = find_groups(model, torch.zeros(1, 3, size, size), "l2", exclude=["head"])
    assert groups
    assert all(group.root.endswith("mlp.fc1") for group in groups)
