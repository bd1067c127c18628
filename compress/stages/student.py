"""Start another network in the place of the pruned teacher; a later stage teaches it."""

from pathlib import Path

import torch

from compress.artifact import Metrics
from compress.models.architectures import build
from compress.models.structure import check_output
from compress.models.weights import load_weights_
from compress.network import Architecture, save_network
from compress.recipe_stages import StudentStage
from compress.run import Run


def apply(cfg: StudentStage, src: Path | None, out: Path, run: Run) -> Metrics:
    """Build the network, load its weights if there are any, measure it."""
    assert src is not None
    architecture = Architecture(cfg.arch, len(run.dataset.classes), run.image_size)
    torch.manual_seed(run.recipe.seed)
    model = build(cfg.arch, num_classes=architecture.num_classes, trust_code=run.trust_code)
    if cfg.weights is not None:
        load_weights_(model, cfg.arch, cfg.weights, reset_head=cfg.reset_head)
    check_output(model, image_size=run.image_size, num_classes=architecture.num_classes)
    if run.rank == 0:
        save_network(model, architecture, out)
    return run.measure(model.to(run.device).eval())
