"""Open a data set of images with one label each, or with none yet, and write its validation images."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.data.dataset import Dataset, Parts, TruthKind, open_images
from compress.data.images import ArrayImages, images_of
from compress.data.named import DATA_SETS, Arrays
from compress.data.settings import DataSettings
from compress.data.validation import copied, new_folder
from compress.logs.stage_log import say
from export.errors import DataError
from export.images.preprocess import Preprocess


def _arrays(settings: DataSettings, _: Preprocess) -> Parts | None:
    if (open_arrays := DATA_SETS[settings.name].arrays) is None:
        return None
    found = open_arrays(settings.path)
    return _images(found.train), None if found.val is None else _images(found.val), found.classes


def _images(arrays: Arrays) -> ArrayImages:
    return ArrayImages(arrays.images, torch.from_numpy(arrays.labels.astype(np.int64)))


def _notes(dataset: Dataset) -> tuple[str, ...]:
    """Raise DataError where broken images empty a class or the validation set; log classes without validation."""
    untrained, unjudged = (
        [name for label, name in enumerate(dataset.classes) if label not in present]
        for present in (set(images.labels.tolist()) for images in (dataset.train, dataset.val))
    )
    if untrained:
        raise DataError(f"class {untrained[0]!r}: none of its training images can be read; repair them or remove it")
    if len(dataset.val) == 0:
        raise DataError("validation: none of its images can be read; repair them or give other ones")
    if unjudged:
        say(f"validation has no image of {len(unjudged):,} classes, {unjudged[0]} first")
    return ()


_LABELS = TruthKind(
    lambda listing, rows, settings, _: images_of(listing, rows, skip_broken=settings.skip_broken),
    _arrays,
    missing="has no label per image, so it is not for classification: set another task or data set",
    one_label=True,
    notes=_notes,
)
open_dataset = partial(open_images, kind=_LABELS)
_UNKNOWN = TruthKind(
    _LABELS.files,
    lambda _settings, _preprocess: None,
    missing="has labels, or is no plain folder of images: set the task that it is for, or give such a folder (DATA=)",
)
open_unlabelled = partial(open_images, kind=_UNKNOWN)


def relabelled(dataset: Dataset, classes: tuple[str, ...], train: Tensor, val: Tensor) -> Dataset:
    """Return a data set of `open_unlabelled` with a teacher's labels for its training and validation images, int64 (n,)."""
    return replace(
        dataset,
        classes=classes,
        train=replace(dataset.train, labels=train[dataset.train.labels]),
        val=replace(dataset.val, labels=val[dataset.val.labels]),
        held_out=replace(dataset.held_out, labels=val),
    )


def write_validation(dataset: Dataset, folder: Path) -> int:
    """Write each validation image to a folder named like its class; return the number of images.

    Files are copied as they are. If a class's name cannot name a folder, all folders are numbered in the classes' order.
    Raises DataError where the folder exists.
    """
    plain = all(Path(name).name == name for name in dataset.classes)
    names = dataset.classes if plain else [f"class_{index:04d}" for index in range(len(dataset.classes))]
    labels = dataset.held_out.labels.tolist()
    held = set(labels)
    with new_folder(folder) as partial:
        # A class without an image gets a folder only where folders are numbered.
        for name in [name for label, name in enumerate(names) if label in held or not plain]:
            (partial / name).mkdir()
        return sum(1 for _ in copied(dataset.held_out, lambda index: partial / names[labels[index]]))
