"""Plan what a run can train in the time that is given, from a few timed steps and what whole runs took."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from compress.commands.init.images import Folder
from compress.commands.init.ways import Network
from compress.recipe.schema import TeacherCache
from compress.training.device import place_
from export.images.size import Shape

STEP = 8  # images in a timed step
# A run's costs, roughly: docs/results.md has whole runs and what was said before them.
KEPT = 0.5  # of the teacher's work, the student's
CACHED = TeacherCache().views  # the teacher predicts each view once
VIEW_S = 0.0003  # to draw an image's view, and a step's costs besides the network
QAT_STEPS = 2  # a QAT step in float steps
START_S = 20  # libraries, the images' digests, the rehearsal
SOLVED, SOLVED_FROM = (
    5_000,
    640,
)  # images whose forward pass takes as long as scoring channels and solving the weights, from the latter
QUANTIZED_S = 20  # to build the INT8 candidates
QUANTIZED = 28_000  # images at the student's speed, for their ranges and each layer's damage
CANDIDATES, TUNING = 6, 2_000  # which are scored on these images, and on the validation images
TIMED_S = 45  # seconds that bench and export take besides their images
EXPORTED = 1_500  # images at the student's speed for proofs
VIEWS = 60_000  # augmented views for distillation: 8 epochs of 7,500 images
WORTH = 0.5  # of these views; with fewer a large network ends below the solve (docs/results.md)
LONGER = 3  # times these views for a night
SOURCE_SHARE = 0.5  # of the time, for a teacher that is trained first


class StepTime(NamedTuple):
    """Seconds for one image here, in batches: the network forward, and a training step; and the part of the machine that they got."""

    forward: float
    step: float
    share: float = 1.0


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


def timed(model: nn.Module, shape: Shape) -> StepTime:
    """Time two steps, the first of which warms up."""
    place_(model.train(), torch.device("cpu"))
    images = torch.randn(STEP, *shape).to(memory_format=torch.channels_last)
    forward = step = share = 0.0
    for _ in range(2):
        start, work = time.perf_counter(), time.process_time()
        with torch.no_grad():
            teacher = model(images)
        answered = time.perf_counter()
        F.mse_loss(model(images), teacher).backward()
        ended = time.perf_counter()
        forward, step = answered - start, ended - answered
        share = (time.process_time() - work) / (ended - start) / torch.get_num_threads()
    model.eval()
    return StepTime(forward / STEP, step / STEP, min(share, 1.0))


def epochs(images: int) -> int:
    """Return the usual epochs of distillation on so many images."""
    return min(max(round(VIEWS / images), 2), 30)


def costs(folder: Folder, clock: StepTime, source: int, distill: int, qat: int) -> dict[str, float]:
    """Return about what each stage takes in seconds."""
    forward, train, val = clock.forward, folder.train, folder.val
    student, judged = KEPT * clock.step + VIEW_S, val * KEPT * forward
    found = {"source": START_S + val * forward + source * (train * (clock.step + VIEW_S) + val * forward)}
    found["prune"] = SOLVED * min(train / SOLVED_FROM, 1) * forward + 2 * judged
    if distill:
        taught = distill if folder.task in ("segmentation", "detection") else min(distill, CACHED)
        found["distill"] = distill * (train * student + judged) + taught * train * forward
    found["ptq"] = QUANTIZED_S + (QUANTIZED + CANDIDATES * (min(train, TUNING) + val)) * KEPT * forward
    if qat:
        found["qat"] = qat * QAT_STEPS * (train * student + judged)
    found["export and bench"] = TIMED_S + EXPORTED * KEPT * forward + val * 2 * forward
    return found


def planned(folder: Folder, network: Network, clock: StepTime, seconds: float, *, longer: int = 1) -> Training:
    """Return the trainings that fit into the time: usually distillation and QAT, none where too little time is left for them.

    A network for other classes is trained on the folder's first. `longer` is the most, in usual trainings.
    """
    clock = clock._replace(forward=clock.forward * clock.share, step=clock.step * clock.share)
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
