"""YOLOX learns from labels by the loss of its package's own head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chain import prune_
from learning import learned_losses
from test_detection_chain import write_squares
from torch import Tensor, nn

from compress.artifact import read_meta
from compress.models.architectures import build
from compress.models.decodes import Decode, yolox
from compress.pipeline import run_recipe
from compress.quant.graph.trace import trace
from compress.recipe.read import read_recipe
from compress.tasks import TASKS, Task
from compress.tasks.decoded import count_objects
from compress.tasks.own_loss import own_loss, yolox_labels
from compress.training.modes import train_as_it_runs_
from export.images.size import Size
from export.onnx_file.outputs import Output

pytest.importorskip("yolox")
SIZE, CLASSES = (64, 96), 3
NONE = [-1.0] * 6


def opened() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build("yolox:nano", num_classes=CLASSES), 255 * torch.rand(4, 3, *SIZE)


def truths(*, more: bool = True) -> Tensor:
    """Return boxes of four images (4, 4, 6), the last one's none; with `more` also a crowd and a line, which do not count."""
    far, near = [2, 0.1, 0.1, 0.5, 0.6, 0], [0, 0.4, 0.3, 0.9, 0.9, 0]
    crowd, line = ([1, 0.2, 0.2, 0.9, 0.9, 1], [1, 0.5, 0.1, 0.5, 0.9, 0]) if more else (NONE, NONE)
    return torch.tensor([[crowd, far, NONE, near], [near, line, NONE, NONE], [far, far, near, NONE], [NONE] * 4])


def task_of(network: nn.Module, size: Size = SIZE) -> Task:
    own = own_loss(network, Decode(yolox, [Output("rows", (126, 5 + CLASSES))], size, CLASSES))
    assert own is not None
    return replace(TASKS["detection"], loss=own, loss_count=count_objects)


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.parametrize("l1", [False, True])
def test_loss_and_gradient_are_those_of_the_package_in_training(l1: bool) -> None:
    network, images = opened()
    head = network.get_submodule("head")
    vars(head)["use_l1"] = l1
    labels = torch.zeros(4, 4, 5)  # class, centre and size in pixels
    far, near = torch.tensor([2, 28.8, 22.4, 38.4, 32]), torch.tensor([0, 62.4, 38.4, 48, 38.4])
    labels[0, :2], labels[1, :1], labels[2, :3] = torch.stack([far, near]), near, torch.stack([far, far, near])
    torch.testing.assert_close(yolox_labels(truths(), SIZE), labels)

    mine = task_of(network).loss(network(images), truths(), label_smoothing=0.0)
    gradients = torch.autograd.grad(mine, [*network.parameters()])
    network.training = head.training = True  # but not its batch-norms
    expected = network(images, labels)["total_loss"]
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(gradients, torch.autograd.grad(expected, [*network.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(1, float(other.abs().max())))


def test_scores_of_zero_and_one_give_a_finite_loss() -> None:
    network, images = opened()
    rows = network(images).detach()
    rows[..., 4:] = (rows[..., 4:] > rows[..., 4:].median()).float()
    for boxes in (truths(), torch.full((4, 2, 6), -1.0)):
        loss = task_of(network).loss(rows.requires_grad_(), boxes, label_smoothing=0.0)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, rows)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["whole", "cut", "traced"])
def test_a_student_learns_from_labels(kind: str) -> None:
    network, images = opened()
    task, student = task_of(network), network
    if kind == "cut":
        prune_(student, images)
    if kind == "traced":
        student = trace(student, images)
    else:
        assert "learns in eval mode" in train_as_it_runs_(student, images, values=True)
    losses = learned_losses(student, task, images, truths(), rate=5e-3, steps=20)
    assert losses[-1] < 0.7 * losses[0]


RECIPE = """
name: labels
task: detection
target: cpu_avx2
data: {dataset: imagefolder, path: DATA, image_size: 64, framing: letterbox_corner, pixels: bytes, colors: bgr, eval_batch_size: 16}
model: {arch: "yolox:nano"}
decode: {function: yolox, detections: 20}
stages:
  - {stage: source, fit: {epochs: 24, batch_size: 8, optimizer: adamw, lr: 0.003, warmup_epochs: 1, clip_norm: 10}}
  - {stage: prune, keep_macs: 0.5, round_to: 4, reconstruct: none}
  - {stage: distill, fit: {epochs: 6, batch_size: 8, optimizer: adamw, lr: 0.002, clip_norm: 10}, loss: [{name: cross_entropy}]}
  - {stage: ptq, calibration_images: 32, methods: [minmax], float_where_faster: false}
  - {stage: qat, fit: {epochs: 2, batch_size: 8, optimizer: adamw, lr: 0.0005, clip_norm: 10}, loss: [{name: cross_entropy}], calibration_images: 32}
"""


@pytest.mark.acceptance
def test_labels_teach_the_teacher_the_student_and_its_int8(tmp_path: Path) -> None:
    write_squares(tmp_path / "data", "train", 96, 0)
    write_squares(tmp_path / "data", "val", 24, 1)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    recipe = read_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path}"])
    assert run_recipe(recipe, trust_code=False, until=None, verbose=False, command="compress run recipe.yaml") == 0
    scores = {one.name[3:-13]: read_meta(one).metrics["score"] or 0.0 for one in (tmp_path / "labels").glob("0*")}
    assert scores["source"] > 0.6
    assert scores["prune"] < 0.1, "so that what follows comes from the labels"
    assert min(scores["distill"], scores["qat"]) > 0.8 * scores["source"]
