"""Find images with their boxes in COCO's JSON, YOLO's text files or Pascal VOC's XML; the rules are in docs/detection.md."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.errors import DataError
from export.images import coco, voc, yolo
from export.images.box_listing import BoxListing
from export.images.decode import require_pillow
from export.images.folders import check_folder
from export.images.preprocess import Preprocess
from export.images.read import Examples, file_examples, match


def list_boxes(root: Path) -> BoxListing:
    """List a folder in one of the three formats. Raises DataError for other layouts and for boxes that cannot be used."""
    check_folder(root)
    if (root / voc.FOLDER).is_dir():
        return voc.list_voc(root)
    if files := coco.coco_files(root):
        return coco.list_coco(root, files)
    if yolo.yolo_splits(root):
        return yolo.list_yolo(root)
    raise DataError(
        f"{root}: has no boxes in a known layout: give COCO's {coco.FOLDER}/*.json, YOLO's images/ and {yolo.FOLDER}/, or Pascal VOC's "
        f"JPEGImages/ and {voc.FOLDER}/"
    )


def box_examples(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of a folder (of its validation split, if it has one) with their boxes; classes match `labels` by name.

    Raises DataError for data that do not fit.
    """
    require_pillow(data)
    listing = list_boxes(data)
    places, notes = match(data, listing.classes, labels)
    truths = listing.truths(listing.judged, seen_by=preprocess)
    real = truths[..., 0] >= 0
    truths[real, 0] = np.array(places, np.float32)[truths[real, 0].astype(int)]
    return file_examples(listing, truths, preprocess, notes)
