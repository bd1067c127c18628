"""Write a recipe for a checkpoint and a folder of images, from what the files tell and stated assumptions."""

import resource
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data.digest import shards_in
from compress.data.images import FileImages, images_of
from compress.data.shards import ShardListing
from compress.data.teachers import foreign
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.published import IMAGENET, Published, published
from compress.models.recognize import Match, channels_of, recognize
from compress.models.structure import count
from compress.models.weights import load_weights_, read_state
from compress.recipe import strict_yaml
from compress.recipe.read import read_recipe
from compress.recipe.schema import Teaching
from export.errors import DataError
from export.images.decode import RGB, BrokenImage, Pixel, describe_broken
from export.images.folders import Listing, list_folder
from export.images.preprocess import Preprocess
from export.images.read import spread
from export.images.size import Shape
from export.onnx_file.targets import host_target
from export.tasks import TASKS

SEEN = Path("runs", ".images")  # the cache of shard contents that a later run uses
LOOKED_AT = 200  # images opened, spread over the folder
JUDGED = 128  # images to score candidates on
LOST_BY_FLIP = 0.1  # networks of digits lose 0.65 (docs/your_own.md)
STEP, STEPS = 32, 4  # images in a timed step, and timed steps
# A run's costs, roughly: one shortened run says so (docs/your_own.md), no whole one was compared.
KEPT = 0.5  # of the teacher's work, the student's
CACHED = Teaching().views  # the teacher predicts each view once
VIEW_S = 0.0003  # to draw an image's view, and a step's costs besides the network
QAT_STEPS = 2  # a QAT step in float steps
OTHERS_S, SCORED = 100, 10_000  # stages without training: seconds, and images that they score
# Multiply-accumulates; with fewer a call takes microseconds, and quantizing can take more than it saves.
WORTH_SPEED = 50e6
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # pixels from 0 to 255, as some Keras networks take them
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
VIEWS = 60_000  # augmented views for distillation: 8 epochs of 7,500 images


@dataclass(frozen=True)
class Folder:
    """The images of a folder, and what opening some of them showed: their sizes, and the broken ones with the reason."""

    listing: Listing | ShardListing
    sides: list[int]  # the shorter side of each opened image
    broken: dict[str, str]
    stored: Counter[Pixel]  # channels and bits of those opened
    pixel: Pixel = RGB  # as the network takes them

    @property
    def train(self) -> int:
        """The number of training images."""
        return len(self.listing.train) if self.listing.val is not None else round(0.8 * len(self.listing.train))

    def images(self, *, judged: bool = False) -> FileImages:
        """Return the training images, or the validation images if `judged` and there are any."""
        rows = self.listing.val if self.listing.val and (judged or not self.listing.train) else self.listing.train
        return replace(images_of(self.listing, rows), pixel=self.pixel)


@dataclass(frozen=True)
class Network:
    """The teacher, its preprocessing, and its accuracy on JUDGED images, as they are and mirrored (None if its classes are not the folder's)."""

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


def write_draft(
    weights: str, data: Path, out: Path, *, arch: str | None, latency_ms: float | None, trust_code: bool
) -> Iterator[str]:
    """Write a commented recipe to `out`, and yield lines on what was found, assumed and estimated.

    Raises CompressError if `out` exists, no known network fits the checkpoint, or the folder cannot be read.
    """
    if out.exists():
        raise CompressError(f"{out}: exists already: give another file with -o, or remove it")
    refuse_other_tasks(data, weights)
    whole = brought_by(weights)
    state = read_state(weights) if whole is None else {}
    matches = [_whole(whole)] if whole else [_given(arch, state, trust_code=trust_code)] if arch else recognize(state)
    if not matches:
        raise CompressError(
            f"{weights}: none of the networks of torchvision, timm or the CIFAR papers has its {len(state):,} tensors "
            f"({', '.join(list(state)[:3])}, …): name yours with --arch my_file.py:factory --trust-code"
        )
    folder = as_taken(look_at(data), matches[0].channels, weights)
    if whole and matches[0].classes != len(folder.listing.classes):
        raise CompressError(
            f"{weights}: has {matches[0].classes:,} classes, {data} has {len(folder.listing.classes):,}, and a whole network keeps its "
            "classifier: give images of its classes, or name it as `teacher` with its `classes` in a recipe"
        )
    network = choose(matches, weights, folder, trust_code=trust_code)
    yield from _told(weights, folder, network)
    model = build(network.arch, num_classes=network.classes, shape=network.shape, trust_code=trust_code)
    macs, clock = count(model, network.shape).macs, timed(model, network.shape)
    text = draft(weights, data, out.stem, folder, network, macs=macs, latency_ms=latency_ms, trust_code=trust_code)
    out.write_text(text, encoding="utf-8")
    read_recipe(out)  # check that it can be read
    yield from _estimated(folder, network, model, clock)
    yield f"wrote {out}; run it with: compress run {out}{' --trust-code' if trust_code else ''}"


