"""Recover accuracy: the student learns from the teacher, which sees the same augmented views."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from compress.artifact import Metrics
from compress.distillation.teacher import distil
from compress.models.saved import example_images, load_float, read_architecture, save_network
from compress.pruning.recovery.reconstruction import affordable_images, estimate_batchnorm_
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

    settle = None
    if cfg.reestimate_batchnorm_images and cfg.freeze_batchnorm_at == 1:
        count = min(cfg.reestimate_batchnorm_images, affordable_images(student, example_images(run.shape, run.device)))
        settle = partial(estimate_batchnorm_, images=torch.cat([batch.images for batch in run.feed.views(count)]))
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
            settle=settle,
        )
        if run.rank == 0:
            save_network(student, read_architecture(src), out)
        log.doing("measures the student on the validation images")
        return run.measure(student)
