"""Open a data set of images with boxes, move the boxes with an image's view, and write its validation images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.dataset import Dataset, TruthKind, drawn, known, open_images
from compress.data.images import ArrayImages, FileImages, from_files
from compress.data.scenes import CLASSES, Scenes
from compress.data.settings import DataSettings
from compress.data.stored import Stored
from compress.data.validation import copied, new_folder
from compress.data.views import Boxes
from export.errors import first
from export.images.box_listing import BoxListing, framed_boxes, table_of
from export.images.listing import Pair, count
from export.images.orientation import read_header
from export.images.preprocess import Preprocess
from export.images.size import Size

Frame = Stored | None  # the stored images, for their sizes


@dataclass(frozen=True)
class PlacedBoxes:
    """Boxes float32 (n, most of one image, 6): class (-1 for none), corners as fractions of the image, crowd.

    `framed` are the same as fractions of evaluation's input. `frames` are the evaluation images and the whole ones, once they are in
    memory; before that, `files` are.
    """

    boxes: Tensor
    framed: Tensor
    files: FileImages | None = None
    frames: tuple[Frame, Frame] = (None, None)

    def take(self, chosen: np.ndarray) -> "PlacedBoxes":
        """Return the boxes of these images, without rows that none of them has."""
        boxes, framed = (part[torch.from_numpy(chosen)] for part in (self.boxes, self.framed))
        most = max([1, *(boxes[..., 0] >= 0).sum(dim=1).tolist()])
        return PlacedBoxes(boxes[:, :most], framed[:, :most], self.files and self.files.take(chosen))

    def begin(self, _area: int) -> "PlacedBoxes":
        """Return self: boxes are in memory already."""
        return self

    def put_(self, _index: int, _kept: tuple[int, int]) -> None:
        """Do nothing: fractions of an image do not depend on its size."""

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "PlacedBoxes":
        """Return the boxes of the images that were not broken."""
        kept = torch.from_numpy(good)
        return PlacedBoxes(self.boxes[kept], self.framed[kept], None, (still, whole))

    def still(self, chosen: Tensor) -> Tensor:
        """Return the boxes (m, most, 6) in evaluation images."""
        return self.framed[chosen]

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the boxes in the view, on its device; boxes whose centre lies outside get class -1."""
        frame = self._sizes(chosen, size, whole=whole).to(boxes.top.device)  # (m, 2): height, width
        found = (self.boxes if whole else self.framed)[chosen].to(boxes.top.device, copy=True)
        start, length = torch.stack([boxes.left, boxes.top], 1), torch.stack([boxes.width, boxes.height], 1)
        corners = found[..., 1:5].unflatten(2, (2, 2))  # (m, most, corner, x and y)
        corners = (corners * frame.flip(1)[:, None, None] - start[:, None, None]) / length[:, None, None]
        across = torch.where(boxes.mirrored[:, None, None], 1 - corners[..., 0].flip(2), corners[..., 0])
        corners = torch.stack([across, corners[..., 1]], dim=3)
        middle = corners.mean(dim=2)
        outside = ((middle < 0) | (middle > 1)).any(dim=2)
        found[..., 1:5] = corners.clamp(0, 1).flatten(2)
        found[..., 0] = torch.where(outside, -1.0, found[..., 0])
        return found

    def _sizes(self, chosen: Tensor, size: Size, *, whole: bool) -> Tensor:
        """Return the heights and widths (m, 2) of the images that the view's boxes were drawn in."""
        if (stored := self.frames[whole]) is not None:
            return stored.kept[chosen]
        if not whole or self.files is None:
            return torch.tensor(size).expand(len(chosen), 2)
        headers = [read_header(self.files.root / self.files.name(index)) for index in chosen.tolist()]
        return torch.tensor([header.upright[::-1] for header in headers])


def _files(listing: BoxListing, files: Sequence[Pair], settings: DataSettings, preprocess: Preprocess) -> FileImages:
    names, labels = [path for path, _ in files], torch.zeros(len(files), dtype=torch.int64)
    images = from_files(listing.root, names, labels, skip_broken=settings.skip_broken)
    boxes, framed = (torch.from_numpy(listing.truths(files, seen_by=seen)) for seen in (None, preprocess))
    return replace(images, placed=PlacedBoxes(boxes, framed, images))


def _scenes(scenes: Scenes, preprocess: Preprocess) -> ArrayImages:
    size = preprocess.image_size[0]
    table = [
        np.column_stack([one[:, 4:] - 1, one[:, :4] / size, np.zeros(len(one))]).astype(np.float32)
        for one in scenes.boxes
    ]
    labels, boxes = torch.zeros(len(table), dtype=torch.int64), table_of(table)
    framed = framed_boxes(boxes, [scenes.images.shape[1:3]] * len(boxes), preprocess)
    return ArrayImages(scenes.images, labels, placed=PlacedBoxes(torch.from_numpy(boxes), torch.from_numpy(framed)))


def _stretched(settings: DataSettings, _: object) -> Preprocess:
    stretch = settings.look.letterbox == "none"
    return Preprocess(settings.size, settings.size, settings.mean, settings.std, stretch=stretch, look=settings.look)


def _notes(dataset: Dataset) -> tuple[str, ...]:
    placed = dataset.train.placed
    assert isinstance(placed, PlacedBoxes)
    seen = set(placed.boxes[placed.boxes[..., 5] == 0][:, 0].tolist())  # without crowds, which train nothing
    missing = [name for label, name in enumerate(dataset.classes) if label not in seen]
    return (f"no training image has a box of {count(missing, 'class')}: {first(missing)}",) if missing else ()


_BOXES = TruthKind(
    _files,
    drawn(_scenes, CLASSES[1:]),
    missing=known("boxes", "detection"),
    moving="boxes",
    preprocess=_stretched,
    notes=_notes,
)
open_boxes = partial(open_images, kind=_BOXES)


def write_boxes(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their boxes as a folder in COCO's format; return the number of images.

    Files are copied as they are. Raises DataError where the folder exists.
    """
    placed = dataset.held_out.placed
    assert isinstance(placed, PlacedBoxes)
    listed, drawn = list[dict[str, Any]](), list[dict[str, Any]]()
    with new_folder(folder) as partial:
        (partial / "val").mkdir()
        for index, image, file in copied(dataset.held_out, lambda _: partial / "val"):
            wide, high = image.size
            listed.append({"id": index, "file_name": file.name, "width": wide, "height": high})
            for label, left, top, right, bottom, crowd in placed.boxes[index].double().tolist():
                if label >= 0:
                    box = [left * wide, top * high, (right - left) * wide, (bottom - top) * high]
                    entry = {"id": len(drawn) + 1, "image_id": index, "category_id": int(label) + 1, "bbox": box}
                    drawn.append(entry | {"area": box[2] * box[3], "iscrowd": int(crowd)})
        categories = [{"id": place, "name": name} for place, name in enumerate(dataset.classes, 1)]
        document = {"images": listed, "annotations": drawn, "categories": categories}
        (partial / "annotations").mkdir()
        (partial / "annotations" / "instances_val.json").write_text(json.dumps(document))
    return len(listed)