def refuse_other_tasks(data: Path, weights: str) -> None:
    """Raise CompressError, with the command to use instead, if the folder is a data set for another task than classification."""
    for task in TASKS.values():
        if task.listing is list_folder or not task.labelled:
            continue
        try:
            task.listing(data)
        except DataError:
            continue
        raise CompressError(
            f"{data}: is a data set for {task.name}, but init writes recipes for classification only: run `compress run "
            f"recipes/{task.name}_int8.yaml --data {data} --weights {weights} --set model.arch=NAME` with your network's name"
        )


def brought_by(weights: str) -> str | None:
    """Return the architecture of a file or folder that contains a whole network; None for a checkpoint."""
    kind = "hf" if Path(weights).is_dir() else {".onnx": "onnx", ".pt2": "exported"}.get(Path(weights).suffix)
    return f"{kind}:{weights}" if kind else None


def _whole(arch: str) -> Match:
    """Return a whole network with its number of classes, taken from its output."""
    known = published(arch)
    with torch.inference_mode():
        outputs = build(arch, num_classes=0)(torch.zeros(2, 3, *(known.size if known else 224,) * 2))
    return Match(arch, outputs.shape[1])


def look_at(data: Path) -> Folder:
    """List the folder and open some of its images."""
    found = shards_in(data, SEEN)
    listing = list_folder(data) if found is None else found.listing
    assert isinstance(listing, Listing | ShardListing)
    sides, broken, stored = list[int](), dict[str, str](), Counter[Pixel]()
    folder = Folder(listing, sides, broken, stored)
    images = folder.images()
    for index in spread(len(images), LOOKED_AT):
        try:
            sides.append(min(images.whole(index).size))
            stored[images.stored(index) or RGB] += 1
        except BrokenImage as error:
            broken[images.name(index)] = str(error)
    if not sides:
        raise CompressError(
            f"{data}: none of the {LOOKED_AT} images opened can be read ({next(iter(broken.values()))})"
        )
    return folder


def as_taken(folder: Folder, channels: int, weights: str) -> Folder:
    """Return the folder with its images as a network of so many channels takes them.

    Raises CompressError if they have others. Three are made of any image.
    """
    ((most, _),) = folder.stored.most_common(1)
    if channels == 3:
        return folder
    if most.channels != channels or (channels == 4 and most.bits == 16):
        raise CompressError(
            f"{folder.listing.root}: most images have {most}, and {weights} takes {channels} channel{'s' * (channels > 1)}: give images or "
            "weights of the other's kind"
        )
    return replace(folder, pixel=most)


