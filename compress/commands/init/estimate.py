"""Plan what a run can train in the time that is given, from a few timed steps and what whole runs took."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from compress.commands.init.images import Folder
from compress.commands.init.ways import Network
from compress.errors import CompressError
from compress.models.saved import example_images
from compress.models.structure import classifier, width_cost
from compress.pruning.plan import cut_
from compress.pruning.planner import cuts_to, options_of_uncut
from compress.recipe.schema import TeacherCache
from compress.recipe.stages import Fit
from compress.training.device import place_
from compress.training.speed import AUTOCAST, precisions
from export.images.size import Shape

PIXELS = 32 * 128**2  # of all images in a timed step, which has fewer images where they are larger
STEPS = 3  # of which the fastest counts
HALF = 0.5  # of the multiply-accumulates is kept
# A run's costs, roughly: docs/results.md has whole runs and what was said before them.
CACHED = TeacherCache().views  # the teacher predicts each view once
VIEW_S = 0.0003  # to draw an image's view, and a step's costs besides the network
QAT_STEPS = 1.5  # a QAT step in float32 steps
SETTLED = 5_000  # images at the student's speed an epoch for batch-norms' statistics and for its judges
START_S = 20  # libraries, the images' digests, the rehearsal
SOLVED, SOLVED_FROM = 10_000, 640  # images at the teacher's speed to score channels and solve weights, from the latter
SOLVED_S, QUANTIZED_S, EXPORTED_S = 0.25, 1.0, 0.5  # a layer besides, for the INT8 candidates, and in each export
QUANTIZED, QUANTIZED_FROM = 13_000, 512  # images at the student's speed for ranges and each layer's damage
CANDIDATES, TUNING = 4, 2_000  # which are scored on these images, and on the validation images
TIMED_S = 30  # seconds that bench and export take besides
EXPORTED = 1_500  # images at the student's speed for proofs
VIEWS = 60_000  # augmented views for distillation: 8 epochs of 7,500 images
WORTH = 0.3  # of these views at least, two epochs (docs/training.md)
LONGER = 3  # times these views for a night
SOURCE_SHARE = 0.5  # of the time, for a teacher that is trained first


class StepTime(NamedTuple):
    """Seconds for one image here, in batches, and the part of the machine that they got.

    `half` is a network with half of the multiply-accumulates, which `step` trains as the precision is fastest, `exact` in float32.
    """

    forward: float
    half: float
    step: float
    exact: float
    layers: int  # of the network
    share: float = 1.0

    @property
    def whole_step(self) -> float:
        """Seconds for an image in a training of the whole network."""
        return self.step * self.forward / self.half


class Training(NamedTuple):
    """Epochs of a run's trainings, 0 for none, and its seconds by stage on this machine when idle."""

    source: int
    distill: int
    qat: int
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())


def halved(model: nn.Module, shape: Shape) -> nn.Module:
    """Return a copy with half of the multiply-accumulates, its smallest weights cut; a whole one where it cannot be cut so far."""
    student, images = copy.deepcopy(model), example_images(shape)
    with suppress(CompressError):
        options = options_of_uncut(
            student, images, "l2", exclude=(classifier(student, shape),), scope="global", round_to=8, min_keep=0.1
        )
        cut_(student, images, cuts_to(HALF, options, width_cost(student, options.layers, "macs", shape)))
    return student


def timed(model: nn.Module, shape: Shape, batch: int) -> StepTime:
    """Time the network, and training steps of its half in each precision that a training tries, for `batch` images."""
    cpu, layers = torch.device("cpu"), sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    student = place_(halved(model, shape), cpu)
    place_(model, cpu)
    count = max(2, min(batch, PIXELS // (shape[1] * shape[2])))
    images = torch.randn(count, *shape).to(memory_format=torch.channels_last)
    began, work = time.perf_counter(), time.process_time()

    def fastest(call: Callable[[], object]) -> float:
        """Return seconds for an image; the first call warms up."""
        times = list[float]()
        for _ in range(STEPS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times) / count

    def step(dtype: torch.dtype | None) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = student(images)
        output.float().square().mean().backward()

    with torch.no_grad():
        forward, half = (fastest(partial(network.eval(), images)) for network in (model, student))
    student.train()
    steps = [fastest(partial(step, AUTOCAST[name])) for name in precisions(Fit(epochs=1), cpu)]  # float32 is the first
    share = (time.process_time() - work) / (time.perf_counter() - began) / torch.get_num_threads()
    return StepTime(forward, half, min(steps), steps[0], layers, min(share, 1.0))


def epochs(images: int) -> int:
    """Return the usual epochs of distillation on so many images."""
    return min(max(round(VIEWS / images), 2), 30)


def costs(folder: Folder, clock: StepTime, source: int, distill: int, qat: int) -> dict[str, float]:
    """Return about what each stage takes in seconds."""
    forward, train, val = clock.forward, folder.train, folder.val
    student, judged = clock.step + VIEW_S, val * clock.half
    found = {"source": START_S + val * forward + source * (train * (clock.whole_step + VIEW_S) + val * forward)}
    found["prune"] = SOLVED * min(train / SOLVED_FROM, 1) * forward + SOLVED_S * clock.layers + 2 * judged
    if distill:
        taught = distill if folder.task in ("segmentation", "detection") else min(distill, CACHED)
        settled = min(train, SETTLED) * clock.half
        found["distill"] = distill * (train * student + judged + settled) + taught * train * forward
    quantized = QUANTIZED * min(train / QUANTIZED_FROM, 1) + CANDIDATES * (min(train, TUNING) + val)
    found["ptq"] = QUANTIZED_S * clock.layers + quantized * clock.half
    if qat:
        found["qat"] = qat * (train * (QAT_STEPS * clock.exact + VIEW_S) + judged)
    found["export and bench"] = TIMED_S + EXPORTED_S * clock.layers + EXPORTED * clock.half + val * 2 * forward
    return found


def planned(folder: Folder, network: Network, clock: StepTime, seconds: float, *, longer: int = 1) -> Training:
    """Return the trainings that fit into the time: usually distillation and QAT, none where too little time is left for them.

    A network for other classes is trained on the folder's first. `longer` is the most, in usual trainings.
    """
    clock = clock._replace(
        **{name: getattr(clock, name) * clock.share for name in ("forward", "half", "step", "exact")}
    )
    usual = epochs(folder.train)

    def price(source: int, distill: int, qat: int) -> float:
        return sum(costs(folder, clock, source, distill, qat).values())

    source = 0
    if network.score is None and folder.is_labelled and not _knows(network, folder):
        each = price(1, 0, 0) - price(0, 0, 0)
        source = max(2, min(usual * longer, int(SOURCE_SHARE * (seconds - price(0, 0, 0)) / each)))
    most, least = usual * longer, max(2, round(WORTH * usual))
    for distill in range(most, least - 1, -1):
        qat = max(1, distill // 4)
        if price(source, distill, qat) <= seconds:
            return Training(source, distill, qat, costs(folder, clock, source, distill, qat))
    return Training(source, 0, 0, costs(folder, clock, source, 0, 0))


def _knows(network: Network, folder: Folder) -> bool:
    return network.classes == len(folder.listing.classes)
