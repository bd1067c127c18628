"""Find how a network knows images: their size, the normalization, and whether left and right may change places."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.commands.init.images import LOOKED_AT, Folder
from compress.commands.init.network import loaded
from compress.data.teachers import foreign
from compress.errors import ModelError
from compress.models.architectures import SIZED
from compress.models.published import HALVES, IMAGENET, NONE, Published, published
from compress.models.recognize import Match
from compress.models.structure import count
from compress.training.device import place_
from export.images.box_listing import NO_BOX, BoxListing
from export.images.decode import RGB, BrokenImage
from export.images.preprocess import Preprocess
from export.images.read import spread
from export.images.size import Shape, Size, said
from export.tasks import TASKS
from export.tasks.task import Array

SIDES = (64, 96, 128, 160, 192, 224)  # tried for classification
SHORTER = (128, 192, 256, 320, 416, 512)  # of the images' shorter side, for masks and boxes
STEP = 32  # sizes are multiples of it
FIRST, MOST = 32, 512  # images in the first round, and in all
BUDGET = 1.5e12  # multiply-accumulates for trying sizes; a core does about 4e10 in a second
FEWEST = 16  # images on which a score means something
POINT = 0.01  # a cheaper size may score this much less than the best
GOOD = 0.5  # a score that needs no other normalization
MIRRORED, LOST_BY_FLIP = 64, 0.1  # networks of digits lose 0.65 (docs/results.md)
BATCH = 16
BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # pixels from 0 to 255, as some Keras networks take them
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Tried:
    """A way to see images, the images that it was scored on, the score, and its work in multiply-accumulates an image."""

    way: Preprocess
    images: int
    score: float
    macs: float


@dataclass(frozen=True)
class Network:
    """The teacher and how it sees images, with its score as they are and mirrored on some of them.

    Both are None if its classes are not the folder's; `mirrored` also for masks and boxes. Without labels its own predictions are the truth.
    `tried` are the sizes that were compared.
    """

    arch: str
    classes: int
    way: Preprocess
    score: float | None
    mirrored: float | None
    judged: int = 0  # images
    tried: tuple[Tried, ...] = ()
    others: tuple[str, ...] = ()  # further networks that the checkpoint fits

    @property
    def shape(self) -> Shape:
        """One image as the network takes it."""
        return self.way.shape

    @property
    def resize(self) -> float:
        """The resize's size divided by the image's."""
        return self.way.resize_to[0] / self.way.image_size[0]

    @property
    def flip(self) -> bool:
        """Whether left and right may change places: the network knows mirrored images almost as well, or it is not known."""
        return self.score is None or self.mirrored is None or self.mirrored > self.score - LOST_BY_FLIP


def seen_by(match: Match, model: nn.Module, folder: Folder, tell: Tell) -> Network:
    """Return the network with the cheapest size whose score is within a point of the best one's.

    Where the classes are others or there are no labels, nothing can be tried: the library's size and normalization are taken.
    """
    ways = list(_ways(match, folder))
    same = not folder.is_labelled or match.classes == len(folder.listing.classes)
    if not same:
        return Network(match.arch, match.classes, ways[0], None, None)
    judge = _Judge(place_(model.eval(), torch.device("cpu")), folder, tell)
    ways = judge.possible(ways)
    tried = judge.raced(ways) if folder.is_labelled else []
    few = min(FEWEST, judge.affordable(ways[0]))  # too few images, or too large a network, to compare sizes
    if not folder.is_labelled or not (tried or few):
        return _mirrored(Network(match.arch, match.classes, ways[0], None, None), judge)
    best = _cheapest(tried) if tried else judge.tried(ways[0], few)
    images = min(max(FEWEST, best.images // 4), len(judge.images))
    if best.score <= GOOD and judge.affordable(best.way) >= images:
        normalized = [replace(best.way, mean=mean, std=std) for mean, std in _normalizations(match, folder, best.way)]
        others = [judge.tried(way, images) for way in normalized]
        first = judge.tried(best.way, images)
        better = max([first, *others], key=lambda one: one.score)
        best = better if better is not first else best
    score, images = best.score, best.images
    found = Network(match.arch, match.classes, best.way, score, None, images, tuple(tried))
    return _mirrored(found, judge)


def choose(
    matches: Iterator[Match], first: Match, weights: str, folder: Folder, tell: Tell, *, trust_code: bool
) -> tuple[Network, nn.Module]:
    """Return the network, of those that fit, with the best score, and how it sees images; the first one if that is good or nothing tells."""
    side = int(statistics.median(folder.sides))
    model = loaded(first, weights, side, trust_code=trust_code)
    best, also = seen_by(first, model, folder, tell), list[str]()
    if not folder.is_labelled or best.score is None or best.score > GOOD:
        return best, model
    for match in matches:
        other = loaded(match, weights, side, trust_code=trust_code)
        judge = _Judge(place_(other, torch.device("cpu")), folder, tell)
        also.append(match.arch)
        if judge.tried(best.way, best.judged).score > best.score + POINT:
            also[-1] = best.arch
            best, model = seen_by(match, other, folder, tell), other
    return replace(best, others=tuple(also)), model


def _cheapest(tried: Sequence[Tried]) -> Tried:
    most = max(one.images for one in tried)
    survived = [one for one in tried if one.images == most]
    good = max(one.score for one in survived) - POINT - 1e-9
    return min((one for one in survived if one.score >= good), key=lambda one: one.macs)


def _mirrored(network: Network, judge: "_Judge") -> Network:
    """Add the score on mirrored images, where a task has one that mirroring does not move."""
    if judge.folder.task in ("segmentation", "detection", "tensors"):
        return network
    plain, mirrored, images = judge.mirrored(network.way)
    if network.score is not None and network.judged > images:  # the same images tell whether mirroring loses
        return replace(network, mirrored=network.score + mirrored - plain)
    return replace(network, score=plain, mirrored=mirrored, judged=images)


def _ways(match: Match, folder: Folder) -> Iterator[Preprocess]:
    """Yield the ways to compare: the library's first, then other sizes with the same normalization."""
    known, whole = published(match.arch), foreign(match.arch) is not None
    normalize: Sequence[Sequence[float]] = known.normalize if known else IMAGENET
    if folder.pixel != RGB:
        side = min(statistics.median(folder.sides), known.size if known else 224)
        normalize = measured(folder, int(side))
    if folder.task in ("segmentation", "detection"):
        sizes = _sizes_of_maps(match.arch, known, folder)
        yield from (folder.prepared(size, 1.0, normalize) for size in sizes)
        return
    own = _rounded(min(int(statistics.median(folder.sides)), known.size if known else 224))
    library = match.arch.partition(":")[0]
    fixed = whole or (library in SIZED and SIZED[library][0](match.arch.rpartition(":")[2]))
    if known is not None and (folder.pixel == RGB or fixed):
        yield folder.prepared(known.image_size, known.resize if folder.pixel == RGB else 1.0, normalize, seen=known)
    if fixed and known is not None:
        return
    sides = {own, *(SIDES if known else (224,)), *((32,) if library == "cifar" else ())}
    for side in sorted(sides, key=lambda side: (side != own, side)):
        if known is None or side < known.size:
            yield folder.prepared((side, side), 1.0, normalize, seen=known)


