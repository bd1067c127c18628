"""Which network a training ends with: its start, unless an epoch is clearly better on images that are not trained on."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, median

import torch
from torch import Tensor, nn

from compress.training.checkpoint import State

MARGIN = 2.0  # standard errors of a difference that is not luck
DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
OF_MEDIAN = 1.2533  # a median's standard error over a mean's, of a normal distribution


@dataclass(frozen=True)
class Losses:
    """A network's losses on the held-out images, or on groups of them, always in the same order.

    Their mean counts; where they are `unbounded`, and so a few could decide, their median.
    """

    each: tuple[float, ...]
    unbounded: bool = False

    @cached_property
    def value(self) -> float:
        """The number by which networks are compared."""
        return (median(self.each) if self.unbounded else mean(self.each)) if self.each else 0.0

    def clearly_above(self, other: "Losses") -> bool:
        """Tell whether the difference, image by image, is more than MARGIN standard errors."""
        if not math.isfinite(self.value):
            return True
        pairs = zip(self.each, other.each, strict=True)
        by_image = torch.tensor([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)])
        if len(by_image) < 2:  # nothing to tell the error by
            return self.value > other.value
        if self.unbounded:
            error = DEVIATION * OF_MEDIAN * float((by_image - by_image.median()).abs().median())
            difference = float(by_image.median())
        else:
            error, difference = float(by_image.std()), float(by_image.mean())
        return difference > MARGIN * error / math.sqrt(len(by_image))


@dataclass(frozen=True)
class Held:
    """What keeps a training from ending below its start: that network, and losses on images that are held out."""

    start: nn.Module
    images: Sequence[int] | Tensor  # indices of the training images that are left out
    losses: Callable[[nn.Module], Losses]  # of a network; the same on all ranks, which call it together
    settle: Callable[[nn.Module], Losses] | None = (
        None  # the same, after changing a network of the second half of the epochs
    )

    def begin_(self, state: State) -> None:
        """Judge the network that the training starts from, unless a killed run has done it."""
        if not state.progress.held_out:
            losses = self.losses(self.start)
            state.first, state.progress.held_out = list(losses.each), [losses.value]

    def judge_(self, state: State, losses: Losses) -> None:
        """Count the losses of the epoch that ended; keep its network if it is clearly better than the start, and no epoch before than it.

        With few images the least of many losses is a matter of luck, and the rate falls towards the end.
        """
        progress = state.progress
        first, least = (replace(losses, each=tuple(each)) for each in (state.first, state.least))
        if not state.least or losses.value < least.value:
            least, state.least = losses, list(losses.each)
        if first.clearly_above(losses) and not losses.clearly_above(least):
            state.kept, progress.kept_epoch = copy.deepcopy(state.result.state_dict()), len(progress.held_out)
        progress.held_out.append(losses.value)

    def chosen_(self, state: State) -> tuple[nn.Module, str]:
        """Return the network that the training gives, and what is to be said of it."""
        progress, losses = state.progress, state.progress.held_out
        kept = progress.kept_epoch
        if not kept:
            epochs = ", ".join(format(loss, ".4g") for loss in losses[1:]) or "none ended"
            return self.start, (
                "training did not help: kept the network that it started from, whose loss on held-out images is "
                f"{losses[0]:.4g}; none of the epochs' is lower by {MARGIN:g} standard errors ({epochs})"
            )
        if kept == len(losses) - 1:
            return state.result, ""
        assert state.kept is not None
        state.result.load_state_dict(state.kept)
        return state.result, f"kept the network of epoch {kept}: on held-out images no later one is as good"
