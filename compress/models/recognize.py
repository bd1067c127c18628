"""Recognize the architecture of a checkpoint by the names and shapes of its tensors."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

from compress.models.architectures import build, with_channels
from compress.models.detectors import BUILDERS, KINDS
from compress.models.known import libraries

COUNTER = "num_batches_tracked"  # missing in old files
MOST = 12  # matches to return; up to 40 networks have the same tensors' names
BUILT = 1000  # classes with which a network is built to be compared
# Where timm's networks have their classifier, which an encoder's checkpoint lacks.
HEADS = ("head.fc", "head", "classifier", "fc", "head.linear", "last_linear", "head.classifier.linear", "head.fc.fc2", "head.classifier.4",
         "head.head.l", "head.proj", "head.fc2", "head.l")  # fmt: skip
SEGMENTERS = ("fcn_", "deeplabv3_", "lraspp_")  # torchvision's, by the start of their names


class Match(NamedTuple):
    """A network that a checkpoint fits, and the checkpoint's number of classes and of the images' channels.

    One whose outputs are no classes has the names of those to serve, () for all, and of the others.
    """

    arch: str
    classes: int
    channels: int = 3
    outputs: tuple[str, ...] | None = None
    others: tuple[str, ...] = ()


def fingerprint(names: Iterable[str]) -> str:
    """Return eight digits of a sha256 over the names of a network's tensors, whatever its widths and number of classes."""
    kept = sorted(name for name in names if not name.endswith(COUNTER))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8]


def recognize(state: Mapping[str, Tensor]) -> Iterator[Match]:
    """Yield the networks with these names and shapes of tensors, whatever the number of classes; the likeliest first.

    Networks that differ only in parts without weights (an activation, a padding) all fit. Encoders are timm's without their classifier.
    """
    found = (match for arch in _alike(state) if (match := matched(arch, state)) is not None)
    encoders = (
        arch
        for head in HEADS
        for arch in _alike([*state, f"{head}.weight", f"{head}.bias"])
        if arch.startswith("timm:")
    )
    yield from islice(chain(found, filter(None, (encoder(arch, state) for arch in encoders))), MOST)


def _alike(names: Iterable[str]) -> list[str]:
    """Return the networks whose tensors have these names."""
    wanted = fingerprint(names)
    alike = [
        f"{library}:{name}"
        for library, listed in libraries().items()
        for name, own in listed.fingerprints.items()
        if own == wanted
    ]
    return sorted(
        alike, key=lambda arch: (arch.startswith("timm:"), not arch.startswith("torchvision:"), len(arch), arch)
    )


def encoder(arch: str, state: Mapping[str, Tensor]) -> Match | None:
    """Return a network of timm without its classifier if it fits the state."""
    channels, own = _shapes(arch, state, 0, trust_code=False)
    given = {name: tensor.shape for name, tensor in state.items()}
    fits = all(own.get(name) == given.get(name) for name in own.keys() | given.keys() if not name.endswith(COUNTER))
    return Match(arch, 0, channels, ()) if fits else None


def task_of(arch: str) -> str | None:
    """Return the task of a library's network; None for one that only its outputs tell."""
    library, _, name = arch.rpartition(":")
    if library in BUILDERS or (library == "torchvision" and name in KINDS):
        return "detection"
    if library in ("fpn", "smp") or (library == "torchvision" and name.startswith(SEGMENTERS)):
        return "segmentation"
    return "classification" if library in ("torchvision", "timm", "cifar") else None


def channels_of(network: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Return the channels of the images that a network's weights take, from its first convolution."""
    first = next((name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)), "")
    weight = state.get(f"{first}.weight")
    return weight.shape[1] if weight is not None and weight.shape[1] in (1, 4) else 3


def matched(arch: str, state: Mapping[str, Tensor], *, trust_code: bool = False) -> Match | None:
    """Return the network with the number of classes and channels with which it fits the state, None where none does.

    Every head's outputs grow by its own step with each class: a detector's by its anchors at a place, which also have a background.
    """
    shapes = partial(_shapes, arch, state, trust_code=trust_code)
    channels, own = shapes(BUILT)
    other = {name: state[name].shape for name in own if name in state and state[name].shape != own[name]}
    if not other:
        return Match(arch, BUILT, channels)
    _, wider = shapes(BUILT + 1)
    found = set[float]()
    for name, shape in other.items():
        if not len(shape) or shape[1:] != own[name][1:] or wider[name] == own[name]:
            return None
        found.add(BUILT + (shape[0] - own[name][0]) / (wider[name][0] - own[name][0]))
    classes = found.pop()
    return Match(arch, int(classes), channels) if not found and classes >= 1 and classes.is_integer() else None


def _shapes(arch: str, state: Mapping[str, Tensor], classes: int, *, trust_code: bool) -> tuple[int, dict[str, Size]]:
    """Return the state's channels and the network's shapes, built without memory where it can be."""
    network = unfilled(arch, classes, trust_code=trust_code)
    channels = channels_of(network, state)
    return channels, {name: tensor.shape for name, tensor in with_channels(network, channels).state_dict().items()}


def unfilled(arch: str, classes: int, *, trust_code: bool = False) -> nn.Module:
    """Return a network without memory for its weights, or with random ones where its start needs values."""
    try:
        with torch.device("meta"):
            return build(arch, num_classes=classes, trust_code=trust_code)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return build(arch, num_classes=classes, trust_code=trust_code)
