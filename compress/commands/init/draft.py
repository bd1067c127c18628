"""The lines of a recipe for a network, a folder of images, and the trainings that a plan has room for."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.commands.init.estimate import Training
from compress.commands.init.images import Folder
from compress.commands.init.ways import Network
from compress.data.teachers import foreign
from compress.models.saved import example_images
from compress.pruning.inside_heads import open_heads_
from compress.recipe import strict_yaml
from export.images.size import written

# Multiply-accumulates; with fewer a call takes microseconds, and quantizing can take more than it saves.
WORTH_SPEED = 50e6
LARGE = 100_000  # pixels of an image; evaluation takes fewer of these at once
TRAINED, SOLVED = 0.02, 0.05  # largest drop: after training, and without
KD = "      - {name: kd, temperature: 2.0}"
LABELS = "      - {name: cross_entropy}"
MSE = "      - {name: mse}  # in units of the outputs' variance"
# What a task adds to a recipe: random changes of images, losses of distillation, and optimizer and rate; None is the classifier's.
AUGMENTS = {
    "segmentation": "{{crop: random_resized, min_area: 0.4, flip: {flip}}}",
    "detection": "{{crop: random_resized, min_area: 0.6, flip: {flip}, distort: true}}",
}
LOSSES = {
    "segmentation": (LABELS, KD),
    "detection": (LABELS, KD, "      - {name: boxes}"),
    "multilabel": (LABELS, KD),
    "tensors": (MSE,),
}
STEPS = {"segmentation": "optimizer: adamw, lr: 0.0005", "detection": "optimizer: adamw, lr: 0.0005"}
QAT_STEPS = {"segmentation": "optimizer: adamw, lr: 0.00005", "detection": "optimizer: adamw, lr: 0.00005"}
BATCHES = {"segmentation": 8, "detection": 8}


@dataclass(frozen=True)
class Draft:
    """What a recipe is written for."""

    weights: str
    data: Path
    folder: Folder
    network: Network
    model: nn.Module
    macs: float
    latency_ms: float | None
    trust_code: bool
    outputs: tuple[str, ...] = ()  # the names of several, or of the one of several
    others: tuple[str, ...] = ()  # of those that are not served

    @property
    def has_heads(self) -> bool:
        """Whether dimensions inside heads of attention can be removed."""
        return open_heads_(copy.deepcopy(self.model), example_images(self.network.shape))


def step_of(model: nn.Module) -> str:
    """Return optimizer and rate for a trained network: without batch-norm, as in an ONNX file, SGD learns less (docs/your_own.md)."""
    return (
        "lr: 0.01"
        if any(isinstance(module, _BatchNorm) for module in model.modules())
        else "optimizer: adamw, lr: 0.001"
    )


def recipe(given: Draft, plan: Training, name: str) -> str:
    """Return a commented recipe as text."""
    network, folder = given.network, given.folder
    trust = " --trust-code" if given.trust_code else ""
    lines = [
        f"# {network.arch} with your weights, for the images of {given.data}. Written by compress init.",
        f"# Command:  compress run FILE{trust}",
        f"name: {name}",
        *_task(folder),
        *_data(given),
        *_model(given),
        "stages:",
        *_stages(given, plan),
        *_targets(given, plan),
    ]
    return "".join(f"{line}\n" for line in lines)


def _task(folder: Folder) -> Sequence[str]:
    if folder.task == "classification":
        return ()
    why = {
        "unlabelled": "  # the network's predictions are the labels",
        "tensors": "  # the truth is what the network computes",
    }
    return (f"task: {folder.task}{why.get(folder.task, '')}",)


def _data(given: Draft) -> Sequence[str]:
    network, folder, way = given.network, given.folder, given.network.way
    size = written(way.image_size)
    large = way.image_size[0] * way.image_size[1] > LARGE
    crop = "random_resized" if min(way.image_size) > 64 else "pad"
    augment = AUGMENTS.get(folder.task, f"{{{{crop: {crop}, flip: {{flip}}}}}}").format(flip=str(network.flip).lower())
    return [
        "data:",
        "  dataset: imagefolder",
        _field("path", str(given.data)),
        *(
            [f"  channels: {len(way.mean)}  # {folder.pixel.bits} bits, as the files have"]
            if len(way.mean) != 3
            else []
        ),
        f"  image_size: {size}" + ("" if isinstance(size, int) else "  # height, width"),
        *(
            [
                f"  resize: {network.resize:.4g}  # resize the shorter side to this times image_size, then crop the centre"
            ]
            if not way.stretch
            else ["  framing: stretch  # to image_size, whatever an image's proportions"]
            if folder.task != "detection"
            else []
        ),
        *([f"  interpolation: {way.look.interpolation}"] if way.look.interpolation != "bilinear" else []),
        *(["  colors: bgr"] if way.look.bgr else []),
        f"  mean: [{', '.join(f'{value:g}' for value in way.mean)}]",
        f"  std: [{', '.join(f'{value:g}' for value in way.std)}]",
        *([f"  ignore_index: {folder.ignored}  # in the masks, but none of the classes"] if folder.ignored else []),
        *(["  skip_broken: true  # some images cannot be read"] if folder.broken else []),
        *(["  eval_batch_size: 16"] if large else []),
        f"  augment: {augment}  # flip: false if mirrored images are not valid",
    ]


def batch_of(task: str) -> int:
    """Return the images in a training's step."""
    return BATCHES.get(task, 32)


