"""Detectors of transformers learn from labels by the loss of their own class."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chain import enlivened
from learning import learned_losses
from test_detection_chain import write_squares
from torch import Tensor, nn

from compress.data.named import DATA_SETS
from compress.data.scenes import draw_scenes
from compress.models.architectures import thawed_
from compress.models.decodes import Decode, queries
from compress.models.outputs import serve_, signature_of
from compress.pipeline import run_recipe
from compress.recipe.read import read_recipe
from compress.tasks import TASKS
from compress.tasks.decoded import count_objects
from compress.tasks.own_loss import own_loss
from compress.tasks.task import Task

pytest.importorskip("transformers")
SIZE, CLASSES = 64, 6
SERVED = ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits")


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, Tensor]:
    """Return images (8, 3, 64, 64) from 0 to 1 and truths (8, boxes, 6), digits from 0 to 5 among them, without the others."""
    difficulty = DATA_SETS["scenes"].scenes
    assert difficulty is not None
    drawn = draw_scenes(difficulty, "val", size=SIZE, seed=0)
    truths = torch.full((8, max(map(len, drawn.boxes[:8])), 6), -1.0)
    for truth, boxes in zip(truths, drawn.boxes[:8], strict=False):
        known = torch.from_numpy(boxes[boxes[:, 4] <= CLASSES]).float()
        truth[: len(known)] = torch.cat([known[:, 4:5] - 1, known[:, :4] / SIZE, 0 * known[:, :1]], 1)
    return torch.from_numpy(drawn.images[:8]).permute(0, 3, 1, 2).float() / 255, truths


def opened(kind: str, images: Tensor) -> tuple[nn.Module, Task]:
    from queried import built

    torch.manual_seed(0)
    network = enlivened(thawed_(built(kind).eval()), images)
    with torch.no_grad():
        named = network(images[:1])
    serve_(network, [one for one in SERVED if named.get(one) is not None])
    own = own_loss(network, Decode(queries, signature_of(network, (3, SIZE, SIZE)), (SIZE, SIZE), CLASSES))
    assert own is not None
    return network, replace(TASKS["detection"], loss=own, loss_count=count_objects)


@pytest.mark.parametrize("kind", ["DETR", "RT-DETR", "RF-DETR"])
def test_the_loss_is_that_of_the_network_s_class(kind: str, scenes: tuple[Tensor, Tensor]) -> None:
    images, truths = scenes
    network, task = opened(kind, images)
    labels = []
    for boxes in truths:
        known = boxes[boxes[:, 0] >= 0]
        sides = known[:, 3:5] - known[:, 1:3]
        labels.append({"class_labels": known[:, 0].long(), "boxes": torch.cat([known[:, 1:3] + sides / 2, sides], 1)})
    config = vars(network)["config"]
    config.auxiliary_loss = False
    if hasattr(config, "group_detr"):
        config.group_detr = 1
    with torch.no_grad():
        packed = network(images)
        network._forward_hooks.popitem()  # which lays the outputs side by side
        expected = network(images, labels=labels).loss
        torch.testing.assert_close(task.loss(packed, truths, label_smoothing=0.0), expected, rtol=1e-4, atol=1e-4)
    assert task.loss_count(packed, truths) == sum(len(one["boxes"]) for one in labels)
    assert torch.isfinite(task.loss(packed, torch.full_like(truths, -1.0), label_smoothing=0.0))


def test_a_detr_learns_from_labels(scenes: tuple[Tensor, Tensor]) -> None:
    images, truths = scenes
    network, task = opened("DETR", images)
    losses = learned_losses(network, task, images, truths, rate=1e-3, steps=12)
    assert losses[-1] < 0.7 * losses[0]


RECIPE = """
name: labels
task: detection
data: {dataset: imagefolder, path: FOLDER/data, image_size: 64, framing: stretch, pixels: unit, eval_batch_size: 16}
model: {arch: "hf:FOLDER/net", outputs: [logits, pred_boxes]}
decode: {function: queries, detections: 20}
stages:
  - {stage: source, fit: {epochs: 20, batch_size: 8, optimizer: adamw, lr: 0.001, warmup_epochs: 1, clip_norm: 1}}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name")  # which the decoder's inputs share
def test_a_folder_of_transformers_is_trained_on_labels_as_source(tmp_path: Path) -> None:
    import transformers
    from queried import stepped

    torch.manual_seed(0)
    network = transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**stepped(num_labels=2)))
    for last in network.model.decoder.bbox_embed:  # zeros, so that all images would have the same boxes
        nn.init.normal_(last.layers[-1].weight, std=0.02)
    network.save_pretrained(tmp_path / "net")
    write_squares(tmp_path / "data", "train", 64, 0)
    write_squares(tmp_path / "data", "val", 24, 1)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    recipe = read_recipe(tmp_path / "recipe.yaml", [f"out={tmp_path}"])
    assert run_recipe(recipe, trust_code=False, until=None, verbose=False, command="compress run recipe.yaml") == 0
    (folder,) = (tmp_path / "labels").glob("00-source*")
    assert json.loads((folder / "meta.json").read_text())["metrics"]["score"] > 0.1
