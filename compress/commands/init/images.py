"""Look at a folder of images: its task, classes, sizes, channels, and what cannot be read."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.data.digest import shards_in
from compress.data.images import FileImages, from_files, images_of
from compress.data.shards import Rows, ShardListing
from compress.data.teachers import foreign
from compress.errors import CompressError
from compress.models.published import Published
from compress.models.recognize import Match
from export.errors import DataError
from export.images.box_listing import BoxListing
from export.images.decode import RGB, BrokenImage, Pixel
from export.images.folders import FolderListing, list_folder
from export.images.listing import TRAIN, VAL_NAMES
from export.images.masks import MaskListing, are_binary, read_mask, values_of_masks
from export.images.preprocess import IGNORED, Look, Preprocess
from export.images.read import spread
from export.images.size import Size
from export.images.tables import TableListing
from export.tasks import TASKS
from export.tasks.task import Array
from export.tasks.unlabelled import list_images

SEEN = Path("runs", ".images")  # the cache of shard contents that a later run uses
LOOKED_AT = 200  # images opened, spread over the folder
ELSE = {
    "segmentation": "torchvision:lraspp_mobilenet_v3_large",
    "detection": "torchvision:ssdlite320_mobilenet_v3_large",
}


@dataclass(frozen=True)
class Folder:
    """The images of a folder, and what opening some of them showed: their sizes, and the broken ones with the reason."""

    task: str
    listing: FolderListing | ShardListing | MaskListing | BoxListing | TableListing
    sizes: list[Size]  # of each opened image
    broken: dict[str, str]
    stored: Counter[Pixel]  # channels and bits of those opened
    pixel: Pixel = RGB  # as the network takes them
    ignored: int | None = None  # the value of mask pixels that are no class, where it is not 255
    binary: bool = False  # masks of two classes that have 0 and 255

    @property
    def is_labelled(self) -> bool:
        """Whether the images have labels; otherwise the network's predictions take their place."""
        return bool(self.listing.classes)

    @property
    def sides(self) -> list[int]:
        """The shorter side of each opened image."""
        return [min(size) for size in self.sizes]

    @property
    def own(self) -> Size:
        """The opened images' median height and width."""
        return int(np.median([height for height, _ in self.sizes])), int(np.median([width for _, width in self.sizes]))

    @property
    def train(self) -> int:
        """The number of training images."""
        return len(self.listing.train) if self.listing.val is not None else round(0.8 * len(self.listing.train))

    @property
    def val(self) -> int:
        """The number of validation images."""
        return len(self.listing.train) - self.train if self.listing.val is None else len(self.listing.val)

    def _rows(self, *, judged: bool) -> Any:
        listing = self.listing
        return listing.val if listing.val and (judged or not listing.train) else listing.train

    def images(self, *, judged: bool = False) -> FileImages:
        """Return the training images, or the validation images if `judged` and there are any."""
        rows, listing = self._rows(judged=judged), self.listing
        if isinstance(listing, FolderListing | ShardListing):
            return replace(images_of(listing, rows), pixel=self.pixel)
        labels = torch.zeros(len(rows), dtype=torch.int64)
        return replace(
            from_files(listing.root, [path for path, _ in rows], labels, skip_broken=False), pixel=self.pixel
        )

    def truths(self, chosen: Sequence[int], preprocess: Preprocess) -> Array:
        """Return the truths of some judged images as the task scores them, (n, …); BrokenImage for a mask that does not fit."""
        listing, rows = self.listing, self._rows(judged=True)
        if isinstance(rows, Rows):
            return rows.labels[list(chosen)]
        picked = [rows[index] for index in chosen]
        if isinstance(listing, MaskListing):
            paths = [(listing.root / mask, listing.root / image) for image, mask in picked]
            found = [read_mask(*pair, classes=len(listing.classes), preprocess=preprocess)[0] for pair in paths]
            return np.stack([preprocess.mask(mask) for mask in found])
        if isinstance(listing, BoxListing):
            return listing.truths(picked, seen_by=preprocess)
        if isinstance(listing, TableListing):
            return listing.truths(picked)
        return np.array([label for _, label in picked], np.int64)

    def prepared(
        self, size: Size, resize: float, normalize: Sequence[Sequence[float]], *, seen: Published | None = None
    ) -> Preprocess:
        """Return what becomes of an image, as the task's data sets are read; stretched, and by the kernel, as a network has `seen` it."""
        mean, std = (tuple(values) for values in normalize)
        if self.task == "detection":
            return Preprocess(size, size, mean, std, stretch=True)
        covered = round(size[0] * resize), round(size[1] * resize)
        return Preprocess(
            size,
            covered,
            mean,
            std,
            bits=self.pixel.bits,
            ignore_index=self.ignored,
            binary_masks=self.binary,
            stretch=seen is not None and seen.stretch,
            look=seen.look if seen else Look(),
        )