def _model(given: Draft) -> Sequence[str]:
    network = given.network
    others = given.folder.is_labelled and network.classes != len(given.folder.listing.classes)
    weights = [] if foreign(network.arch) else [_field("weights", given.weights)]
    reset = ["  reset_head: true  # the weights are for other classes"] if others else []
    beside = f"  # it also gives {', '.join(given.others)}" if given.others else ""
    outputs = [f"  outputs: [{', '.join(given.outputs)}]{beside}"] if given.outputs else []
    return ["model:", _field("arch", network.arch), *weights, *outputs, *reset]


def _stages(given: Draft, plan: Training) -> Sequence[str]:
    task = given.folder.task
    step, size = STEPS.get(task, step_of(given.model)), batch_of(task)
    goal = f"max_latency_ms: {given.latency_ms:g}" if given.latency_ms else "keep_macs: 0.5"
    source = [
        "    fine_tune: true",
        f"    fit: {{epochs: {plan.source}, batch_size: {size}, {step}, warmup_epochs: 0.5}}",
    ]
    distill = [
        "  - stage: distill  # low rate: the network is trained already",
        f"    fit: {{epochs: {plan.distill}, batch_size: {size}, {step}, warmup_epochs: 0.5, clip_norm: 1.0}}",
        "    loss:",
        *LOSSES.get(task, (KD,)),
    ]
    qat = [
        "  - stage: qat",
        f"    fit: {{epochs: {plan.qat}, batch_size: {size}, {QAT_STEPS.get(task, 'lr: 0.0005')}, clip_norm: 1.0}}",
        *(["    loss:", *LOSSES[task]] if task in ("detection", "tensors") else []),
    ]
    return [
        "  - stage: source",
        *(source if plan.source else []),
        "  - stage: prune  # and solve the weights to make up for it, without training",
        f"    {goal}",
        *(["    inside_heads: true  # of attention, rather than whole heads"] if given.has_heads else []),
        *(distill if plan.distill else []),
        "  - stage: ptq",
        *(qat if plan.qat else []),
        "  - stage: export",
        "  - stage: bench",
    ]


def _targets(given: Draft, plan: Training) -> Sequence[str]:
    latency = given.latency_ms
    kept = "explained variance" if given.folder.task == "tensors" else "agreement with the network"
    drop = f"  max_drop: {TRAINED if plan.distill else SOLVED:g}"
    return [
        "targets:  # a miss ends the run with exit code 1",
        drop if given.folder.is_labelled else f"  max_drop: 0.1  # {kept}: 90 % or more",
        *([f"  max_latency_ms: {latency:g}"] if latency else []),
        *(["  min_speedup: 2.0"] if not latency and given.macs >= WORTH_SPEED else []),
    ]


def _field(name: str, value: str) -> str:
    return f"  {strict_yaml.dump({name: value}).rstrip()}"
