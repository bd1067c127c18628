"""The teacher: weights given, or trained here. Its metrics are the baseline of everything after it."""

from pathlib import Path

from torch import nn

from compress.artifact import Metrics, write_json
from compress.data.digest import FILES
from compress.distillation.step import check_layers, supervised_step
from compress.models.architectures import build
from compress.models.saved import example_images, save_network
from compress.pruning.plan import find_groups
from compress.quant.graph.trace import trace
from compress.recipe.stages import DistillStage, QatStage, SourceStage, StudentStage
from compress.run import Run


def apply(cfg: SourceStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Build the network, load or train its weights, measure it."""
    given = run.recipe.model
    architecture, model = run.start(given)
    _check_later_stages(model, run)
    with run.log(out, "source") as log:
        if cfg.fit is not None and (given.weights is None or cfg.fine_tune):
            step = supervised_step(run.task, label_smoothing=cfg.label_smoothing)
            model = run.fit(model, step, cfg.fit, out=out, log=log, phase="source")
        else:
            log.note(f"weights from {given.weights}, used as they are")
    model = model.to(run.device).eval()
    if run.rank == 0:
        save_network(model, architecture, out)
        if run.dataset.files:
            write_json(out / FILES, dict(run.dataset.files))
    return run.measure(model)


def _check_later_stages(teacher: nn.Module, run: Run) -> None:
    """Refuse a network that a later stage cannot handle now, before hours of training."""
    for chain in run.recipe.chains().values():
        stages = {section.stage: section for section in chain.stages}
        student = teacher
        if isinstance(section := stages.get("student"), StudentStage):
            student = build(section.arch, num_classes=len(run.dataset.classes), trust_code=run.trust_code)
            run.check_logits(student)
        if "prune" in stages:
            find_groups(student, example_images(run.image_size), "random", exclude=())
        if "qat" in stages:
            trace(student, example_images(run.image_size))
        for section in chain.stages:
            if isinstance(section, DistillStage | QatStage):
                check_layers(section.loss, student=student, teacher=teacher)
