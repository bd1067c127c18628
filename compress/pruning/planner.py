"""All that can be cut from a network, as the prune stage, its rehearsal and the Python API plan it."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from compress.pruning.branches import find_branches
from compress.pruning.costs import WidthCost, measure_layers
from compress.pruning.goals import Goal
from compress.pruning.plan import ChannelGroup, Cut, Options, Scope, choose, find_groups, find_options, smallest_widths


def options_of(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: Tensor,
    *,
    scope: Scope,
    round_to: int,
    min_channels: Mapping[str, int],
    blocks: bool = False,
) -> Options:
    """Return what can be cut from a network that ran on `images` (1, c, h, w); `blocks` allows whole residual blocks too."""
    _, channels, height, width = images.shape
    return find_options(
        groups,
        measure_layers(model, images),
        scope=scope,
        round_to=round_to,
        min_channels=min_channels,
        branches=find_branches(model, groups, (channels, height, width)) if blocks else (),
    )


def options_of_uncut(
    model: nn.Module,
    images: Tensor,
    criterion: str,
    *,
    exclude: Sequence[str],
    scope: Scope,
    round_to: int,
    min_keep: float,
    blocks: bool = False,
    covariances: Mapping[nn.Module, Tensor] | None = None,
) -> Options:
    """Return what can be cut from a network of which every layer keeps at least the fraction `min_keep` of its channels."""
    groups = find_groups(model, images, criterion, exclude=exclude, covariances=covariances)
    smallest = smallest_widths(groups, min_keep)
    return options_of(model, groups, images, scope=scope, round_to=round_to, min_channels=smallest, blocks=blocks)


def cuts_to(keep: float, options: Options, cost: WidthCost) -> list[Cut]:
    """Return the cuts that leave this fraction of an uncut network's multiply-accumulates; CompressError where the options do not reach it."""
    return choose(options, cost, Goal("keep_macs", "macs", keep).budget(options.full(cost), least=options.least(cost)))
