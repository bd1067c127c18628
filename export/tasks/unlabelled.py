"""Classification of images that nobody has labelled: the truth is what the teacher predicts, the score how often a file predicts the same."""

from dataclasses import replace
from pathlib import Path

from export.errors import DataError
from export.images.folders import Listing, image_splits
from export.tasks.classification import CLASSIFICATION
from export.tasks.task import Metric

UNKNOWN = -1  # the label of an image that no teacher has seen yet


def list_images(root: Path) -> Listing:
    """List the images of a folder, at any depth, with the split that it brings. Raises DataError where there are none."""
    train, val = image_splits(root)
    if not train or val == []:
        raise DataError(f"{root}: holds no images to {'train on' if not train else 'judge by'}; add some")
    found = None if val is None else tuple((path, UNKNOWN) for path in val)
    return Listing(root, (), tuple((path, UNKNOWN) for path in train), found)


UNLABELLED = replace(
    CLASSIFICATION,
    name="unlabelled",
    metric=Metric("agreement", "agreement with the teacher", CLASSIFICATION.metric.alike),
    listing=list_images,
    labelled=False,
)
