"""Classification of unlabelled images: the truth is the teacher's prediction, the score is the agreement with it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.errors import DataError
from export.images.folders import FolderListing, image_splits, list_folder
from export.images.listing import NO_LABEL
from export.images.preprocess import Preprocess
from export.images.read import Examples, file_examples, find_examples
from export.tasks.classification import CLASSIFICATION
from export.tasks.task import Metric


def list_images(root: Path) -> FolderListing:
    """List the images of a folder, at any depth, with its split if it has one; DataError if there are none."""
    train, val = image_splits(root)
    if not train or val == []:
        raise DataError(f"{root}: has no images to {'train on' if not train else 'validate on'}; add some")
    found = None if val is None else tuple((path, NO_LABEL) for path in val)
    return FolderListing(root, (), tuple((path, NO_LABEL) for path in train), found)


def find_images(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of a folder, with their labels if its class folders are `labels` (as `compress export-data` writes them), else NO_LABEL.

    Raises DataError if there are none.
    """
    with suppress(DataError):
        if data.suffix == ".npz" or set(list_folder(data).classes) <= set(labels):
            return find_examples(data, preprocess, labels)
    return without_labels(data, preprocess)


def without_labels(data: Path, preprocess: Preprocess) -> Examples:
    """Return the images of a folder (of its validation split, if it has one), each with NO_LABEL; DataError if there are none."""
    listing = list_images(data)
    return file_examples(listing, np.full(len(listing.judged), NO_LABEL), preprocess)


UNLABELLED = replace(
    CLASSIFICATION,
    name="unlabelled",
    metric=Metric("agreement", "agreement with the teacher", CLASSIFICATION.metric.alike),
    listing=list_images,
    examples=find_images,
    labelled=False,
    hub=("image-classification", "agreement"),
)
