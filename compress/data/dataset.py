"""Open a data set: its images, split, classes and preprocessing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.data import images
from compress.data.digest import NATIVE_SIZE, dataset_digest, folder_of
from compress.data.folders import Listing, list_folder
from compress.data.images import ImageSet
from compress.data.named import NAMED, Arrays, NamedSet
from compress.data.preprocess import Preprocess
from compress.data.split import held_out, limited
from compress.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Images to train on, images to judge by, and what turns them into the network's input."""

    name: str
    train: ImageSet
    val: ImageSet
    classes: tuple[str, ...]
    preprocess: Preprocess
    digest: str


def open_dataset(
    name: str,
    path: Path | None,
    *,
    image_size: int | None,
    resize: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    val_fraction: float,
    limit_per_class: int | None,
    skip_broken: bool,
    seed: int,
) -> Dataset:
    """Open a data set by name; decode it into memory where it fits, so that every broken image is found now.

    Without a validation set of its own, a fraction of each class is held out by seed. `limit_per_class` limits training only.
    Raises `DataError` for data that are missing, unreadable or cannot be split.
    """
    digest = dataset_digest(
        name,
        path,
        image_size=image_size,
        resize=resize,
        mean=mean,
        std=std,
        val_fraction=val_fraction,
        limit_per_class=limit_per_class,
        skip_broken=skip_broken,
        seed=seed,
    )
    preprocess = Preprocess(image_size or NATIVE_SIZE[name], resize, mean, std)
    found = list_folder(folder_of(path)) if name == "imagefolder" else NAMED[name](path)
    split = _Split(found.classes, val_fraction, limit_per_class, seed)
    if isinstance(found, Listing):
        train, val = _from_listing(found, split, preprocess, skip_broken=skip_broken)
    else:
        train, val = _from_arrays(found, split, preprocess)
    _refuse_lost_classes(train, found.classes)
    return Dataset(name, train, val, found.classes, preprocess, digest)


@dataclass(frozen=True)
class _Split:
    classes: tuple[str, ...]
    val_fraction: float
    limit_per_class: int | None
    seed: int

    def masks(self, labels: np.ndarray, *, has_val: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the training images (n,) are trained on, and which are held out."""
        none = np.zeros(len(labels), dtype=bool)
        val = none if has_val else held_out(labels, self.classes, fraction=self.val_fraction, seed=self.seed)
        train = ~val
        if self.limit_per_class is not None:
            rest = np.flatnonzero(train)
            train = none.copy()
            train[rest[limited(labels[rest], len(self.classes), per_class=self.limit_per_class, seed=self.seed)]] = True
        return train, val


def _from_arrays(found: NamedSet, split: _Split, preprocess: Preprocess) -> tuple[ImageSet, ImageSet]:
    train_mask, val_mask = split.masks(found.train.labels, has_val=found.val is not None)
    train = Arrays(found.train.images[train_mask], found.train.labels[train_mask])
    val = found.val or Arrays(found.train.images[val_mask], found.train.labels[val_mask])
    return (
        images.from_arrays(train.images, train.labels, preprocess, side=preprocess.resize_to),
        images.from_arrays(val.images, val.labels, preprocess, side=preprocess.image_size),
    )


def _from_listing(
    found: Listing, split: _Split, preprocess: Preprocess, *, skip_broken: bool
) -> tuple[ImageSet, ImageSet]:
    labels = np.array([label for _, label in found.train])
    train_mask, val_mask = split.masks(labels, has_val=found.val is not None)
    held = tuple(file for file, chosen in zip(found.train, val_mask, strict=True) if chosen)
    kept = tuple(file for file, chosen in zip(found.train, train_mask, strict=True) if chosen)
    train = images.from_files(found.root, kept, skip_broken=skip_broken)
    val = images.from_files(found.root, held if found.val is None else found.val, skip_broken=skip_broken)
    needed = 3 * (len(train) * preprocess.resize_to**2 + len(val) * preprocess.image_size**2)
    if needed > images.MEMORY_BYTES:
        return train, val
    return (
        images.decode_all(train, preprocess, side=preprocess.resize_to),
        images.decode_all(val, preprocess, side=preprocess.image_size),
    )


def _refuse_lost_classes(train: ImageSet, classes: tuple[str, ...]) -> None:
    present = set(train.labels.tolist())
    lost = [name for label, name in enumerate(classes) if label not in present]
    if lost:
        raise DataError(f"class {lost[0]!r}: none of its training images can be read; repair them or remove the class")
