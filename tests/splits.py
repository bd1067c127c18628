"""The gradient of one batch of five images, for every task and loss, whole or in parts."""

from collections.abc import Callable
from pathlib import Path

import torch
from networks import Residual, boxes, fcos, lively, outlines, retinanet
from pydantic import TypeAdapter
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from compress.data.batches import Batch
from compress.distillation.step import distillation, online_teacher, supervised_step
from compress.logs.stage_log import StageLog
from compress.recipe.losses import LossTerm
from compress.recipe.stages import Fit
from compress.tasks import TASKS
from compress.training.loop import Loop, fit

CLASSES, IMAGES, SIDE = 3, 5, 48
ALONE = {
    "classification": ["cross_entropy", "kd", "mse", "dkd", "nkd", "cwd", "review"],
    "multilabel": ["cross_entropy", "kd", "mse"],
    "segmentation": ["cross_entropy", "kd", "dkd", "cwd"],
    "ssd": ["cross_entropy", "kd", "mse", "boxes", "cwd"],
    "retinanet": ["cross_entropy", "kd", "boxes"],
    "fcos": ["cross_entropy", "kd", "boxes"],
}
# Losses that are means over different things, in one sum.
TOGETHER = {
    "classification": "cross_entropy kd cwd",
    "multilabel": "cross_entropy kd",
    "segmentation": "cross_entropy kd cwd",
    "ssd": "cross_entropy kd boxes cwd",
    "retinanet": "cross_entropy kd boxes",
    "fcos": "cross_entropy kd boxes",
}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "classification": Residual,
    "multilabel": Residual,
    "segmentation": outlines,
    "ssd": boxes,
    "retinanet": retinanet,
    "fcos": fcos,
}
LAYERS = {
    "classification": ["block1", "block2"],
    "segmentation": ["block"],
    "ssd": ["backbone.wide"],
}


def network(kind: str, seed: int) -> nn.Module:
    """Return the kind's network in float64, so that only what is computed otherwise differs."""
    torch.manual_seed(seed)
    model = lively(NETWORKS[kind](CLASSES), seed)
    for path, module in model.named_modules():
        if path.endswith("cls_logits"):  # a detector that is sure of some boxes
            nn.init.normal_(module.weight, std=0.2)
    return model.double()


def frozen(model: nn.Module) -> nn.Module:
    """Return the model with frozen batch-norms, whose statistics would be each part's own."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            norm = FrozenBatchNorm2d(module.num_features)
            norm.load_state_dict({name: module.state_dict()[name] for name in norm.state_dict()})
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm.double())
    return model


def targets(kind: str) -> Tensor:
    """Return truths that are unevenly spread over the images."""
    if kind == "classification":
        return torch.softmax(torch.randn(IMAGES, CLASSES), 1)
    if kind == "multilabel":
        return (torch.rand(IMAGES, CLASSES) > 0.5).float()
    if kind == "segmentation":
        masks = torch.randint(0, CLASSES, (IMAGES, SIDE, SIDE), dtype=torch.uint8)
        masks[0], masks[1, 5:] = 255, 255
        masks[3, :, ::2] = 255
        return masks
    found = torch.zeros(IMAGES, 4, 6)
    found[..., 0] = -1
    found[1, 0] = torch.tensor([0, 0.2, 0.2, 0.5, 0.5, 0])
    found[2, 0] = torch.tensor([2, 0.1, 0.4, 0.5, 0.8, 0])
    corners = torch.rand(2, 4, 2) * 0.4
    found[3:, :, 0] = torch.randint(0, CLASSES, (2, 4)).float()
    found[3:, :, 1:3], found[3:, :, 3:5] = corners, corners + 0.2 + 0.3 * torch.rand(2, 4, 2)
    return found


def gradient(kind: str, names: str, out: Path, *, micro_batches: int = 1, rank: int = 0, ranks: int = 1) -> Tensor:
    """Return the gradient of the batch as `fit` computes it, by the losses' names or by "labels" for plain training."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(IMAGES, 3, SIDE, SIDE).double(), targets(kind))
    own = Batch(batch.images[rank::ranks], batch.targets[rank::ranks], among=IMAGES)
    task = TASKS.get(kind, TASKS["detection"])
    model = network(kind, 1)
    step = supervised_step(task, label_smoothing=0.0)
    if names != "labels":
        given = [
            {"name": name} | ({"layers": LAYERS[kind]} if name in ("cwd", "review") else {}) for name in names.split()
        ]
        terms = TypeAdapter(tuple[LossTerm, ...]).validate_python(given)
        teacher = online_teacher(network(kind, 2), terms)
        model, step = distillation(terms, task, student=model, teacher=teacher, images=batch.images[:1], seed=0)
        model.double()
    found: list[Tensor] = []

    def keep(trained: nn.Module) -> None:
        gradients = [parameter.grad for parameter in trained.parameters()]
        found.append(torch.cat([grad.flatten() for grad in gradients if grad is not None]))

    loop = Loop(
        batches=lambda _epoch: iter([own]),
        steps_per_epoch=1,
        evaluate=lambda _model: {"score": 0.0},
        metric="score",
        log=StageLog(out, stage="test", enabled=rank == 0),
        checkpoint=out / "checkpoint.pt",
        summary=out / "training.json",
        device=torch.device("cpu"),
        ranks=ranks,
        seed=0,
        phase="test",
        after_backward=keep,
    )
    fit(frozen(model), step, Fit(epochs=1, batch_size=IMAGES, micro_batches=micro_batches), loop)
    (only,) = found
    return only
