"""The loss from labels of a detector's own library, computed from the outputs that the network serves: of transformers, and of YOLOX."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from compress.models.decodes import CHOSEN_FROM, Decode, cells, queries, yolox
from compress.tasks.detection import target_of
from export.images.size import Size

Loss = Callable[..., Tensor]  # (outputs, truths, label_smoothing=) to ()
LEAST, MOST = 1e-30, 1 - 2**-24  # probabilities in float32 whose logits are finite


def own_loss(network: nn.Module, decode: Decode) -> Loss | None:
    """Return the loss of the network's class, None where it has none."""
    if decode.function is queries:
        return _of_transformers(network, decode)
    return _of_yolox(network, decode.size) if decode.function is yolox else None


def _of_transformers(network: nn.Module, decode: Decode) -> Loss | None:
    """Return transformers' loss of a detector's last layer; that of the layers before and of denoising needs what is not served."""
    names = [one.name for one in decode.outputs]
    compare, config = getattr(network, "loss_function", None), copy.copy(getattr(network, "config", None))
    grouped = hasattr(config, "group_detr")  # in training LW-DETR and RF-DETR have groups of queries
    if not type(network).__name__.endswith("ForObjectDetection") or compare is None or config is None:
        return None
    if grouped and not set(CHOSEN_FROM) <= set(names):
        return None
    for name, value in {"auxiliary_loss": False, **({"group_detr": 1} if grouped else {})}.items():
        setattr(config, name, value)

    def loss(outputs: Tensor, truths: Tensor, *, label_smoothing: float) -> Tensor:
        assert not label_smoothing, "refused, as detection has none"
        found = decode.parts(outputs.float())
        more = dict(zip(("enc_outputs_class", "enc_outputs_coord"), map(found.get, CHOSEN_FROM), strict=True))
        targets = [target_of(boxes, 1.0) for boxes in truths]
        labels = [
            {"class_labels": one["labels"] - 1, "boxes": box_convert(one["boxes"], "xyxy", "cxcywh")} for one in targets
        ]
        total: Tensor
        total, *_ = compare(
            found["logits"], labels, outputs.device, found["pred_boxes"], config, **(more if grouped else {})
        )
        return total

    return loss


def _of_yolox(network: nn.Module, size: Size) -> Loss | None:
    """Return the loss of YOLOX's head (Ge 2021): IoU, objectness and classes of the rows that SimOTA assigns to objects, L1 if it is set to."""
    compare = getattr(getattr(network, "head", None), "get_losses", None)
    if compare is None:
        return None

    def loss(outputs: Tensor, truths: Tensor, *, label_smoothing: float) -> Tensor:
        assert not label_smoothing, "refused, as detection has none"
        rows = outputs.float()
        places, strides = (part.to(rows) for part in cells(size))
        boxes = [(rows[..., :2] + places) * strides, rows[..., 2:4].exp() * strides]
        logits = rows[..., 4:].clamp(LEAST, MOST).logit()  # of objectness and classes
        columns, lines, along = [places[:, :1].T], [places[:, 1:].T], [strides.T]  # (1, rows), of all levels at once
        labels, decoded = yolox_labels(truths, size), torch.cat([*boxes, logits], 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the package calls torch.cuda.amp.autocast
            total: Tensor
            total, *_ = compare(None, columns, lines, along, labels, decoded, [rows[..., :4]], rows.dtype)
        return total

    return loss


def yolox_labels(truths: Tensor, size: Size) -> Tensor:
    """Return boxes (n, most, 5) as YOLOX's loss wants them: class, centre and size in pixels, zeros where there is none."""
    scale = torch.tensor([size[1], size[0]] * 2, device=truths.device)
    found = torch.cat([truths[..., :1], box_convert(truths[..., 1:5] * scale, "xyxy", "cxcywh")], 2)
    real = (truths[..., 0] >= 0) & (truths[..., 5] == 0) & (found[..., 3:].amin(2) >= 1)
    order = real.long().argsort(
        dim=1, descending=True, stable=True
    )  # the package counts the rows before the first zeros
    return (found * real[..., None]).gather(1, order[..., None].expand(-1, -1, 5))
