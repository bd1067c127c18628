"""Quantization-aware training on the target's grid, under the teacher's soft targets."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from compress.artifact import Metrics
from compress.distillation import distillation_step
from compress.network import read_architecture, save_network
from compress.quant.prepare import freeze_batchnorm_, prepare, set_phase_
from compress.recipe import QatStage
from compress.run import Run
from compress.tasks import evaluate
from compress.train import place_


def apply(cfg: QatStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Insert fake-quantization, calibrate, train, freeze, measure."""
    assert src is not None
    student = run.load(src)
    costs = run.measure(student)
    with run.log(out, "qat") as log:
        model: nn.Module = place_(prepare(student.cpu(), run.target), run.device)
        _calibrate_(model, cfg, run)
        before = evaluate(model, run.validation(), run.task)
        log.note(f"target {run.target.name}; top-1 after calibration alone {before['top1']:.4f}")

        def before_step(training: nn.Module, done: float) -> None:
            set_phase_(training, observing=done < cfg.freeze_ranges_at, quantizing=True)
            if done >= cfg.freeze_batchnorm_at:
                freeze_batchnorm_(training)

        # bf16 has eight bits of precision, no more than the grid itself: rounding levels again would train the wrong numbers.
        settings = cfg.fit.model_copy(update={"precision": "fp32"}) if cfg.fit.precision == "auto" else cfg.fit
        step = distillation_step(cfg.loss, run.task, run.teacher(src))
        model = run.fit(model, step, settings, out=out, log=log, phase="qat", before_step=before_step)
    set_phase_(model, observing=False, quantizing=True)
    if run.rank == 0:
        save_network(model, replace(read_architecture(src), target=run.target.name), out)
    trained = evaluate(model, run.validation(), run.task)
    return {
        **trained,
        "top1_calibrated": before["top1"],
        "params_m": costs["params_m"],
        "macs_m": costs["macs_m"],
        "size_mb": None,
    }


@torch.no_grad()
def _calibrate_(model: nn.Module, cfg: QatStage, run: Run) -> None:
    """Set the activations' first ranges from unaugmented training images, in float."""
    model.train()
    freeze_batchnorm_(model)
    set_phase_(model, observing=True, quantizing=False)
    for batch in run.calibration(cfg.calibration_images):
        model(batch.images)
    set_phase_(model, observing=True, quantizing=True)
    model.eval()
