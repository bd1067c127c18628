"""Detection with a decoder: a network learns from the teacher's boxes and scores, whatever its outputs are, without labels."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data.batches import eval_batches, in_order
from compress.data.dataset import Dataset
from compress.errors import CompressError
from compress.models.decodes import CHOSEN_FROM, Decode, Function, decoder_of
from compress.models.outputs import signature_of
from compress.tasks.detection import EVERY, target_of
from compress.tasks.own_loss import own_loss
from compress.tasks.task import Task, count_images
from export.onnx_file.graph import OUTPUT
from export.onnx_file.outputs import Output
from export.tasks.boxes import Limits
from export.tasks.decoder import decoded as output_of
from export.tasks.detection import SURE

IMAGES = 8  # whose outputs are decoded to compare the graph with the function
LIKELY = 0.02  # rows where a class has this score are distilled, and one in EVERY of all
SMALLEST = 1e-6  # score, whose logit is compared
SIDE = 1e-3  # least side of a box, as a fraction of the image, in units of which its distance counts


def rows(outputs: Tensor, _truths: Tensor, *, decode: Decode) -> Tensor:
    """Return each class's logit in every row as (rows, 2): the softmax of (0, z) is the sigmoid of z."""
    return _logits(decode.packed(outputs.float())[1])


def _logits(scores: Tensor) -> Tensor:
    flat = scores.clamp(SMALLEST, 1 - SMALLEST).logit().flatten()
    return torch.stack([torch.zeros_like(flat), flat], 1)


def pairs(outputs: Tensor, taught: Tensor, *, decode: Decode) -> tuple[Tensor, Tensor]:
    """Return student's and teacher's logits (rows, 2), in the rows where the teacher sees something and some others."""
    found = [decode.learned(one.float())[1] for one in (outputs, taught)]
    chosen = found[1].amax(2) >= LIKELY
    chosen[:, ::EVERY] = True
    return _logits(found[0][chosen]), _logits(found[1][chosen])


def places(outputs: Tensor, taught: Tensor, *, decode: Decode) -> Tensor:
    """Return the smooth L1 distance of the boxes' corners in sides of the teacher's box, summed over the four, where it is sure: a mean."""
    (mine, _), (its, scores) = (decode.learned(one.float()) for one in (outputs, taught))
    sure = scores.amax(2) >= SURE
    mine, its = mine[sure], its[sure]
    sides = (its[:, 2:] - its[:, :2]).clamp(min=SIDE).repeat(1, 2)
    return F.smooth_l1_loss(mine / sides, its / sides, reduction="sum", beta=0.1) / sure.sum().clamp(min=1)


def count_sure(taught: Tensor, *, decode: Decode) -> Tensor:
    """Return the number of rows where the teacher is sure."""
    return (decode.learned(taught.float())[1].amax(2) >= SURE).sum()


def count_objects(_outputs: Tensor, truths: Tensor) -> int:
    """Return the number of boxes, by which transformers' losses divide; YOLOX's divides by rows that only outputs tell, more the more boxes."""
    return sum(len(target_of(boxes)["labels"]) for boxes in truths)


def _of_labels(*_args: object, **_settings: object) -> Tensor:
    raise CompressError(
        "decode: such a network has no loss from labels here: use kd and boxes, which need none; RF-DETR's wants "
        f"{' and '.join(CHOSEN_FROM)} in model.outputs"
    )


def decoded(task: Task, images: Dataset, decode: Decode) -> Task:
    """Return the task of detection for networks whose outputs on the images are decoded."""
    own, decoder = images.own_loss, images.decoder
    assert decoder is not None, "with_decoder gave it"
    return replace(
        task,
        output=output_of(decoder),
        loss=own or _of_labels,
        rows=partial(rows, decode=decode),
        truth_rows=_of_labels,
        loss_count=count_objects if own else count_images,
        row_count=count_images,
        pairs=partial(pairs, decode=decode),
        places=partial(places, decode=decode),
        places_count=partial(count_sure, decode=decode),
        supervised=False,
    )


@torch.no_grad()
def with_decoder(images: Dataset, network: nn.Module, function: Function, limits: Limits) -> Dataset:
    """Return the images with the network's outputs, if it has several, and the graph that decodes them.

    Raises ModelError where the function cannot decode what the network makes of some images.
    """
    outputs = signature_of(network, images.preprocess.shape)
    some = in_order(len(images.train), IMAGES).split(IMAGES)
    (batch,) = eval_batches(images.train, images.preprocess, some, device=torch.device("cpu"), workers=0)
    shown: Tensor = network(batch.images)
    named = outputs or (Output(OUTPUT, tuple(shown.shape[1:])),)
    decode = Decode(function, named, images.preprocess.image_size, len(images.classes))
    decoder = decoder_of(decode, limits, shown)
    return replace(images, outputs=outputs, decoder=decoder, own_loss=own_loss(network, decode))
