"""The teacher: weights given, or trained here. Later stages are compared with its metrics."""

from pathlib import Path

from torch import nn

from compress.artifact import Metrics
from compress.data.digest import FILES, NOTES
from compress.distillation.step import Learner, auxiliary_training, distillation, no_teacher, supervised_step
from compress.logs.stage_log import StageLog
from compress.models.architectures import auxiliary
from compress.models.saved import example_images, save_network
from compress.recipe.losses import CrossEntropyTerm
from compress.recipe.stages import SourceStage
from compress.run import Run
from compress.training.device import place_
from compress.training.loop import Step
from compress.training.modes import train_as_it_runs_
from export.command.files import write_json


def apply(cfg: SourceStage, _src: None, out: Path, run: Run) -> Metrics:
    """Build the network, load or train its weights, measure it."""
    given = run.recipe.model
    if run.rank == 0:
        _note_data(out, run)
    if given is None:
        return _measure_given(out, run)
    architecture, model = run.start(given)
    with run.log(out, "source") as log:
        if cfg.fit is not None and (given.weights is None or cfg.fine_tune):
            model = _trained(model, given.arch, cfg, run, log)
        else:
            log.note(f"weights from {given.weights or given.arch}, used as they are")
        model = model.to(run.device).eval()
        if run.rank == 0:
            save_network(model, architecture, out)
        log.doing("measures the network on the validation images")
        return run.measure(model)


def _trained(model: nn.Module, arch: str, cfg: SourceStage, run: Run, log: StageLog) -> nn.Module:
    """Train the network on the labels, with its auxiliary classifier if it has one, and return it without that."""
    assert cfg.fit is not None
    if run.recipe.decode is not None:
        learner, step = _by_own_loss(model, cfg, run, log)
        return run.fit(learner, step, cfg.fit, log=log, phase="source").student
    second = auxiliary(arch, run.num_classes)
    if second is None:
        step = supervised_step(run.learned, label_smoothing=cfg.label_smoothing)
        return run.fit(model, step, cfg.fit, log=log, phase="source")
    layer, head = second
    learner, step = auxiliary_training(run.learned, model, layer=layer, head=head, label_smoothing=cfg.label_smoothing)
    return run.fit(learner, step, cfg.fit, log=log, phase="source").student


def _by_own_loss(model: nn.Module, cfg: SourceStage, run: Run, log: StageLog) -> tuple[Learner, Step]:
    """Return the learner and step of a detector with `decode`, which learns as a student does by `cross_entropy` alone."""
    images = example_images(run.shape, run.device)
    if how := train_as_it_runs_(place_(model, run.device), images, values=True):
        log.note(f"the network {how}")
    terms = [CrossEntropyTerm(name="cross_entropy", label_smoothing=cfg.label_smoothing)]
    return distillation(terms, run.learned, student=model, teacher=no_teacher, images=images, seed=run.recipe.seed)


def _measure_given(out: Path, run: Run) -> Metrics:
    """Measure the recipe's `teacher`, which this run neither trains nor saves."""
    with run.log(out, "source") as log:
        log.note(f"teacher {', '.join(one.network for one in run.recipe.teacher)}, used as it is")
        log.doing("measures it on the validation images")
        return run.measure(run.given_teacher(whole=True))


def _note_data(out: Path, run: Run) -> None:
    """Write the digests of the data set's files and its notes, and log these."""
    if run.dataset.files:
        write_json(out / FILES, dict(run.dataset.files))
    if run.dataset.notes:
        write_json(out / NOTES, list(run.dataset.notes))
    for note in run.dataset.notes:
        run.log(out, "data").note(note)
