"""Pruning against independent computations: masks, Torch-Pruning's own scores, brute force."""

import copy
import itertools
import json
import re
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
import torch_pruning as tp
from chain import measure_batchnorm_
from networks import Decoder, Mobile, Residual, lively
from planning import cuts_to, options_of
from torch import nn
from torch.nn import functional as F
from torch_pruning.dependency import index_mapping
from torchvision.models.convnext import LayerNorm2d

from compress.errors import CompressError, ModelError
from compress.models.architectures import build
from compress.models.structure import classifier, count, width_cost
from compress.pruning.costs import full_widths, measure_layers, params
from compress.pruning.criteria import CRITERIA, score
from compress.pruning.goals import Goal
from compress.pruning.plan import Cut, Scope, cut_, find_groups, widths

IMAGE = torch.zeros(1, 3, 16, 16)
SCOPES = ("global", "local", "isomorphic")


def planned(
    model: nn.Module,
    *,
    keep: float,
    goal: Literal["macs", "params"] = "macs",
    scope: Scope = "global",
    round_to: int = 8,
) -> list[Cut]:
    return cuts_to(model, keep, 16, goal=goal, scope=scope, round_to=round_to)


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
@pytest.mark.parametrize("factory", [Residual, Mobile, Decoder])
def test_a_cut_network_costs_at_most_its_budget_and_no_more_than_one_block_less(
    factory: type[nn.Module], goal: Literal["macs", "params"], scope: Scope
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


def test_an_unreachable_budget_cuts_all_that_may_go() -> None:
    model = lively(Residual(5))
    options = options_of(model, 16)
    assert planned(model, keep=0.01) == options.cuts(options.blocks)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("block9.*", "block"), ("block2", r"did you mean block2\.\*\?"), ("hed", r"did you mean head\?")],
)
def test_a_pattern_that_excludes_nothing_is_refused(pattern: str, hint: str) -> None:
    with pytest.raises(ModelError, match=rf"prune\.exclude: {re.escape(pattern)} matches no layer; .*{hint}"):
        find_groups(Residual(5), IMAGE, "l2", exclude=["head", pattern])


def test_excluded_layers_keep_their_width() -> None:
    model = lively(Residual(5))
    groups = find_groups(model, IMAGE, "l2", exclude=["head", "block2.*"])
    assert {group.root for group in groups} == {"stem.0", "block1.conv1"}


