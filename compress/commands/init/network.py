"""Find the network of a checkpoint, and the preprocessing with which it knows the images."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.commands.init.images import LOOKED_AT, Folder
from compress.data.teachers import foreign
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.published import IMAGENET, Published, published
from compress.models.recognize import Match, channels_of
from compress.models.weights import load_weights_
from export.images.decode import RGB, BrokenImage
from export.images.preprocess import Preprocess
from export.images.read import spread
from export.images.size import Shape
from export.runtime.session import first_line

JUDGED = 128  # images to score candidates on
LOST_BY_FLIP = 0.1  # networks of digits lose 0.65 (docs/results.md)
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # pixels from 0 to 255, as some Keras networks take them
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Network:
    """The teacher, its preprocessing, and its accuracy on JUDGED images, as they are and mirrored.

    Both are None if its classes are not the folder's. Without labels its own predictions are the truth.
    """

    arch: str
    classes: int
    size: int
    resize: float
    mean: Sequence[float]
    std: Sequence[float]
    score: float | None
    mirrored: float | None
    others: tuple[str, ...] = ()  # further networks that the checkpoint fits

    @property
    def shape(self) -> Shape:
        """One image as the network takes it."""
        return len(self.mean), self.size, self.size

    @property
    def flip(self) -> bool:
        """Whether left and right may change places: the network knows mirrored images almost as well, or it is not known."""
        return self.score is None or self.mirrored is None or self.mirrored > self.score - LOST_BY_FLIP


def brought_by(weights: str) -> str | None:
    """Return the architecture of a file or folder that contains a whole network; None for a checkpoint."""
    kind = "hf" if Path(weights).is_dir() else {".onnx": "onnx", ".pt2": "exported"}.get(Path(weights).suffix)
    return f"{kind}:{weights}" if kind else None


def whole_match(arch: str) -> Match:
    """Return a whole network with its number of classes and channels; raise CompressError if it takes no square images."""
    known, network = published(arch), build(arch, num_classes=0)
    size, channels = known.size if known else 224, channels_of(network, network.state_dict())
    try:
        with torch.inference_mode():
            outputs = network(torch.zeros(2, channels, size, size))
    except RuntimeError as error:
        raise CompressError(
            f"{arch}: does not take images of {size} x {size} ({first_line(error)}); name it as model.arch in a recipe, with its data.image_size"
        ) from error
    return Match(arch, outputs.shape[1], channels)


def given(arch: str, state: dict[str, Tensor], *, trust_code: bool) -> Match:
    """Return a named network with the checkpoint's number of classes, from its last layer, and channels, from its first."""
    classes = [
        tensor.shape[0]
        for name, tensor in state.items()
        if tensor.ndim > 1 and f"{name.rpartition('.')[0]}.bias" in state
    ]
    number = classes[-1] if classes else next(reversed(state.values())).shape[0]
    return Match(arch, number, channels_of(build(arch, num_classes=number, trust_code=trust_code), state))


def choose(matches: Sequence[Match], weights: str, folder: Folder, *, trust_code: bool) -> Network:
    """Return the network and preprocessing with the best accuracy on some images; the first ones if the classes are others."""
    tried = list[Network]()
    for match in matches:
        same = not folder.is_labelled or match.classes == len(folder.listing.classes)
        known = published(match.arch) or Published(224, 1.0, IMAGENET)
        shape = None if match.channels == 3 else (match.channels, known.size, known.size)
        model = build(match.arch, num_classes=match.classes, shape=shape, trust_code=trust_code)
        if foreign(match.arch) is None:
            load_weights_(model, match.arch, weights, reset_head=False)
        for prepared in _preparations(match.arch, folder):
            score, mirrored = _scores(model, prepared, folder) if same else (None, None)
            seen = prepared.size, prepared.resize, *prepared.normalize
            tried.append(Network(match.arch, match.classes, *seen, score, mirrored))
            if score is None or score > 0.5:
                break  # good enough, try no other preprocessing
    best = max(tried, key=lambda network: network.score or 0)
    return replace(best, others=tuple(match.arch for match in matches if match.arch != best.arch))


def _preparations(arch: str, folder: Folder) -> Iterator[Published]:
    """Yield the preprocessing that the network's library publishes, then other normalizations at the images' size."""
    known, is_whole = published(arch), foreign(arch) is not None
    if known is not None and folder.pixel == RGB:
        yield known
    if known is None or not is_whole:
        side = min(int(statistics.median(folder.sides)), known.size if known else 224)
        known = Published(max(32, side // 32 * 32), 1.0, IMAGENET)
    tried: Sequence[tuple[tuple[float, ...], tuple[float, ...]]] = (IMAGENET, HALVES, NONE, *([BYTES] * is_whole))
    if folder.pixel != RGB:
        n = folder.pixel.channels
        tried = (measured(folder, known.size), ((0.5,) * n, (0.5,) * n), ((0.0,) * n, (1.0,) * n))
    for pair in tried:
        yield known._replace(normalize=pair)


def measured(folder: Folder, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel over some images, for pixels in [0, 1]."""
    preprocess = Preprocess(
        (size, size),
        (size, size),
        (0.0,) * folder.pixel.channels,
        (1.0,) * folder.pixel.channels,
        bits=folder.pixel.bits,
    )
    images, found = folder.images(), list[Any]()
    for index in spread(len(images), LOOKED_AT):
        with suppress(BrokenImage):
            found.append(preprocess.normalize(preprocess.pixels(images.whole(index))[None])[0])
    values = np.stack(found).transpose(1, 0, 2, 3).reshape(folder.pixel.channels, -1)
    mean, std = (tuple(float(f"{one:.3g}") for one in part) for part in (values.mean(1), values.std(1)))
    return mean, tuple(max(one, 0.001) for one in std)


def _scores(model: nn.Module, prepared: Published, folder: Folder) -> tuple[float, float]:
    """Return the network's accuracy on some validation images, and on their mirror images."""
    judging = folder.images(judged=True)
    preprocess = Preprocess(
        (prepared.size,) * 2, (round(prepared.size * prepared.resize),) * 2, *prepared.normalize, bits=folder.pixel.bits
    )
    right, seen = np.zeros(2), 0
    for index in spread(len(judging), JUDGED):
        try:
            pixels = preprocess.pixels(judging.whole(index))
        except BrokenImage:
            continue
        images = torch.from_numpy(preprocess.normalize(np.asarray(pixels)[None]))
        with torch.inference_mode():
            found = model(torch.cat([images, images.flip(3)])).argmax(1)  # (2,)
        right += (found == (judging.labels[index] if folder.is_labelled else found[0])).numpy()
        seen += 1
    alone, mirrored = (right / max(seen, 1)).tolist()
    return alone, mirrored