def _sizes_of_maps(arch: str, known: Published | None, folder: Folder) -> list[Size]:
    """Return the images' own size, as far as the library's, and smaller ones of the same proportions; one for a fixed square."""
    if arch.startswith(("torchvision:ssd300", "torchvision:ssdlite320")) and known:
        return [(known.size, known.size)]
    height, width = folder.own
    limit = min(known.size if known else SHORTER[-1], min(height, width))
    shorter = [side for side in SHORTER if side < limit]
    sizes = [(round(height * side / min(height, width)), round(width * side / min(height, width))) for side in shorter]
    own = (
        (height, width)
        if limit == min(height, width)
        else (round(height * limit / min(height, width)), round(width * limit / min(height, width)))
    )
    return list(dict.fromkeys([own, *((_rounded(high), _rounded(wide)) for high, wide in (own, *sizes))]))


def _rounded(side: int) -> int:
    return max(STEP, side // STEP * STEP)


def _normalizations(match: Match, folder: Folder, used: Preprocess) -> Iterator[Any]:
    """Yield normalizations other than the one used."""
    tried: Sequence[tuple[tuple[float, ...], tuple[float, ...]]] = (
        IMAGENET,
        HALVES,
        NONE,
        *([BYTES] * (foreign(match.arch) is not None)),
    )
    if folder.pixel != RGB:
        n = folder.pixel.channels
        tried = ((0.5,) * n, (0.5,) * n), ((0.0,) * n, (1.0,) * n)
    yield from (pair for pair in tried if pair != (used.mean, used.std))


def measured(folder: Folder, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel over some images, for pixels in [0, 1]."""
    n = folder.pixel.channels
    preprocess = Preprocess((size, size), (size, size), (0.0,) * n, (1.0,) * n, bits=folder.pixel.bits)
    images, found = folder.images(), list[Any]()
    for index in spread(len(images), LOOKED_AT):
        with suppress(BrokenImage):
            found.append(preprocess.normalize(preprocess.pixels(images.whole(index))[None])[0])
    values = np.stack(found).transpose(1, 0, 2, 3).reshape(n, -1)
    mean, std = (tuple(float(f"{one:.3g}") for one in part) for part in (values.mean(1), values.std(1)))
    return mean, tuple(max(one, 0.001) for one in std)


class _Judge:
    """Scores one network on validation images of a folder, in as many ways as asked; the images are decoded once for all ways."""

    def __init__(self, model: nn.Module, folder: Folder, tell: Tell) -> None:
        self.model, self.folder, self.tell = model, folder, tell
        self.images = folder.images(judged=True)
        self.task = TASKS[folder.task]
        self._macs: dict[Shape, float] = {}  # by the image's shape

    def chosen(self, images: int) -> Sequence[int]:
        """Return the images of a round, spread over the folder; a longer round begins with a shorter one's."""
        order = spread(len(self.images), min(MOST, len(self.images)))
        return [int(index) for index in np.random.default_rng(0).permutation(order)[:images]]

    def macs(self, way: Preprocess) -> float:
        """Return the network's work for an image; ModelError where it does not take one of this size."""
        if way.shape not in self._macs:
            self._macs[way.shape] = count(self.model, way.shape).macs
        return self._macs[way.shape]

    def possible(self, ways: Sequence[Preprocess]) -> list[Preprocess]:
        """Return the ways whose size the network takes; ModelError where it takes none."""
        found, refused = list[Preprocess](), list[ModelError]()
        for way in ways:
            try:
                self.macs(way)
                found.append(way)
            except ModelError as error:
                refused.append(error)
        if not found:
            raise refused[0]
        return found

    def affordable(self, way: Preprocess) -> int:
        """Return how many images fit into the budget."""
        return min(MOST, len(self.images), int(BUDGET / max(self.macs(way), 1)))

    def raced(self, ways: Sequence[Preprocess]) -> list[Tried]:
        """Score all ways on a few images and the better ones on more: after n images a way may be 1/√n below the best."""
        each = {way: self.macs(way) for way in ways}
        rows: dict[Preprocess, list[Array]] = {way: [] for way in each}
        alive, spent, done = list(each), 0.0, 0
        order = self.chosen(MOST)
        while done < len(order):
            until = min(len(order), FIRST if not done else 2 * done)
            cost = (until - done) * sum(each[way] for way in alive)
            if spent + cost > BUDGET:
                until = done + int((BUDGET - spent) / max(sum(each[way] for way in alive), 1))
            if until - done < (FEWEST if not done else 1):
                break
            for way, found in self.rows(alive, order[done:until]).items():
                rows[way] += found
            spent, done = spent + cost, until
            scores = {way: self.total(rows[way]) for way in alive}
            best = max(scores.values())
            alive = [way for way in alive if scores[way] >= best - 1 / math.sqrt(done)]
        return [Tried(way, sum(map(len, found)), self.total(found), each[way]) for way, found in rows.items() if found]

    def tried(self, way: Preprocess, images: int) -> Tried:
        """Score one way on some images."""
        rows = self.rows([way], self.chosen(images))[way]
        return Tried(way, sum(map(len, rows)), self.total(rows), self.macs(way))

    def mirrored(self, way: Preprocess) -> tuple[float, float, int]:
        """Return the scores on some images as they are and mirrored, and their number; without labels, by its own predictions."""
        order = self.chosen(min(MIRRORED, max(FEWEST, self.affordable(way))))
        plain, turned = list[Array](), list[Array]()
        for images, truths in self.batches([way], order):
            with torch.inference_mode():
                both = [self.model(part).numpy() for part in (images[way], images[way].flip(3))]
            known = truths[way] if self.folder.is_labelled else both[0].argmax(1)
            for kept, outputs in zip((plain, turned), both, strict=True):
                kept.append(self.task.statistics(self.task.decode(outputs), known, outputs.shape[1:]))
        return self.total(plain), self.total(turned), sum(map(len, plain))

    def rows(self, ways: Sequence[Preprocess], chosen: Sequence[int]) -> dict[Preprocess, list[Array]]:
        """Return the task's rows of statistics of some images, in each way."""
        found: dict[Preprocess, list[Array]] = {way: [] for way in ways}
        done = 0
        for images, truths in self.batches(ways, chosen):
            for way in ways:
                self.tell(f"tries {said(way.image_size)} pixels: image {done + 1} of {len(chosen)}")
                with torch.inference_mode():
                    outputs = self.model(images[way].to(memory_format=torch.channels_last)).float().numpy()
                found[way].append(self.task.statistics(self.task.decode(outputs), truths[way], outputs.shape[1:]))
            done += len(images[ways[0]])
        return found

    def batches(
        self, ways: Sequence[Preprocess], chosen: Sequence[int]
    ) -> Iterator[tuple[dict[Preprocess, torch.Tensor], dict[Preprocess, Array]]]:
        """Yield images and truths in each way, without the broken ones."""
        for start in range(0, len(chosen), BATCH):
            images: dict[Preprocess, list[Array]] = {way: [] for way in ways}
            truths: dict[Preprocess, list[Array]] = {way: [] for way in ways}
            for index in chosen[start : start + BATCH]:
                try:
                    whole = self.images.whole(index)
                    pixels = [way.pixels(whole) for way in ways]
                    true = [self.folder.truths([index], way) for way in ways]
                except BrokenImage:
                    continue
                for way, pixel, truth in zip(ways, pixels, true, strict=True):
                    images[way].append(way.normalize(np.asarray(pixel)[None]))
                    truths[way].append(truth)
            if images[ways[0]]:
                yield (
                    {way: torch.from_numpy(np.concatenate(part)) for way, part in images.items()},
                    {way: self.joined(part) for way, part in truths.items()},
                )

    def total(self, rows: Sequence[Array]) -> float:
        """Return the score of rows of statistics."""
        return self.task.total(np.concatenate(list(rows))) if rows else 0.0

    def joined(self, truths: Sequence[Array]) -> Array:
        """Return truths (n, …) of single ones; an image's boxes are filled up to the most that any image has."""
        listing = self.folder.listing
        if not isinstance(listing, BoxListing):
            return np.concatenate(list(truths))
        most = max(1, *map(len, listing.boxes.values()))
        empty = np.array(NO_BOX, np.float32)
        return np.stack([np.concatenate([one[0], np.tile(empty, (most - one.shape[1], 1))]) for one in truths])
