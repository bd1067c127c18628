"""Estimate what a run will take, from a few timed steps."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from compress.commands.init.images import Folder
from compress.commands.init.network import Network
from compress.recipe.schema import TeacherCache
from compress.training.loop import place_
from export.images.size import Shape

STEP, STEPS = 32, 4  # images in a timed step, and timed steps
# A run's costs, roughly: three whole runs took 0.4 to 1.7 times as much of a core's time (docs/results.md).
KEPT = 0.5  # of the teacher's work, the student's
CACHED = TeacherCache().views  # the teacher predicts each view once
VIEW_S = 0.0003  # to draw an image's view, and a step's costs besides the network
QAT_STEPS = 2  # a QAT step in float steps
OTHERS_S, SCORED = 100, 10_000  # stages without training: seconds, and images that they score
VIEWS = 60_000  # augmented views for distillation: 8 epochs of 7,500 images


@dataclass(frozen=True)
class Clock:
    """Seconds for one image here, in batches: the network forward, and a training step."""

    forward: float
    step: float


def timed(model: nn.Module, shape: Shape) -> Clock:
    """Time a few steps."""
    place_(model.train(), torch.device("cpu"))
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


def epochs(folder: Folder, network: Network) -> tuple[int, int, int]:
    """Return the epochs for the source (0 if its classes are the folder's), for distillation and for QAT."""
    distill = min(max(round(VIEWS / folder.train), 2), 30)
    return (distill if network.score is None else 0), distill, max(1, distill // 4)