ORACLES = {
    "l1": tp.importance.GroupMagnitudeImportance(p=1),
    "l2": tp.importance.GroupMagnitudeImportance(p=2),
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


def energy(model: nn.Module, power: int) -> float:
    """Return the sum of |w| or w² over all weights, without biases."""
    weights = (p.detach().double() for name, p in model.named_parameters() if name.endswith("weight"))
    return float(sum(weight.abs().pow(power).sum() for weight in weights))


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_a_channel_of_a_transposed_convolution_scores_what_its_removal_takes_away(criterion: str, power: int) -> None:
    """By brute force: each channel is really cut, and the weights that are gone are added up."""
    model = lively(Decoder(5))
    groups = {group.root: group for group in find_groups(model, IMAGE, criterion, exclude=["head"])}
    assert groups.keys() == {"stem.0", "depth.0", "mix.0"}  # a grouped transposed convolution keeps both of its widths
    for root, group in groups.items():
        gone = []
        for channel in range(group.channels):
            cut = copy.deepcopy(model)
            cut_(cut, IMAGE, [Cut(root, (channel,))])
            gone.append(energy(model, power) - energy(cut, power))
        expected = torch.tensor(gone, dtype=torch.float32)
        assert torch.allclose(group.scores, expected / expected.mean(), rtol=1e-4)


def test_every_convolutions_cost_is_torchs_own_count() -> None:
    for model in (Residual(5), Mobile(5), Decoder(5)):
        layers, counts = measure_layers(model, IMAGE), count(model, (3, 16, 16))
        assert sum(layer.macs for layer in layers) == counts.macs
        assert sum(layer.weights + layer.vectors for layer in layers) == counts.params


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
    assert params(layers)(*full_widths(layers)) * 1e6 == sum(p.numel() for p in model.parameters())
    half = nn.Conv2d(8, 24, 3, padding=1)
    full = measure_layers(nn.Sequential(nn.Conv2d(16, 48, 3, padding=1)), torch.zeros(1, 16, 8, 8))
    assert params(full)(np.array([24.0]), np.array([8.0])) * 1e6 == sum(p.numel() for p in half.parameters())


def test_local_scope_keeps_the_same_part_everywhere() -> None:
    model = lively(Residual(5, width=64))
    cuts = planned(model, keep=0.45, scope="local")
    groups = {group.root: group.channels for group in find_groups(model, IMAGE, "l2", exclude=["head"])}
    parts = [len(cut.remove) / groups[cut.root] for cut in cuts]
    assert len(parts) == len(groups)
    assert all(abs(a - b) <= 8 / 64 + 1e-9 for a, b in itertools.pairwise(parts))


# The smallest images that each takes.
LIBRARY = {
    "torchvision:shufflenet_v2_x0_5": 32,
    "torchvision:mobilenet_v3_small": 32,
    "torchvision:mobilenet_v2": 32,
    "timm:repvgg_a0": 32,
    "timm:test_vit": 160,
}
LARGE = {
    "torchvision:resnext50_32x4d": 32,
    "torchvision:googlenet": 64,
    "torchvision:efficientnet_b0": 32,
    "torchvision:regnet_y_400mf": 32,
    "timm:efficientnet_lite0": 32,
}
LARGEST = {
    "torchvision:densenet121": 32,
    "torchvision:convnext_tiny": 32,
    "torchvision:swin_t": 112,
    "timm:vit_tiny_patch16_224": 224,
    "timm:mobileone_s0": 32,
}


def distinct(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give every channel a bias of its own, by which it is recognized after a cut, and batch-norms the statistics of `images`."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.linspace(-0.5, 1.0, len(parameter))[torch.randperm(len(parameter))]
        elif parameter.dim() == 2:
            nn.init.kaiming_normal_(parameter)  # transformers start so small that all images look alike
    return measure_batchnorm_(model, images)


class Affine(nn.Module):
    """A scale and a shift of one dimension as bare parameters, in the place of a layer norm, whose statistics would tell a cut."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.movedim(self.dim, -1) * self.weight + self.bias).movedim(-1, self.dim)


def without_statistics(model: nn.Module) -> nn.Module:
    """Return the network with an affine map in the place of each layer norm over the last dimension, or the channels of torchvision's."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            model.set_submodule(name, Affine(module.normalized_shape[0], 1 if isinstance(module, LayerNorm2d) else -1))
    return model


def silence_(model: nn.Module, pruned: nn.Module) -> None:
    """Zero every channel of `model` that `pruned` does not have any more: what it says to the layers behind it is 0."""
    kept = dict(pruned.named_parameters())
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
        if isinstance(owner, kinds) and name.endswith("bias"):
            gone = ~torch.isin(parameter.data, kept[name].data)
            if not bool(gone.any()):
                continue  # a grouped transposed convolution's weights have no row for each output
            by_inputs = isinstance(owner, nn.ConvTranspose2d) and owner.groups == 1
            weight = owner.weight.data
            (weight.transpose(0, 1) if by_inputs else weight)[gone] = parameter.data[gone] = 0.0
        elif not isinstance(owner, kinds) and parameter.shape != kept[name].shape:
            (dim,) = [dim for dim in range(parameter.dim()) if parameter.shape[dim] != kept[name].shape[dim]]
            slices, left = parameter.data.movedim(dim, 0), kept[name].data.movedim(dim, 0)
            for entry in slices:
                if not any(torch.equal(entry, other) for other in left):
                    entry.zero_()


def cut_to(model: nn.Module, size: int, keep: float) -> float:
    """Cut the network to a part of its multiply-accumulates; return the part that is left."""
    image, full = torch.zeros(1, 3, size, size), count(model, (3, size, size)).macs
    cuts = cuts_to(model, keep, size, exclude=[classifier(model)], scope="local")
    cut_(model, image, cuts)
    return count(model, (3, size, size)).macs / full


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        *LIBRARY.items(),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE.items()),
        *(pytest.param(*row, marks=pytest.mark.acceptance) for row in LARGEST.items()),
    ],
)
def test_library_networks_are_cut_to_their_budget_and_equal_the_silenced_network(arch: str, size: int) -> None:
    assert_equals_silenced(without_statistics(build(arch, num_classes=5)), size)


def test_channels_are_followed_through_a_flatten() -> None:
    """As in VGG, where each channel becomes 7 x 7 features of the first linear layer."""
    features = nn.Sequential(
        nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    )
    assert_equals_silenced(nn.Sequential(features, nn.Linear(128 * 9, 64), nn.ReLU(), nn.Linear(64, 5)), 16)


