"""Start another network as the student, in place of the pruned teacher; a later stage trains it."""

from pathlib import Path

from compress.artifact import Metrics
from compress.models.saved import save_network
from compress.recipe.stages import StudentStage
from compress.run import Run


def apply(cfg: StudentStage, _src: Path, out: Path, run: Run) -> Metrics:
    """Build the network, load its weights if the recipe names some, measure it."""
    architecture, model = run.start(cfg)
    if run.rank == 0:
        save_network(model, architecture, out)
    return run.measure(model.to(run.device).eval())
