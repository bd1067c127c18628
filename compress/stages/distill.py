"""Recover accuracy: the student learns from the teacher, which sees the same augmented views."""

from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artifact import Metrics
from compress.distillation.teacher import distil
from compress.models.saved import example_images, load_float, read_architecture, save_network
from compress.pruning.recovery.reconstruction import affordable_images, has_statistics
from compress.recipe.stages import DistillStage
from compress.run import Run
from compress.training.device import place_
from compress.training.modes import freeze_norms_


def apply(cfg: DistillStage, src: Path, out: Path, run: Run) -> Metrics:
    """Train the student under the recipe's losses and measure it."""
    student = place_(load_float(src, trust_code=run.trust_code), run.device)

    def before_step(_learner: nn.Module, done: float) -> None:
        if done >= cfg.freeze_batchnorm_at:
            freeze_norms_(student)

    with run.log(out, "distill") as log:
        student = distil(
            run,
            student,
            cfg.loss,
            cfg.fit,
            src=src,
            log=log,
            phase="distill",
            before_step=before_step,
            views=_views(cfg, student, run),
        )
        if run.rank == 0:
            save_network(student, read_architecture(src), out)
        log.doing("measures the student on the validation images")
        return run.measure(student)


def _views(cfg: DistillStage, student: nn.Module, run: Run) -> Tensor | None:
    """Return the images that measure batch-norms' statistics again; None where there are none, they are frozen, or it is not asked for."""
    if not cfg.reestimate_batchnorm_images or cfg.freeze_batchnorm_at < 1 or not has_statistics(student):
        return None
    most = affordable_images(student.eval(), example_images(run.shape, run.device))
    return torch.cat([batch.images for batch in run.feed.views(min(cfg.reestimate_batchnorm_images, most))])