def _given(arch: str, state: dict[str, Tensor], *, trust_code: bool) -> Match:
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
        same = match.classes == len(folder.listing.classes)
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
    known = published(arch)
    if known is not None and folder.pixel == RGB:
        yield known
    if known is not None and foreign(arch):
        for normalize in (IMAGENET, HALVES, NONE, BYTES):
            yield known._replace(normalize=normalize)
        return
    side = min(int(statistics.median(folder.sides)), known.size if known else 224)
    size = max(32, side // 32 * 32)
    tried: Sequence[tuple[tuple[float, ...], tuple[float, ...]]] = (IMAGENET, HALVES, NONE)
    if folder.pixel != RGB:
        n = folder.pixel.channels
        tried = (measured(folder, size), ((0.5,) * n, (0.5,) * n), ((0.0,) * n, (1.0,) * n))
    for pair in tried:
        yield Published(size, 1.0, pair)


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
        right += found.numpy() == int(judging.labels[index])
        seen += 1
    alone, mirrored = (right / max(seen, 1)).tolist()
    return alone, mirrored


@dataclass(frozen=True)
class Clock:
    """Seconds for one image here, in batches: the network forward, and a training step."""

    forward: float
    step: float


def timed(model: nn.Module, shape: Shape) -> Clock:
    """Time a few steps."""
    model = model.train().to(memory_format=torch.channels_last)
    images = torch.randn(STEP, *shape).to(memory_format=torch.channels_last)
    forward, step = list[float](), list[float]()
    for _ in range(STEPS):
        start = time.perf_counter()
        with torch.no_grad():
            teacher = model(images)
        answered = time.perf_counter()
        F.mse_loss(model(images), teacher).backward()
        forward.append(answered - start)
        step.append(time.perf_counter() - answered)
    return Clock(min(forward[1:]) / STEP, min(step[1:]) / STEP)


def run_seconds(folder: Folder, network: Network, clock: Clock) -> tuple[float, float]:
    """Return about what the training of a run takes, and all its other stages: prune, ptq, export, bench."""
    source, distill, qat = epochs(folder, network)
    student = KEPT * clock.step + VIEW_S  # the recipe halves the network's work; with a latency it is anyone's guess
    training = folder.train * (
        source * (clock.step + VIEW_S)
        + distill * student
        + qat * QAT_STEPS * student
        + min(distill, CACHED) * clock.forward
    )
    return training, OTHERS_S + SCORED * clock.forward


def draft(
    weights: str,
    data: Path,
    name: str,
    folder: Folder,
    network: Network,
    *,
    macs: float,
    latency_ms: float | None,
    trust_code: bool,
) -> str:
    """Return the recipe's text."""
    source, distill, qat = epochs(folder, network)
    goal = f"max_latency_ms: {latency_ms:g}" if latency_ms else "keep_macs: 0.5"
    whole = strict_yaml.dump({"arch": network.arch}).splitlines()
    quoted = strict_yaml.dump({"path": str(data), "weights": weights}).splitlines()
    fine_tune = [
        "    fine_tune: true",
        f"    fit: {{epochs: {source}, batch_size: 32, lr: 0.01, warmup_epochs: 0.5}}",
    ]
    lines = [
        f"# {network.arch} with your weights, for the {len(folder.listing.classes):,} classes of {data}. Written by compress init.",
        f"# Command:  compress run FILE{' --trust-code' if trust_code else ''}",
        f"name: {_name(name)}",
        "data:",
        "  dataset: imagefolder",
        f"  {quoted[0]}",
        *(
            [f"  channels: {len(network.mean)}  # {folder.pixel.bits} bits, as the files have"]
            if len(network.mean) != 3
            else []
        ),
        f"  image_size: {network.size}",
        f"  resize: {network.resize:.4g}  # resize the shorter side to this times image_size, then crop the centre",
        f"  mean: [{', '.join(f'{value:g}' for value in network.mean)}]",
        f"  std: [{', '.join(f'{value:g}' for value in network.std)}]",
        *(["  skip_broken: true  # some images cannot be read"] if folder.broken else []),
        f"  augment: {{crop: {'random_resized' if network.size > 64 else 'pad'}, flip: {str(network.flip).lower()}}}  # flip: false if mirrored images are not valid",
        "model:",
        *([f"  {whole[0]}"] if foreign(network.arch) else [f"  arch: {network.arch}", f"  {quoted[1]}"]),
        *(["  reset_head: true  # the weights are for other classes"] if source else []),
        "stages:",
        "  - stage: source",
        *(fine_tune if source else []),
        "  - stage: prune",
        f"    {goal}",
        "  - stage: distill  # low rate: the network is trained already",
        f"    fit: {{epochs: {distill}, batch_size: 32, lr: 0.01, warmup_epochs: 0.5, clip_norm: 1.0}}",
        "    loss:",
        "      - {name: kd, temperature: 2.0}",
        "  - stage: ptq",
        "  - stage: qat",
        f"    fit: {{epochs: {qat}, batch_size: 32, lr: 0.0005, clip_norm: 1.0}}",
        "  - stage: export",
        "  - stage: bench",
        "targets:  # a miss ends the run with exit code 1",
        "  max_drop: 0.02",
        *([f"  max_latency_ms: {latency_ms:g}"] if latency_ms else []),
        *(["  min_speedup: 2.0"] if not latency_ms and macs >= WORTH_SPEED else []),
    ]
    return "\n".join(lines) + "\n"


def _name(text: str) -> str:
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in text.lower()).strip("_")
    return (kept or "mine")[:64]