class Joined(nn.Module):
    """Two maps of other sizes, flattened and joined before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 64, 3, 2), nn.Conv2d(64, 96, 3, 2)
        self.mix, self.head = nn.Linear(64 * 49 + 96 * 9, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.wide(x).relu()
        maps = F.adaptive_avg_pool2d(wide, 7), F.adaptive_avg_pool2d(self.narrow(wide).relu(), 3)
        joined = torch.cat([each.flatten(1) for each in maps], 1)
        return self.head(self.mix(joined).relu())  # type: ignore[no-any-return]


def test_channels_are_followed_through_flattened_branches_that_are_joined() -> None:
    assert_equals_silenced(Joined(), 16)


def test_channels_of_flattened_branches_score_by_all_that_reads_them() -> None:
    model = Joined()
    scores = {group.root: group.scores for group in find_groups(model, IMAGE, "l2", exclude=["head"])}
    mix, narrow = model.mix.weight.detach().square(), model.narrow.weight.detach().square()
    read = {"wide": mix[:, : 64 * 49].view(32, 64, 49), "narrow": mix[:, 64 * 49 :].view(32, 96, 9)}
    by_hand = {root: part.sum((0, 2)) for root, part in read.items()}
    for root in read:
        by_hand[root] += model.get_parameter(f"{root}.weight").detach().square().sum((1, 2, 3))
    by_hand["wide"] += narrow.sum((0, 2, 3))
    for root, expected in by_hand.items():
        assert scores[root].tolist() == pytest.approx((expected / expected.mean()).tolist(), rel=1e-4)


@pytest.mark.parametrize("dimensions", [0, 1])
def test_channels_are_followed_past_a_scale_of_all_channels(dimensions: int) -> None:
    """As in HGNetV2 and PoolFormerV2."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full([1] * dimensions, 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert_equals_silenced(
        nn.Sequential(nn.Conv2d(3, 128, 3), nn.ReLU(), Same(), nn.Conv2d(128, 64, 3), pool, nn.Linear(64, 5)), 16
    )


def test_channels_are_followed_through_transposed_convolutions() -> None:
    assert_equals_silenced(Decoder(5), 16)


def assert_equals_silenced(model: nn.Module, size: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, size, size)
    pruned = copy.deepcopy(distinct(model, images))
    assert 0.65 < cut_to(pruned, size, 0.7) <= 0.7
    silence_(model, pruned)
    with torch.no_grad():  # in 64 bits: what rounding leaves grows from layer to layer where nothing normalizes
        expected, got = model.double()(images.double()), pruned.double()(images.double())
    spread = float((expected[0] - expected[1]).abs().max())
    assert spread > 1e-8 * float(expected.abs().max())  # else equality would say nothing
    assert float((got - expected).abs().max()) < 1e-6 * spread


class Shuffled(nn.Module):
    """Two convolutions, an operation on channels between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.between, self.head = between, nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.second(self.between(self.first(self.stem(x)))))
        return out.mean((2, 3))


REGROUPINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shuffle": lambda x: x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "halves swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "folded into the batch": lambda x: x.reshape(-1, 8, *x.shape[2:]).reshape(x.shape),
    "rolled": lambda x: x.roll(1, 1),
    "gathered": lambda x: x[:, torch.arange(15, -1, -1)],
    "doubled": lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
    "functional convolution": lambda x: F.conv2d(x, torch.ones(16, 16, 1, 1, requires_grad=True)),
}


@pytest.mark.parametrize("name", sorted(REGROUPINGS))
def test_channels_that_are_regrouped_keep_their_width_and_the_others_go(name: str) -> None:
    groups = find_groups(Shuffled(REGROUPINGS[name]), torch.zeros(1, 3, 8, 8), "l2", exclude=["head"])
    assert [group.root for group in groups] == ["second", "stem"]


class Octave(nn.Conv2d):
    """A convolution whose call is several, each by some of its weights, as octave convolutions' are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = [F.conv2d(half, self.weight[:8, i * 8 : i * 8 + 8]) for i, half in enumerate(x.chunk(2, 1))]
        return halves[0] + halves[1]


