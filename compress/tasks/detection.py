"""Detection: boxes with a class. The supervised losses are torchvision's, on the anchors that the network outputs."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher, SSDMatcher
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert, box_iou

from compress.data.boxed import open_boxes, write_boxes
from compress.tasks.task import Task
from export.tasks.boxes import CENTRED, GIOU, MOVES, READS, SOFTMAX, WEIGHTS
from export.tasks.detection import DETECTION as OUTPUT
from export.tasks.detection import SURE

PIXELS = 1000.0  # torchvision's losses are written for lengths in pixels
NEAR = 0.3  # an anchor that overlaps an object (IoU) by at least this is distilled
EVERY = 8  # of all anchors, one in this many is distilled as well
Targets = list[dict[str, Tensor]]
Result = TypeVar("Result")
_FCOS_HEAD = SimpleNamespace(box_coder=BoxLinearCoder(normalize_by_size=True))


def detection_loss(outputs: Tensor, truths: Tensor, *, label_smoothing: float) -> Tensor:
    """Return torchvision's loss for the network's kind of head, summed over its parts.

    Outputs are (batch, anchors, columns), truths (batch, boxes, 6). `label_smoothing` must be 0.
    """
    assert not label_smoothing
    kind, found, anchors, targets = _read(outputs, truths)
    if kind == CENTRED:
        return _sum(_centred(targets, found, anchors, partial(FCOSHead.compute_loss, _FCOS_HEAD)))
    coder = BoxCoder((WEIGHTS[kind][0],) * 2 + (WEIGHTS[kind][1],) * 2)
    matched = _matched(kind, targets, anchors)
    if kind == SOFTMAX:
        parts = SSD.compute_loss(
            SimpleNamespace(box_coder=coder, neg_to_pos_ratio=3.0), targets, found, anchors, matched
        )
        return _sum(parts)
    between = SimpleNamespace(BETWEEN_THRESHOLDS=Matcher.BETWEEN_THRESHOLDS)
    regression = SimpleNamespace(box_coder=coder, _loss_type="giou" if kind == GIOU else "l1")
    classes = RetinaNetClassificationHead.compute_loss(between, targets, found, matched)
    boxes = RetinaNetRegressionHead.compute_loss(regression, targets, found, anchors, matched)
    total: Tensor = classes + boxes
    return total


def blank(outputs: Tensor) -> Tensor:
    """Return outputs with the same anchors and zeros for classes and moves."""
    constants = outputs[..., -READS:]
    return torch.cat([torch.zeros_like(outputs[..., :-READS]), constants], dim=-1)


def count_objects(outputs: Tensor, truths: Tensor) -> Tensor | int:
    """Return what the loss of these truths divides by: the number of anchors with an object, of images for RetinaNet's.

    RetinaNet's loss is a mean over images, each divided by its own anchors.
    """
    kind, found, anchors, targets = _read(_anchors_for(truths, outputs), truths)
    if kind not in (SOFTMAX, CENTRED):
        return len(truths)
    if kind == SOFTMAX:
        matched = _matched(kind, targets, anchors)
    else:
        matched = _centred(targets, found, anchors, lambda _targets, _found, _anchors, matched: matched)
    return (torch.stack(matched) >= 0).sum()


def _anchors_for(truths: Tensor, outputs: Tensor) -> Tensor:
    """Return outputs of as many images as truths: only their anchors mean anything, which all images have in common."""
    return outputs[:1].detach().expand(len(truths), -1, -1)


def _read(outputs: Tensor, truths: Tensor) -> tuple[int, dict[str, Tensor], list[Tensor], Targets]:
    """Return the kind of head, its outputs, its anchors and the truths, as torchvision's losses want them."""
    values = outputs.float()
    kind = int(values[0, 0, -READS])
    logits, moves = values[..., : -MOVES - READS], values[..., -MOVES - READS : -READS]
    constants = values[..., 1 - READS :].detach()
    scale = torch.full((4,), PIXELS, device=values.device)
    if kind == CENTRED:  # compares lengths in x and y: its anchors are square in pixels, which tells the proportions
        scale[::2] *= constants[0, 0, 3] / constants[0, 0, 2]
    anchors = list(box_convert(constants * scale, "cxcywh", "xyxy"))
    return (
        kind,
        {"cls_logits": logits, "bbox_regression": moves},
        anchors,
        [target_of(boxes, scale) for boxes in truths],
    )


