"""Recover accuracy: the student learns from the teacher on the same views."""

from pathlib import Path

from compress.artifact import Metrics
from compress.distillation import distillation, online_teacher
from compress.network import example_images, read_architecture, save_network
from compress.recipe import DistillStage
from compress.run import Run


def apply(cfg: DistillStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Train the student under the recipe's losses and measure it."""
    assert src is not None
    teacher = online_teacher(run.teacher(src), cfg.loss)
    images = example_images(run.image_size, run.device)
    learner, step = distillation(
        cfg.loss, run.task, student=run.load(src), teacher=teacher, images=images, seed=run.recipe.seed
    )
    with run.log(out, "distill") as log:
        learner = run.fit(learner, step, cfg.fit, out=out, log=log, phase="distill")
    if run.rank == 0:
        save_network(learner.student, read_architecture(src), out)
    return run.measure(learner.student)
