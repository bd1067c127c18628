"""Write recipes for a checkpoint and a folder of images, from what the files tell and stated assumptions."""

import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from compress.commands.init.detector import is_detector, write_detector
from compress.commands.init.draft import Draft, batch_of, recipe
from compress.commands.init.estimate import LONGER, StepTime, Training, planned, timed
from compress.commands.init.images import Folder, as_taken, look_at, task_of_images
from compress.commands.init.network import brought_by, kind_of, matches
from compress.commands.init.ways import Network, choose
from compress.errors import CompressError
from compress.models.outputs import signature_of
from compress.models.recognize import Match
from compress.models.structure import count
from compress.models.weights import read_state
from compress.recipe.read import read_recipe
from export.command.files import write_text
from export.images.decode import RGB, describe_broken
from export.images.size import said
from export.onnx_file.targets import host_target
from export.tasks import TASKS

NIGHT_S = 8 * 3600
BUSY = 0.8  # a smaller part of the threads' time says that the machine has other work
MORE_COMMON = 10  # times the images of the rarest class
COUNTED = {"segmentation": "with masks", "detection": "with boxes", "multilabel": "with labels"}


def write_draft(
    weights: str,
    data: Path,
    out: Path,
    *,
    arch: str | None,
    latency_ms: float | None,
    minutes: float,
    trust_code: bool,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Write a commented recipe that takes `minutes` to `out`, one for a night beside it, and yield lines on what was found and assumed.

    Each line comes as soon as it is known; `tell` gets what is done meanwhile. Raises CompressError if a recipe exists, no known network
    fits the checkpoint, or the folder cannot be read.
    """
    night = out.with_stem(f"{out.stem}_night")
    for file in (out, night):
        if file.exists():
            raise CompressError(f"{file}: exists already: give another file with -o, or remove it")
    tell("reads the weights")
    whole = brought_by(weights)
    if (detector := whole or arch) is not None and is_detector(detector, data):
        yield from write_detector(detector, weights, data, out, tell=tell)
        return
    state = read_state(weights) if whole is None else {}
    fitting = matches(weights, state, arch, trust_code=trust_code)
    first = next(fitting)
    kind = kind_of(first, trust_code=trust_code)
    tensors = f", which gives {', '.join(first.outputs or ['tensors'])}" if kind == "tensors" else ""
    yield f"weights  {weights}: {first.arch}{tensors or f' for {first.classes:,} classes'}"
    tell("looks at the images")
    task = task_of_images(data, first, kind, weights)
    folder = as_taken(look_at(data, task), first.channels, weights)
    yield from _images(folder)
    if whole and folder.is_labelled and first.classes != len(folder.listing.classes):
        raise CompressError(
            f"{weights}: has {first.classes:,} classes, {data} has {len(folder.listing.classes):,}, and a whole network keeps its "
            "classifier: give images of its classes, or name it as `teacher` with its `classes` in a recipe (of outputs that are no classes, "
            "as model.arch with `task: tensors`)"
        )
    network, model = choose(fitting, first, weights, folder, tell, trust_code=trust_code)
    yield from _seen(first, folder, network)
    tell(f"times a training step at {said(network.way.image_size)} pixels")
    macs, clock = count(model, network.shape).macs, timed(model, network.shape, batch_of(folder.task))
    several = signature_of(model, network.shape) if folder.task == "tensors" else ()
    names = first.outputs or tuple(one.name for one in several)
    given = Draft(weights, data, folder, network, model, macs, latency_ms, trust_code, names, first.others)
    plan = planned(folder, network, clock, 60 * minutes)
    longer = planned(folder, network, clock, NIGHT_S, longer=LONGER)
    _write(out, given, plan)
    yield from _estimated(given, plan, clock, minutes)
    trust = " --trust-code" if trust_code else ""
    yield f"wrote    {out}; run it with: compress run {out}{trust}"
    if longer != plan and longer.distill:
        _write(night, given, longer)
        yield f"wrote    {night} for a night: {longer.distill} epochs of distillation, {longer.qat} for INT8, about {_spoken(longer.total)}"


def _write(file: Path, given: Draft, plan: Training) -> None:
    write_text(file, recipe(given, plan, _name(file.stem)))
    try:
        read_recipe(file)
    except CompressError:  # such as a latency below zero
        file.unlink()
        raise


def _name(text: str) -> str:
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in text.lower()).strip("_")
    return (kept or "mine")[:64]


def _images(folder: Folder) -> Iterator[str]:
    """Yield lines on the images."""
    listing = folder.listing
    held = "a fifth is held out" if listing.val is None else f"{len(listing.val):,} for validation"
    counts = np.bincount(folder.images().labels.numpy().clip(0), minlength=len(listing.classes))
    by_class = folder.task == "classification"
    kind = f" {COUNTED[folder.task]}" if folder.task in COUNTED else ""
    yield (
        f"images   {listing.root}: "
        + (
            f"{len(listing.classes):,} classes, "
            if folder.is_labelled
            else ""
            if folder.task == "tensors"
            else "no class folders, so no labels, "
        )
        + f"{len(listing.train):,} images{kind} ({held}), "
        + (f"{counts.min():,} to {counts.max():,} a class, " if by_class else "")
        + f"shorter sides {min(folder.sides)} to {max(folder.sides)} pixels"
    )
    if folder.stored.most_common(1)[0][0].channels != 3 or folder.pixel != RGB:
        kinds = ", ".join(f"{number:,} of {pixel}" for pixel, number in folder.stored.most_common())
        taken = (
            "read as colours of 8 bits, as the weights take them" if folder.pixel == RGB else f"read as {folder.pixel}"
        )
        yield f"         opened: {kinds}; {taken}"
    if by_class and counts.max() > MORE_COMMON * counts.min():
        yield "         the classes are imbalanced: read the report's table of classes, and set targets.max_class_drop"
    if folder.ignored is not None:
        yield f"         the masks have {folder.ignored}, which is none of the classes: ignored (data.ignore_index)"
    if folder.broken:
        yield f"         {describe_broken(folder.broken, len(folder.sizes) + len(folder.broken))}: left out (skip_broken)"


def _seen(first: Match, folder: Folder, network: Network) -> Iterator[str]:
    """Yield lines on how the network sees images: what was tried, and what was chosen."""
    metric, way = TASKS[folder.task].metric, network.way
    if network.others:
        yield f"         {', '.join(network.others)} would fit too, but not better"
    if network.arch != first.arch:
        yield f"         {network.arch} scores better than {first.arch}, and is taken"
    normalize = "/".join(f"{value:.4g}" for value in way.mean)
    if len(network.tried) > 1:
        yield f"tried       pixels      work  {metric.title:>8}  images"
        for one in sorted(network.tried, key=lambda one: one.macs):
            chosen = "  <- the cheapest within a point of the best" if one.way.image_size == way.image_size else ""
            pixels, work = said(one.way.image_size), one.macs / min(other.macs for other in network.tried)
            yield f"         {pixels:>9}  {work:7.1f}x  {one.score:8.1%}  {one.images:6}{chosen}"
    scored = ""
    if folder.is_labelled and network.score is not None:
        right = "labelled right" if metric.counts_images else metric.title
        scored = f": {network.score:.1%} of {network.judged} images are labelled right"
        if not metric.counts_images:
            scored = f": {right} {network.score:.1%} on {network.judged} images"
    yield f"seen at  {said(way.image_size)} pixels, mean {normalize}{scored}"
    if not network.flip:
        alike = "of them" if folder.is_labelled else "of its predictions stay the same"
        yield f"         mirrored {network.mirrored:.1%} {alike}: left and right differ, so augment.flip is false"
    if folder.task == "tensors":
        yield "         what it computes is the truth, whatever it means (task: tensors); a wrong size or mean would not show"
    elif not folder.is_labelled:
        yield "         nothing here tells whether that is how it was trained; its predictions are the labels (task: unlabelled; tensors if they are no classes)"
    elif network.classes != len(folder.listing.classes):
        yield f"         the weights are for {network.classes:,} classes, the folder has {len(folder.listing.classes):,}: the classifier is trained anew"
    elif network.score is None:
        yield "         too large to try sizes here: set data.image_size to the size that it was trained at"
    elif metric.counts_images and network.score < _by_chance(len(folder.listing.classes), network.judged):
        yield "         that is little more than chance: check the order of the classes, mean and std, or name the network with --arch"


def _by_chance(classes: int, images: int) -> float:
    """Return three standard deviations above the score of guessing."""
    return 1 / classes + 3 * math.sqrt((1 - 1 / classes) / classes / max(images, 1))


# What whole runs gave (docs/results.md): networks of photographs cut to half of their multiply-accumulates.
LIKELY = {
    "prune": "cut to half and solved: 1.0 points lost by a ResNet-50, 1.1 by a ResNet-18, 2.3 by a MobileNetV2",
    "distill": "a ResNet-18 cut to 0.38 of its time regained 4 points in eight epochs, a ResNet-50 cut to half nothing certain; the solve is kept where held-out images see no clear gain",
    "ptq": "INT8 by calibration: at most 0.5 points lost, more where layers are depthwise; two to three and a half times as fast",
    "qat": "INT8 trained: what calibration lost comes back",
}


def _estimated(given: Draft, plan: Training, clock: StepTime, minutes: float) -> Iterator[str]:
    """Yield lines on the time of each stage, what it is likely to give, memory and disk space."""
    if plan.source:
        yield f"plan     {plan.source} epochs for the new classifier come first"
    if plan.distill:
        yield f"plan     {plan.distill} epochs of distillation and {plan.qat} for INT8, as {minutes:g} minutes allow"
    else:
        yield f"plan     no distillation and no training for INT8: in {minutes:g} minutes they would be too short to gain anything over the solve"
    for stage, seconds in plan.seconds.items():
        likely = (
            f"  {LIKELY[stage]}" if stage in LIKELY and given.folder.task in ("classification", "unlabelled") else ""
        )
        yield f"         {stage:16} {_spoken(seconds):>11}{likely}"
    weights = sum(parameter.numel() for parameter in given.model.parameters()) * 4 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB; Linux counts in KB
    busy = f", {_spoken(plan.total / clock.share)} as busy as it is now" if clock.share < BUSY else ""
    yield (
        f"takes    about {_spoken(plan.total)} on this machine if it is idle{busy}; {peak:.1f} GB of memory or more, "
        f"{max(10 * weights, 0.1):.1f} GB of disk; INT8 for {host_target().name}"
    )


def _spoken(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    number, unit = (minutes, "minute") if minutes < 120 else (round(minutes / 60), "hour")
    return f"{number:,} {unit}{'' if number == 1 else 's'}"
