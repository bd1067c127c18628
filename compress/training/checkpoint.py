"""What a training can go back to: everything that decides how it goes on, in memory and on disk."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from compress.ranks import first_decides
from export.command.files import writing

Snapshot = dict[str, Any]


@dataclass
class Progress:
    """How far a training is and what happened to it; `best` is the score of `best_epoch`, the last that rose by enough."""

    epoch: int = 0  # epochs behind it
    seconds: float = 0.0
    best: float = float("-inf")
    best_epoch: int = 0
    returns: int = 0  # to the last good epoch; each halves the rate
    micro_batches: int = 1
    precision: str = ""  # that steps compute in; empty until chosen
    threads: int = 0  # on a CPU
    timed_epoch: int = 0  # epochs behind it when the threads were chosen
    images_per_s: float = 0.0  # the fastest epoch since then
    events: list[str] = field(default_factory=list)


@dataclass
class State:
    """A network in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    progress: Progress

    @property
    def result(self) -> nn.Module:
        """What the training gives: the moving average where there is one."""
        return self.average.module if self.average else self.model

    def snapshot(self) -> Snapshot:
        """Return a copy of all weights, buffers and moments, on their device."""
        return copy.deepcopy(self._tensors())

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, which stays as it is; gradients are dropped and the progress is kept."""
        self.model.load_state_dict(snapshot["model"])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))  # which would keep the tensors themselves
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.load_state_dict(snapshot["average"])

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        with writing(path) as file:  # torch hides what went wrong with a path of its own, such as a full disk
            torch.save({**self._tensors(), "progress": asdict(self.progress)}, file)

    def resume_(self, path: Path) -> None:
        """Go on from the checkpoint of a run that was killed, if there is one."""
        if first_decides(path.exists):
            saved = torch.load(path, weights_only=True)
            self.restore_(saved)
            self.progress = Progress(**saved["progress"])

    def _tensors(self) -> Snapshot:
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return tensors | ({"average": self.average.state_dict()} if self.average else {})