def _sum(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def target_of(boxes: Tensor, scale: Tensor | float = PIXELS) -> dict[str, Tensor]:
    """Return one image's truths as torchvision wants them, in lengths of `scale` (4,) or pixels, without crowds; labels count from 1."""
    real = boxes[(boxes[:, 0] >= 0) & (boxes[:, 5] == 0)]
    return {"boxes": real[:, 1:5] * scale, "labels": real[:, 0].long() + 1}


def _matched(kind: int, targets: Targets, anchors: list[Tensor]) -> list[Tensor]:
    """Return for each image the index of each anchor's box (anchors,), negative for background."""
    matcher = SSDMatcher(0.5) if kind == SOFTMAX else Matcher(0.5, 0.4, allow_low_quality_matches=True)
    none = torch.full((len(anchors[0]),), Matcher.BELOW_LOW_THRESHOLD, device=anchors[0].device)
    boxes = [target["boxes"] for target in targets]
    return [matcher(box_iou(each, anchors[0])) if len(each) else none for each in boxes]


def _centred(targets: Targets, found: dict[str, Tensor], anchors: list[Tensor], then: Callable[..., Result]) -> Result:
    """Match as FCOS does and return `then(targets, found, anchors, matched)`. Anchors of one width belong to one level."""
    logits = found["cls_logits"]
    heads = found | {"bbox_ctrness": logits[..., :1]}
    heads["cls_logits"] = torch.cat([torch.full_like(logits[..., :1], -100.0), logits[..., 1:]], dim=2)
    _, levels = torch.unique_consecutive((anchors[0][:, 2] - anchors[0][:, 0]).round(decimals=1), return_counts=True)
    network = SimpleNamespace(center_sampling_radius=1.5, head=SimpleNamespace(compute_loss=then))
    result: Result = FCOS.compute_loss(network, targets, heads, anchors, levels.tolist())
    return result


def rows(outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the chosen anchors' logits: (anchors, classes + 1) for a softmax, (anchors · classes, 2) for sigmoids."""
    logits = outputs[..., : -MOVES - READS][_chosen(outputs, truths)]
    if int(outputs[0, 0, -READS]) == SOFTMAX:
        return logits
    single = logits[:, 1:].reshape(-1)  # the softmax of (0, z) is the sigmoid of z
    return torch.stack([torch.zeros_like(single), single], dim=1)


def count_chosen(outputs: Tensor, truths: Tensor) -> Tensor:
    """Return the number of anchors to distil."""
    return _chosen(_anchors_for(truths, outputs), truths).sum()


def truth_rows(outputs: Tensor, truths: Tensor) -> Tensor:
    """Return those rows' truths: the class, 0 for background; for sigmoids 1 where the row's class is right."""
    labels = torch.cat([_labels(image, boxes) for image, boxes in zip(outputs, truths, strict=True)])
    labels = labels[_chosen(outputs, truths).flatten()]
    if int(outputs[0, 0, -READS]) == SOFTMAX:
        return labels
    classes = outputs.shape[2] - MOVES - READS - 1
    return (labels[:, None] == torch.arange(1, classes + 1, device=labels.device)).long().flatten()


def _chosen(outputs: Tensor, truths: Tensor) -> Tensor:
    """Return a mask of the anchors to distil (batch, anchors): those near objects, and every EVERY-th."""
    near = torch.stack([_overlaps(image, boxes)[0] >= NEAR for image, boxes in zip(outputs, truths, strict=True)])
    near[:, ::EVERY] = True
    return near


def _overlaps(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each anchor's largest IoU with a box and that box's label, from 1; both are 0 where there is no box."""
    target = target_of(boxes)
    anchors = box_convert(image[:, 1 - READS :].detach().float() * PIXELS, "cxcywh", "xyxy")
    if not len(target["boxes"]):
        none = torch.zeros(len(image), device=image.device)
        return none, none.long()
    best, which = box_iou(target["boxes"], anchors).max(dim=0)
    return best, target["labels"][which]


def _labels(image: Tensor, boxes: Tensor) -> Tensor:
    best, labels = _overlaps(image, boxes)
    return torch.where(best >= 0.5, labels, 0)


def places(outputs: Tensor, taught: Tensor) -> Tensor:
    """Return the smooth L1 distance between student's and teacher's box moves, summed over the four.

    It is the mean over the anchors where the teacher's class probability is at least SURE.
    """
    sure = _sure(taught)
    mine, its = (part[..., -MOVES - READS : -READS][sure].float() for part in (outputs, taught))
    return F.smooth_l1_loss(mine, its, reduction="sum") / sure.sum().clamp(min=1)


def count_sure(taught: Tensor) -> Tensor:
    """Return the number of anchors where the teacher is sure."""
    return _sure(taught).sum()


def _sure(taught: Tensor) -> Tensor:
    """Return a mask of the anchors where the teacher is sure (batch, anchors)."""
    logits, kind = taught[..., : -MOVES - READS].float(), int(taught[0, 0, -READS])
    known = logits.softmax(dim=2)[..., 1:] if kind == SOFTMAX else logits[..., 1:].sigmoid()
    known = (known * logits[..., :1].sigmoid()).sqrt() if kind == CENTRED else known
    return known.amax(dim=2) >= SURE


DETECTION = Task(
    OUTPUT,
    open_boxes,
    write_boxes,
    detection_loss,
    rows=rows,
    truth_rows=truth_rows,
    loss_count=count_objects,
    row_count=count_chosen,
    places=places,
    places_count=count_sure,
    smooths=False,
    blank=blank,
)
