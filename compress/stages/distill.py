"""Recover accuracy: the student learns from the teacher on the same views."""

from pathlib import Path

from compress.artifact import Metrics
from compress.distillation import distillation_step
from compress.network import read_architecture, save_network
from compress.recipe import DistillStage
from compress.run import Run


def apply(cfg: DistillStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Train the student under the recipe's losses and measure it."""
    assert src is not None
    step = distillation_step(cfg.loss, run.task, run.teacher(src))
    with run.log(out, "distill") as log:
        student = run.fit(run.load(src), step, cfg.fit, out=out, log=log, phase="distill")
    if run.rank == 0:
        save_network(student, read_architecture(src), out)
    return run.measure(student)
