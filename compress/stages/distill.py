"""Recover accuracy: the student learns from the teacher, which sees the same augmented views."""

from pathlib import Path

from compress.artifact import Metrics
from compress.distillation.teacher import distil
from compress.models.saved import read_architecture, save_network
from compress.recipe.stages import DistillStage
from compress.run import Run


def apply(cfg: DistillStage, src: Path, out: Path, run: Run) -> Metrics:
    """Train the student under the recipe's losses and measure it."""
    with run.log(out, "distill") as log:
        student = distil(run, run.load(src), cfg.loss, cfg.fit, src=src, log=log, phase="distill")
    if run.rank == 0:
        save_network(student, read_architecture(src), out)
    return run.measure(student)
