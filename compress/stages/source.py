"""The teacher: weights given, or trained here. Its metrics are the baseline of everything after it."""

from pathlib import Path

from compress.artifact import Metrics, write_json
from compress.data.digest import FILES
from compress.distillation.step import supervised_step
from compress.models.saved import save_network
from compress.recipe.stages import SourceStage
from compress.run import Run


def apply(cfg: SourceStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Build the network, load or train its weights, measure it."""
    given = run.recipe.model
    architecture, model = run.start(given)
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
