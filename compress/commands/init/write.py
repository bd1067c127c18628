"""Write a recipe for a checkpoint and a folder of images, from what the files tell and stated assumptions."""

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.commands.init.estimate import Clock, epochs, run_seconds, timed
from compress.commands.init.images import Folder, as_taken, look_at, refuse_other_tasks
from compress.commands.init.network import JUDGED, Network, brought_by, choose, given, whole_match
from compress.data.teachers import foreign
from compress.errors import CompressError
from compress.models.architectures import build
from compress.models.recognize import recognize
from compress.models.structure import count
from compress.models.weights import read_state
from compress.recipe import strict_yaml
from compress.recipe.read import read_recipe
from export.command.files import write_text
from export.images.decode import RGB, describe_broken
from export.onnx_file.targets import host_target

# Multiply-accumulates; with fewer a call takes microseconds, and quantizing can take more than it saves.
WORTH_SPEED = 50e6


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
    if whole:
        matches = [whole_match(whole)]
    else:
        matches = [given(arch, state, trust_code=trust_code)] if arch else recognize(state)
    if not matches:
        raise CompressError(
            f"{weights}: none of the networks of torchvision, timm or the CIFAR papers has its {len(state):,} tensors "
            f"({', '.join(list(state)[:3])}, …): name yours with --arch my_file.py:factory --trust-code"
        )
    folder = as_taken(look_at(data), matches[0].channels, weights)
    if whole and folder.is_labelled and matches[0].classes != len(folder.listing.classes):
        raise CompressError(
            f"{weights}: has {matches[0].classes:,} classes, {data} has {len(folder.listing.classes):,}, and a whole network keeps its "
            "classifier: give images of its classes, or name it as `teacher` with its `classes` in a recipe"
        )
    network = choose(matches, weights, folder, trust_code=trust_code)
    yield from _told(weights, folder, network)
    model = build(network.arch, num_classes=network.classes, shape=network.shape, trust_code=trust_code)
    macs, clock = count(model, network.shape).macs, timed(model, network.shape)
    trust = " --trust-code" if trust_code else ""
    lines = [
        f"# {network.arch} with your weights, for the images of {data}. Written by compress init.",
        f"# Command:  compress run FILE{trust}",
        f"name: {_name(out.stem)}",
        *([] if folder.is_labelled else ["task: unlabelled  # the network's predictions are the labels"]),
        *draft(weights, data, folder, network, step=step_of(model), macs=macs, latency_ms=latency_ms),
    ]
    write_text(out, "".join(f"{line}\n" for line in lines))
    try:
        read_recipe(out)
    except CompressError:  # such as a latency below zero
        out.unlink()
        raise
    yield from _estimated(folder, network, model, clock)
    yield f"wrote {out}; run it with: compress run {out}{trust}"


def step_of(model: nn.Module) -> str:
    """Return optimizer and rate for a trained network: without batch-norm, as in an ONNX file, SGD learns less (docs/your_own.md)."""
    return (
        "lr: 0.01"
        if any(isinstance(module, _BatchNorm) for module in model.modules())
        else "optimizer: adamw, lr: 0.001"
    )


