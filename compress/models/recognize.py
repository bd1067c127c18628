"""Recognize the architecture of a checkpoint by the names and shapes of its tensors."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.models.architectures import build, with_channels
from compress.models.known import libraries

COUNTER = "num_batches_tracked"  # missing in old files
MOST = 12  # matches to return; up to 40 networks have the same tensors' names


class Match(NamedTuple):
    """A network that a checkpoint fits, and the checkpoint's number of classes and of the images' channels."""

    arch: str
    classes: int
    channels: int = 3


def fingerprint(names: Iterable[str]) -> str:
    """Return eight digits of a sha256 over the names of a network's tensors, whatever its widths and number of classes."""
    kept = sorted(name for name in names if not name.endswith(COUNTER))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8]


def recognize(state: Mapping[str, Tensor]) -> list[Match]:
    """Return the networks with these names and shapes of tensors, whatever the number of classes; the likeliest first.

    Networks that differ only in parts without weights (an activation, a padding) are all returned.
    """
    wanted = fingerprint(state)
    alike = [
        f"{library}:{name}"
        for library, listed in libraries().items()
        for name, own in listed.fingerprints.items()
        if own == wanted
    ]
    alike.sort(key=lambda arch: (arch.startswith("timm:"), len(arch), arch))
    return [match for match in (_match(arch, state) for arch in alike) if match is not None][:MOST]


def channels_of(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return the channels of the images that a network's weights take, from its first convolution."""
    first = next((name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), "")
    weight = state.get(f"{first}.weight")
    return weight.shape[1] if weight is not None and weight.shape[1] in (1, 4) else 3


def _match(arch: str, state: Mapping[str, Tensor]) -> Match | None:
    """Return the network with the number of classes and channels with which it fits the state, None where none does."""
    built = 1000
    with torch.device("meta"):
        network = build(arch, num_classes=built)
        channels = channels_of(network, state)
        network = with_channels(network, channels)
        own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    other = {name: state[name].shape for name in own if name in state and state[name].shape != own[name]}
    sizes = {shape[0] for shape in other.values() if len(shape)}
    if not other:
        return Match(arch, built, channels)
    if len(sizes) > 1 or any(own[name][0] != built or shape[1:] != own[name][1:] for name, shape in other.items()):
        return None
    return Match(arch, sizes.pop(), channels)