class Parted(nn.Linear):
    """A linear layer whose call is several, each by some of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [F.linear(x.movedim(1, -1), part) for part in (self.weight[:8], self.weight[8:])]
        return (parts[0] + parts[1]).movedim(-1, 1)


def test_layers_that_are_called_part_by_part_keep_their_width_and_the_others_go() -> None:
    for layer in (Octave(16, 16, 1, bias=False), Parted(16, 16, bias=False)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 5, 1)
        )
        assert [group.root for group in find_groups(model, IMAGE, "l2", exclude=["6"])] == ["0"]


def test_channels_are_followed_through_a_blur_by_a_constant_kernel() -> None:
    groups = find_groups(
        Shuffled(lambda x: F.conv2d(x, torch.ones(x.shape[1], 1, 3, 3), groups=x.shape[1])),
        IMAGE, "l2", exclude=["head"],
    )  # fmt: skip
    assert [group.root for group in groups] == ["second", "first", "stem"]


@pytest.mark.parametrize(
    ("layer", "roots"),
    [
        (nn.Conv2d(16, 32, 3, groups=16), ["last"]),
        (nn.Conv2d(16, 8, 3, groups=8), ["last"]),
        (nn.ConvTranspose2d(16, 32, 3, groups=16), ["last"]),
        (nn.ConvTranspose2d(16, 8, 3, groups=8), ["last"]),
        (nn.ConvTranspose2d(16, 16, 3, groups=4), ["last"]),
        (nn.Conv2d(16, 16, 3, groups=4), ["last", "layer", "stem"]),
        (nn.ConvTranspose2d(16, 16, 3, groups=16), ["last", "layer"]),
        (nn.ConvTranspose2d(16, 24, 3), ["last", "layer", "stem"]),
    ],
)
def test_convolutions_that_torch_pruning_cuts_wrongly_keep_their_width(layer: nn.Module, roots: list[str]) -> None:
    model = nn.Sequential()
    for name, part in (("stem", nn.Conv2d(3, 16, 3)), ("layer", layer), ("last", nn.LazyConv2d(16, 1)), ("head", nn.Conv2d(16, 5, 1))):  # fmt: skip
        model.add_module(name, part)
    model(IMAGE)
    groups = find_groups(model, IMAGE, "l2", exclude=["head"])
    assert [group.root for group in groups] == roots
    for group in groups:
        cut = copy.deepcopy(model)
        units = group.channels // group.unit
        cut_(cut, IMAGE, [Cut(group.root, tuple(range(0, group.channels, units)))])
        assert cut(torch.randn(2, 3, 16, 16)).shape[:2] == (2, 5)


def test_a_network_whose_channels_cannot_be_followed_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr(index_mapping, "update_index_mapping", fail)
    with pytest.raises(CompressError, match="Residual: Torch-Pruning cannot follow its channels"):
        find_groups(Residual(5), IMAGE, "l2", exclude=[])


def test_what_no_layer_holds_is_part_of_the_cost() -> None:
    model = build("timm:test_vit", num_classes=5)
    layers = measure_layers(model, torch.zeros(1, 3, 160, 160))
    for goal in ("macs", "params"):
        whole = getattr(count(model, (3, 160, 160)), goal)
        assert width_cost(model, layers, goal, (3, 160, 160))(*full_widths(layers)) * 1e6 == pytest.approx(whole)


def test_a_goal_that_cannot_be_reached_names_the_least() -> None:
    fraction, time = Goal("keep_macs", "macs", 0.3), Goal("max_latency_ms", "latency", 2.0, is_fraction=False)
    assert "prune: keep_macs: 0.3 of the macs cannot be reached, the narrowest network has 0.62" in (
        fraction.refusal(200.0, 124.0)
    )
    assert "prune: max_latency_ms: 2 ms cannot be reached, the narrowest network has 2.5: raise" in time.refusal(
        9.0, 2.5
    )


def test_transformers_lose_heads_and_widths_of_their_stream() -> None:
    model = build("timm:test_vit", num_classes=5)
    groups = find_groups(model, torch.zeros(1, 3, 160, 160), "l2", exclude=["head"])
    assert {group.root for group in groups} >= {"blocks.0.attn", "blocks.5.attn", "blocks.0.mlp.fc1"}
    (stream,) = [
        group
        for group in groups
        if any(name == "blocks.0.attn.qkv" and not output for name, output, _ in group.touches)
    ]
    attention, tokens = model.get_submodule("blocks.0.attn"), model.get_parameter("pos_embed").shape[1]
    heads = attention.num_heads
    cut_(model, torch.zeros(1, 3, 160, 160), [Cut("blocks.0.attn", (1,)), Cut(stream.root, (0, 3))])
    assert attention.num_heads == heads - 1  # type: ignore[operator]
    assert model.get_parameter("pos_embed").shape == (1, tokens, stream.channels - 2)
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 5)