def draft(
    weights: str, data: Path, folder: Folder, network: Network, *, step: str, macs: float, latency_ms: float | None
) -> list[str]:
    """Return the recipe's lines after its first ones, which name it."""
    source, distill, qat = epochs(folder, network)
    fine_tune = [
        "    fine_tune: true",
        f"    fit: {{epochs: {source}, batch_size: 32, {step}, warmup_epochs: 0.5}}",
    ]
    if foreign(network.arch):
        model = [_field("arch", network.arch)]
    else:
        model = [f"  arch: {network.arch}", _field("weights", weights)]
    channels = f"  channels: {len(network.mean)}  # {folder.pixel.bits} bits, as the files have"
    crop, flip = "random_resized" if network.size > 64 else "pad", str(network.flip).lower()
    return [
        "data:",
        "  dataset: imagefolder",
        _field("path", str(data)),
        *([channels] if len(network.mean) != 3 else []),
        f"  image_size: {network.size}",
        f"  resize: {network.resize:.4g}  # resize the shorter side to this times image_size, then crop the centre",
        f"  mean: [{', '.join(f'{value:g}' for value in network.mean)}]",
        f"  std: [{', '.join(f'{value:g}' for value in network.std)}]",
        *(["  skip_broken: true  # some images cannot be read"] if folder.broken else []),
        f"  augment: {{crop: {crop}, flip: {flip}}}  # flip: false if mirrored images are not valid",
        "model:",
        *model,
        *(["  reset_head: true  # the weights are for other classes"] if source else []),
        "stages:",
        "  - stage: source",
        *(fine_tune if source else []),
        "  - stage: prune",
        f"    max_latency_ms: {latency_ms:g}" if latency_ms else "    keep_macs: 0.5",
        "  - stage: distill  # low rate: the network is trained already",
        f"    fit: {{epochs: {distill}, batch_size: 32, {step}, warmup_epochs: 0.5, clip_norm: 1.0}}",
        "    loss:",
        "      - {name: kd, temperature: 2.0}",
        "  - stage: ptq",
        "  - stage: qat",
        f"    fit: {{epochs: {qat}, batch_size: 32, lr: 0.0005, clip_norm: 1.0}}",
        "  - stage: export",
        "  - stage: bench",
        "targets:  # a miss ends the run with exit code 1",
        "  max_drop: 0.02" if folder.is_labelled else "  max_drop: 0.1  # agreement with the network: 90 % or more",
        *([f"  max_latency_ms: {latency_ms:g}"] if latency_ms else []),
        *(["  min_speedup: 2.0"] if not latency_ms and macs >= WORTH_SPEED else []),
    ]


def _field(name: str, value: str) -> str:
    return f"  {strict_yaml.dump({name: value}).rstrip()}"


def _name(text: str) -> str:
    kept = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in text.lower()).strip("_")
    return (kept or "mine")[:64]


def _told(weights: str, folder: Folder, network: Network) -> Iterator[str]:
    """Yield lines on what was found."""
    fits = f"; {', '.join(network.others)} would fit too" if network.others else ""
    yield f"weights  {weights}: {network.arch} for {network.classes:,} classes{fits}"
    listing = folder.listing
    counts = np.bincount(folder.images().labels.numpy().clip(0), minlength=len(listing.classes))
    held = "a fifth is held out" if listing.val is None else f"{len(listing.val):,} for validation"
    yield (
        f"images   {listing.root}: "
        + (f"{len(listing.classes):,} classes" if folder.is_labelled else "no class folders, so no labels")
        + f", {len(listing.train):,} images ({held}), "
        + (f"{counts.min():,} to {counts.max():,} a class, " if folder.is_labelled else "")
        + f"shorter sides {min(folder.sides)} to {max(folder.sides)} pixels"
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
        if folder.is_labelled and network.score is not None
        else ""
    )
    if not network.flip:
        alike = "of them" if folder.is_labelled else "of its predictions stay the same"
        yield f"         mirrored {network.mirrored:.1%} {alike}: left and right differ, so augment.flip is false"
    if not folder.is_labelled:
        yield "         nothing here tells whether that is how it was trained; its predictions are the labels (task: unlabelled)"
        return
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
        f"takes    about {_spoken(training + others)} on this machine if it is idle, {_spoken(training)} of them training; {peak:.1f} GB of memory or more, {max(10 * weights, 0.1):.1f} GB of disk; "
        f"INT8 for {host_target().name}"
    )


def _spoken(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    number, unit = (minutes, "minute") if minutes < 120 else (round(minutes / 60), "hour")
    return f"{number:,} {unit}{'' if number == 1 else 's'}"
