"""The state that a training can roll back to or resume from, in memory and on disk."""

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
    """A training's progress and events; `best` is the score of `best_epoch`, the last gain above `min_delta`."""

    epoch: int = 0  # epochs done
    seconds: float = 0.0
    best: float = float("-inf")
    best_epoch: int = 0
    rollbacks: int = 0  # each halves the rate
    micro_batches: int = 1
    precision: str = ""  # of the steps; empty until chosen
    threads: int = 0  # on a CPU
    timed_epoch: int = 0  # epochs done when the threads were chosen
    images_per_s: float = 0.0  # of the fastest epoch since then
    events: list[str] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)  # losses on held-out images: of the start and of each epoch
    kept_epoch: int = 0  # of `State.kept`


@dataclass
class State:
    """A network in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    progress: Progress
    kept: Snapshot | None = None  # the result's tensors after the epoch that is given (held.py)
    first: list[float] = field(default_factory=list)  # each held-out image's loss before the training
    least: list[float] = field(default_factory=list)  # and after the best epoch

    @property
    def result(self) -> nn.Module:
        """The trained network: the moving average if there is one."""
        return self.average.module if self.average else self.model

    def snapshot(self) -> Snapshot:
        """Return a copy of all weights, buffers and optimizer moments, on their device."""
        return copy.deepcopy(self._tensors())

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; drop gradients, keep the progress and leave the snapshot unchanged."""
        self.model.load_state_dict(snapshot["model"])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))  # or it would use the snapshot's tensors
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.load_state_dict(snapshot["average"])

    def save(self, path: Path) -> None:
        """Write the checkpoint, complete or not at all."""
        with writing(path) as file:  # given a path, torch's error hides the cause, such as a full disk
            judged = {"kept": self.kept, "first": self.first, "least": self.least}
            torch.save({**self._tensors(), **judged, "progress": asdict(self.progress)}, file)

    def resume_(self, path: Path) -> None:
        """Continue from the checkpoint of a killed run, if there is one."""
        if first_decides(path.exists):
            saved = torch.load(path, weights_only=True)
            self.restore_(saved)
            self.progress = Progress(**saved["progress"])
            self.kept, self.first, self.least = saved["kept"], saved["first"], saved["least"]

    def _tensors(self) -> Snapshot:
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return tensors | ({"average": self.average.state_dict()} if self.average else {})