def task_of_images(data: Path, match: Match, kind: str, weights: str) -> str:
    """Return the task of a folder's images for a network of this kind; CompressError where another kind is needed."""
    arch = match.arch
    if kind == "tensors" and match.classes:  # it ends unlike most classifiers, in a mean, yet may be one
        with suppress(DataError):
            return "classification" if len(_listed(data).classes) == match.classes else kind
    if foreign(arch) and kind in ELSE:  # its outputs alone tell, and they may be depths or tokens
        with suppress(DataError):
            TASKS[kind].listing(data)
            return kind
        return "tensors"
    if kind != "classification":
        return kind  # its reader says what a folder lacks
    with suppress(DataError):  # a labels.csv that says something else does not count
        TASKS["multilabel"].listing(data)
        return "multilabel"
    for name, other in ELSE.items():
        with suppress(DataError):
            TASKS[name].listing(data)
            raise CompressError(
                f"{data}: is a data set for {name}, but {weights} is {arch}, which gives an image one row of classes: give the "
                f"weights of a network for {name}, such as {other}"
            )
    return "classification"


def look_at(data: Path, task: str = "classification") -> Folder:
    """List the folder for a task and open some of its images; `unlabelled` takes the place of `classification` without class folders."""
    listing: Any = _listed(data) if task == "classification" else TASKS[task].listing(data)
    task = task if listing.classes or not TASKS[task].has_classes else "unlabelled"
    sizes, broken, stored = list[Size](), dict[str, str](), Counter[Pixel]()
    folder = Folder(task, listing, sizes, broken, stored)
    images = folder.images()
    for index in spread(len(images), LOOKED_AT):
        try:
            width, height = images.whole(index).size
            sizes.append((height, width))
            stored[images.stored(index) or RGB] += 1
        except BrokenImage as error:
            broken[images.name(index)] = str(error)
    if not sizes:
        raise CompressError(
            f"{data}: none of the {len(broken)} images opened can be read ({next(iter(broken.values()))})"
        )
    return _with_masks_read(folder)


def _with_masks_read(folder: Folder) -> Folder:
    """Return the folder with what the masks' values say: which of them is no class, and whether 255 is one."""
    listing = folder.listing
    if not isinstance(listing, MaskListing):
        return folder
    beyond = {value for value in values_of_masks(listing) if value >= len(listing.classes) and value != IGNORED}
    binary = len(listing.classes) == 2 and not beyond and are_binary(listing.root, listing.train)
    return replace(folder, ignored=beyond.pop() if len(beyond) == 1 else None, binary=binary)


def _listed(data: Path) -> Any:
    """List a folder's images, without labels if none lies in a class folder; DataError if it has another layout."""
    if (found := shards_in(data, SEEN)) is not None:
        return found.listing
    try:
        return list_folder(data)
    except DataError:
        with suppress(DataError):
            plain = list_images(data)
            parents = {Path(path).parent.as_posix().lower() for path, _ in (*plain.train, *(plain.val or ()))}
            if parents <= {".", TRAIN, *VAL_NAMES}:
                return plain
        raise


def as_taken(folder: Folder, channels: int, weights: str) -> Folder:
    """Return the folder with its images as a network of so many channels takes them.

    Raises CompressError if they have others. Three are made of any image.
    """
    ((most, _),) = folder.stored.most_common(1)
    if channels == 3:
        return folder
    if most.channels != channels or (channels == 4 and most.bits == 16):
        raise CompressError(
            f"{folder.listing.root}: most images have {most}, and {weights} takes {channels} channel{'s' * (channels > 1)}: give images or "
            "weights of the other's kind"
        )
    return replace(folder, pixel=most)
