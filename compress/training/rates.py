"""A training's rate: its schedule, and a test that finds its size.

The test trains briefly at a few parts of `fit.lr`, each from the start, and compares the losses on held-out images. Unlike the range test of Smith 2017 (Cyclical Learning Rates, section 3.3), whose one rate rises while the training loss is watched, each
trial is a training of its own whose rate falls to 0, since it is the end of a training that counts.
"""

import bisect
import math
from collections.abc import Callable

from compress.recipe.stages import Fit
from compress.training.checkpoint import Progress

PARTS = (3.0, 1.0, 0.3, 0.1)  # of `fit.lr`
SHARE = 0.04  # of the training's steps, for each trial
FEWEST = 20  # steps of a trial
WARM_UP = 0.1  # of a trial's steps


def learning_rate(settings: Fit, step: int, steps_per_epoch: int) -> float:
    """Return a step's rate: linear warm-up, then milestones or a cosine to 0 (Loshchilov & Hutter 2017, eq. 5)."""
    warm_up, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warm_up:
        return settings.lr * min((step + 1) / warm_up, 1.0)
    if settings.schedule == "step":
        return settings.lr * settings.gamma ** bisect.bisect_right(settings.milestones, step // steps_per_epoch)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def find_rate_(
    progress: Progress,
    settings: Fit,
    steps_per_epoch: int,
    trial: Callable[[Fit, int], float],
    tell: Callable[[str], None],
) -> bool:
    """Choose the part of `fit.lr` of a new training by trials, where the settings ask for it; return whether any was made.

    `trial` (settings, number of steps) returns the held-out loss at the end, and undoes its training. A resumed training keeps its
    checkpoint's choice, so the checkpoint must be saved after trials.
    """
    if not settings.range_test or progress.rate:
        return False
    steps = max(FEWEST, round(SHARE * settings.epochs * steps_per_epoch))
    losses = dict[float, float]()
    for part in PARTS:
        rate = settings.model_copy(
            update={"epochs": 1, "lr": part * settings.lr, "warmup_epochs": WARM_UP, "schedule": "cosine"}
        )
        loss = trial(rate, steps)
        losses[part] = math.inf if math.isnan(loss) else loss
    progress.rate = min(sorted(losses), key=losses.__getitem__)
    found = ", ".join(f"{loss:.4g} at {part * settings.lr:.3g}" for part, loss in losses.items())
    tell(f"rate {progress.rate * settings.lr:.3g}, found by {steps} steps each: loss on held-out images {found}")
    return True
