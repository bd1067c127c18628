"""From a detector's outputs to boxes: built-in functions by name, or the user's own, traced to a graph of their own.

A function takes the network's output, or its outputs by name, the input's (height, width) and the number of classes. It returns boxes
(n, rows, 4), left, top, right and bottom as fractions of the input, and scores (n, rows, classes) from 0 to 1, or scores (n, rows) with
labels (n, rows). It must consist of torch's operations.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from compress.errors import ModelError
from compress.models.digest import existing_file
from export.errors import UserError
from export.images.size import Size
from export.onnx_file.outputs import Output, columns
from export.onnx_file.to_onnx import graph_to_onnx
from export.runtime.own import import_file
from export.tasks.boxes import Limits
from export.tasks.decoder import GIVES, Decoder, as_file

Outputs = Tensor | Mapping[str, Tensor]
Function = Callable[[Any, Size, int], Sequence[Tensor]]
STRIDES = (8, 16, 32)  # YOLOX's
CHOSEN_FROM = ("enc_outputs_class", "enc_outputs_coord_logits")  # as transformers calls them
CLOSE = 1e-4  # largest difference of the graph's scores and boxes


def dense(outputs: Tensor, size: Size, classes: int) -> Sequence[Tensor]:
    """Return the boxes of rows with centre and size in pixels, maybe the chance of an object, and each class's score.

    They are (n, 4 + classes, rows) as exports of anchor-free networks, or (n, rows, 5 + classes) as of older ones; either way round.
    """
    widths = (4 + classes, 5 + classes)
    if outputs.dim() != 3 or not {outputs.shape[1], outputs.shape[2]} & {*widths}:
        raise ModelError(
            f"decode: dense: reads (n, rows, {widths[0]} or {widths[1]}) or its transpose for {classes} classes, got "
            f"{tuple(outputs.shape)}: give your own FILE.py:function"
        )
    rows = outputs if outputs.shape[2] in widths else outputs.transpose(1, 2)
    scores = rows[..., -classes:] * (rows[..., 4:5] if rows.shape[2] == widths[1] else 1)
    scale = torch.tensor([size[1], size[0]] * 2, dtype=rows.dtype, device=rows.device)
    return box_convert(rows[..., :4] / scale, "cxcywh", "xyxy"), scores


def cells(size: Size) -> tuple[Tensor, Tensor]:
    """Return the column and line of each of YOLOX's rows, in strides (rows, 2), and its stride in pixels (rows, 1)."""
    sides = [(size[0] // stride, size[1] // stride) for stride in STRIDES]
    grid = [torch.cartesian_prod(torch.arange(high), torch.arange(wide)).flip(1) for high, wide in sides]
    stride = torch.cat([torch.full((len(one), 1), each) for one, each in zip(grid, STRIDES, strict=True)])
    return torch.cat(grid), stride


def yolox(outputs: Tensor, size: Size, classes: int) -> Sequence[Tensor]:
    """Return the boxes of YOLOX's undecoded rows (Ge 2021): places and logarithms of sizes in strides, objectness, classes (n, rows, 5 + classes)."""
    places, stride = (part.to(outputs.device, outputs.dtype) for part in cells(size))
    if outputs.dim() != 3 or outputs.shape[1:] != (len(places), 5 + classes):
        raise ModelError(
            f"decode: yolox: reads (n, {len(places)}, {5 + classes}) for {classes} classes, got "
            f"{tuple(outputs.shape)}: export with decode_in_inference=False, or use dense"
        )
    scale = torch.tensor([size[1], size[0]], dtype=outputs.dtype, device=outputs.device)
    centre, sides = (outputs[..., :2] + places) * stride / scale, outputs[..., 2:4].exp() * stride / scale
    return box_convert(torch.cat([centre, sides], 2), "cxcywh", "xyxy"), outputs[..., 4:5] * outputs[..., 5:]


def queries(outputs: Mapping[str, Tensor], _size: Size, classes: int) -> Sequence[Tensor]:
    """Return the boxes of a DETR's queries (Carion 2020): `logits`, by softmax with a last column for nothing or by sigmoids, and `pred_boxes`."""
    logits, boxes = outputs["logits"], outputs["pred_boxes"]
    scores = logits.softmax(2)[..., :-1] if logits.shape[2] == classes + 1 else logits.sigmoid()
    return box_convert(boxes, "cxcywh", "xyxy"), scores


DECODES: Mapping[str, Function] = {"dense": dense, "yolox": yolox, "queries": queries}


def function_of(text: str, *, trust_code: bool) -> Function:
    """Return a built-in function by name, or `FILE.py:function`, whose file runs only with `trust_code`."""
    if text in DECODES:
        return DECODES[text]
    path, _, name = text.rpartition(":")
    file = existing_file(path, "the file of decode")
    if not trust_code:
        raise ModelError(f"decode: {text}: using it runs that file; read it first, then add --trust-code")
    try:
        found: Function | None = getattr(import_file(Path(file)), name, None)
    except UserError as error:
        raise ModelError(str(error)) from error
    if not callable(found):
        raise ModelError(f"decode: {file} defines no function {name}: name one of its functions")
    return found


class Decode(nn.Module):
    """A function for the outputs of one network; several lie side by side."""

    def __init__(self, function: Function, outputs: Sequence[Output], size: Size, classes: int) -> None:
        super().__init__()
        self.function, self.outputs, self.size, self.classes = function, tuple(outputs), size, classes

    def forward(self, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes (n, rows, 4) and scores (n, rows, classes) for each output."""
        names = [one.name for one in self.outputs]
        given: Outputs = outputs[0] if len(outputs) == 1 else dict(zip(names, outputs, strict=True))
        found = self.function(given, self.size, self.classes)
        if not isinstance(found, tuple | list) or len(found) not in (2, 3):
            raise ModelError(
                f"decode: must return boxes and scores, or boxes, scores and labels, got {type(found).__name__}"
            )
        boxes, scores = found[:2]
        if len(found) == 3:
            scores = scores.unsqueeze(2) * F.one_hot(found[2].long(), self.classes)
        if boxes.dim() != 3 or boxes.shape[2] != 4 or scores.shape != (*boxes.shape[:2], self.classes):
            raise ModelError(
                f"decode: must return boxes (n, rows, 4) and scores (n, rows, {self.classes}), got {tuple(boxes.shape)} and "
                f"{tuple(scores.shape)}"
            )
        return boxes, scores

    def packed(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same for a network's one tensor, in which several outputs lie side by side."""
        if len(self.outputs) == 1:
            return self.forward(outputs)
        return self.forward(*self.parts(outputs).values())

    def learned(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, followed by the rows from which top-k chose the queries where they are outputs: only they teach what to choose."""
        boxes, scores = self.packed(outputs)
        shapes = {one.name: one.shape for one in self.outputs}
        if self.function is not queries or not set(CHOSEN_FROM) <= set(shapes):
            return boxes, scores
        if shapes[CHOSEN_FROM[0]][0] <= boxes.shape[1]:  # RF-DETR's are chosen already
            return boxes, scores
        classes, places = (self.parts(outputs)[name] for name in CHOSEN_FROM)
        more = self.function({"logits": classes, "pred_boxes": places.sigmoid()}, self.size, self.classes)
        return torch.cat([boxes, more[0]], 1), torch.cat([scores, more[1]], 1)

    def parts(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return a network's outputs by name, of one tensor in which they lie side by side."""
        places = columns(self.outputs)
        return {one.name: outputs[:, places[one.name]].reshape(-1, *one.shape) for one in self.outputs}


@torch.no_grad()
def decoder_of(decode: Decode, limits: Limits, outputs: Tensor) -> Decoder:
    """Return the function as a graph, compared with it on a network's `outputs` (n, ...); ModelError where it cannot be one."""
    boxes, scores = decode.eval().packed(outputs)
    if not (boxes.isfinite().all() and scores.isfinite().all() and scores.min() >= 0 and scores.max() <= 1):
        raise ModelError(
            f"decode: must return finite boxes, and scores from 0 to 1, got {float(scores.min()):.3g} to {float(scores.max()):.3g}: "
            "apply a sigmoid or softmax to logits"
        )
    model = graph_to_onnx(decode, [(one.name, one.shape) for one in decode.outputs], GIVES)
    found = as_file(model, limits)
    for one, other in zip(found.run(outputs.cpu().numpy()), (boxes, scores), strict=True):
        off = float((torch.from_numpy(one) - other.cpu()).abs().max())
        if not off <= CLOSE * max(1.0, float(other.abs().max())):
            raise ModelError(
                f"decode: its graph differs from the function by up to {off:.2g}: use only torch's operations"
            )
    return found
