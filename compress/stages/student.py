"""Start another network in the place of the pruned teacher; a later stage teaches it."""

from pathlib import Path

from compress.artifact import Metrics
from compress.models.saved import save_network
from compress.recipe.stages import StudentStage
from compress.run import Run


def apply(cfg: StudentStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Build the network, load its weights if there are any, measure it."""
    assert src is not None
    architecture, model = run.start(cfg)
    if run.rank == 0:
        save_network(model, architecture, out)
    return run.measure(model.to(run.device).eval())
