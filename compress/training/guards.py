"""What a training checks while it runs: memory, finite numbers, and whether to stop early."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.recipe.stages import Stop
from compress.training.checkpoint import Progress

FEWEST_IDLE = 3  # epochs without a gain before a training that is judged ends
CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory")  # a plain RuntimeError says one of these


class NotFiniteError(CompressError):
    """A training whose numbers are not finite at any rate that was tried."""


@contextmanager
def batch_norm_named(phase: str, images: Tensor) -> Iterator[None]:
    """Raise CompressError where a batch-norm has one value per channel, which torch cannot normalize, for `images`."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        number, _, height, width = images.shape
        raise CompressError(
            f"{phase}: a batch-norm cannot train on {number} image of {height} x {width}, where it has one value per "
            "channel; give every step 2 images or more per rank and micro-batch (training images, fit.batch_size), or "
            "raise data.image_size"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether the error means that the device or the machine ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in CPU_OUT_OF_MEMORY)


def not_finite(measurements: Mapping[str, float]) -> str | None:
    """Return a phrase for the first measurement that is not finite, None where all are."""
    return next((f"the {name} is {value}" for name, value in measurements.items() if not math.isfinite(value)), None)


def record_(progress: Progress, score: float, stop: Stop | None) -> None:
    """Count an epoch and its validation score."""
    progress.epoch += 1
    if score > progress.best + (stop.min_delta if stop else 0.0) or progress.best_epoch == 0:
        progress.best, progress.best_epoch = score, progress.epoch


def stop_reason(stop: Stop | None, progress: Progress, score: float, *, metric: str, epochs: int) -> str | None:
    """Return why the training stops after this epoch of `epochs`, None where it continues.

    Where held-out images judge, it stops once no epoch was better than one before it for half of the epochs. The start does
    not count: a high rate first loses it, and passes it when the rate falls.
    """
    judged, idle = progress.held_out[1:], max(FEWEST_IDLE, -(-epochs // 2))
    if judged and len(judged) - 1 - judged.index(min(judged)) >= idle:
        return f"the loss on held-out images has not fallen below {min(judged):.4g} for {idle} epochs"
    if stop is None:
        return None
    if stop.score is not None and score >= stop.score:
        return f"{metric} {score:.4f} has reached {stop.score:g}"
    if stop.patience is not None and progress.epoch - progress.best_epoch >= stop.patience:
        return (
            f"{metric} has not risen by more than {stop.min_delta:g} over epoch {progress.best_epoch}'s "
            f"{progress.best:.4f} for {stop.patience} epochs"
        )
    minutes, epoch = progress.seconds / 60, progress.seconds / 60 / progress.epoch
    if stop.max_minutes is not None and minutes + epoch > stop.max_minutes:
        return f"it took {minutes:.1f} minutes, {epoch:.1f} an epoch: another would exceed max_minutes, {stop.max_minutes:g}"
    return None