def _told(weights: str, folder: Folder, network: Network) -> Iterator[str]:
    """Yield lines on what was found."""
    fits = f"; {', '.join(network.others)} would fit too" if network.others else ""
    yield f"weights  {weights}: {network.arch} for {network.classes:,} classes{fits}"
    listing = folder.listing
    counts = np.bincount(folder.images().labels.numpy(), minlength=len(listing.classes))
    held = "a fifth is held out" if listing.val is None else f"{len(listing.val):,} for validation"
    yield (
        f"images   {listing.root}: {len(listing.classes):,} classes, {len(listing.train):,} images ({held}), "
        f"{counts.min():,} to {counts.max():,} a class, shorter sides {min(folder.sides)} to {max(folder.sides)} pixels"
    )
    if folder.stored.most_common(1)[0][0].channels != 3 or folder.pixel != RGB:
        kinds = ", ".join(f"{number:,} of {pixel}" for pixel, number in folder.stored.most_common())
        taken = (
            "read as colours of 8 bits, as the weights take them" if folder.pixel == RGB else f"read as {folder.pixel}"
        )
        yield f"         opened: {kinds}; {taken}"
    if counts.max() > 10 * counts.min():
        yield "         the classes are imbalanced: read the report's table of classes, and set targets.max_class_drop"
    if folder.broken:
        yield f"         {describe_broken(folder.broken, len(folder.sides) + len(folder.broken))}: left out (skip_broken)"
    normalize = "/".join(f"{value:g}" for value in network.mean)
    yield f"seen at  {network.size} pixels, mean {normalize}" + (
        f": {network.score:.1%} of {min(JUDGED, len(folder.images(judged=True)))} images are labelled right"
        if network.score is not None
        else ""
    )
    if not network.flip:
        yield f"         mirrored {network.mirrored:.1%} of them: left and right differ, so augment.flip is false"
    if network.score is None:
        yield f"         the weights are for {network.classes:,} classes, the folder has {len(listing.classes):,}: the classifier is trained anew"
    elif network.score < 3 / len(listing.classes):
        yield "         that is little more than chance: check the order of the classes, mean and std, or name the network with --arch"


def _estimated(folder: Folder, network: Network, model: nn.Module, clock: Clock) -> Iterator[str]:
    """Yield a line on the time, memory and disk space that a run will take."""
    training, others = run_seconds(folder, network, clock)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB; Linux counts in KB
    yield (
        f"takes    about {_spoken(training + others)} here with nothing beside, {_spoken(training)} of them training; {peak:.1f} GB of memory or more, {max(10 * weights, 0.1):.1f} GB of disk; "
        f"INT8 for {host_target().name}"
    )


def _spoken(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    number, unit = (minutes, "minute") if minutes < 120 else (round(minutes / 60), "hour")
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def epochs(folder: Folder, network: Network) -> tuple[int, int, int]:
    """Return the epochs for the source (0 if its classes are the folder's), for distillation and for QAT."""
    distill = min(max(round(VIEWS / folder.train), 2), 30)
    return (distill if network.score is None else 0), distill, max(1, distill // 4)
