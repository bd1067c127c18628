"""Open a data set whose truths are masks, boxes, or several labels for each image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from compress.data.augment import Augmentation
from compress.data.dataset import Dataset, copies, in_memory
from compress.data.digest import DataSettings, dataset_digest, given
from compress.data.images import ArrayImages, FileImages, Lazy, with_pixels
from compress.data.named import Folders
from compress.data.scenes import SCENES, Part, Scenes, draw_scenes
from compress.data.split import parts_of, split
from export.errors import DataError
from export.images.box_listing import BoxListing
from export.images.masks import MaskListing
from export.images.preprocess import Preprocess
from export.images.tables import TableListing
from export.tasks import TASKS

Listing = TypeVar("Listing", MaskListing, BoxListing, TableListing)


@dataclass(frozen=True)
class Planar(Generic[Listing]):
    """What differs between data sets with masks, boxes and several labels; `truths` is the kind's name for messages."""

    truths: str
    listing: type[Listing]
    scene_classes: tuple[str, ...]
    preprocess: Callable[[DataSettings, Listing | None], Preprocess]
    from_files: Callable[[Listing, Sequence[tuple[str, str]], DataSettings, Preprocess], FileImages]
    from_scenes: Callable[[Scenes, np.ndarray, Preprocess], ArrayImages]
    folders: Folders = field(default_factory=dict)
    """The data sets with such truths that have a name."""
    spoiled_by: tuple[str, ...] = ("randaugment", "mixup", "cutmix")
    """Random changes of images that would make the truths wrong."""
    notes: Callable[[Dataset], tuple[str, ...]] = lambda _: ()
    """Returns sentences on an opened data set's truths; raises DataError where nothing can be learned from them."""

    def open(self, settings: DataSettings, augmentation: Augmentation) -> Dataset:
        """Open a data set by name, as `open_dataset` does for labels.

        Without a validation set of its own, a fraction of the images is held out by seed. `limit_per_class` limits the
        number of training images. Raises DataError for data that are missing, unreadable or without such truths, and for
        random changes that would not move the truths.
        """
        still = [name for name in self.spoiled_by if getattr(augmentation, name)]
        if still:
            raise DataError(
                f"data.augment.{still[0]}: changes images but not their {self.truths}; use crop, flip and distort"
            )
        files = given(settings)
        if settings.unlabelled is not None:
            raise DataError("data.unlabelled: needs images with one label each: leave it out")
        listing = files.listing
        if (fetch := self.folders.get(settings.name)) is not None:
            listing = TASKS[settings.task].listing(fetch(settings.path))
        preprocess = self.preprocess(settings, listing if isinstance(listing, self.listing) else None)
        if isinstance(listing, self.listing):
            train, val = (
                self.from_files(listing, chosen, settings, preprocess)
                for chosen in split(listing.train, listing.val, settings)
            )
            lazy: tuple[Lazy, Lazy] = train, val
            classes = listing.classes
        elif settings.name in SCENES:
            lazy, classes = self._of_scenes(settings, preprocess), self.scene_classes
        else:
            known = ", ".join([*SCENES, *self.folders])
            raise DataError(f"{settings.name}: has no {self.truths}; use {known}, or DATA=/path/to/a/folder")
        lazy, preprocess = with_pixels(*lazy, preprocess)
        images = in_memory(*lazy, preprocess, augmentation)
        if not all(map(len, images)):
            raise DataError(f"{settings.name}: none of its images can be read; repair them or give other ones")
        dataset = Dataset(
            settings.name,
            *images,
            classes=classes,
            preprocess=preprocess,
            digest=dataset_digest(settings, files),
            files=files.digests,
            held_out=lazy[1],
        )
        read = listing.notes if isinstance(listing, BoxListing) else ()
        return replace(dataset, notes=read + copies(*lazy, files.digests) + self.notes(dataset))

    def _of_scenes(self, settings: DataSettings, preprocess: Preprocess) -> tuple[Lazy, Lazy]:
        side, other = preprocess.resize_to
        if side != other:
            raise DataError(f"data.image_size: {settings.name} are square: give one number, or DATA=/path/to/a/folder")

        def draw(part: Part) -> Scenes:
            return draw_scenes(SCENES[settings.name], part, size=side, seed=settings.seed)

        drawn = draw("train")
        train, out = parts_of(len(drawn.images), settings, has_validation=True)
        judged, chosen = (drawn, out) if settings.tuning else ((held := draw("val")), np.arange(len(held.images)))
        return self.from_scenes(drawn, train, preprocess), self.from_scenes(judged, chosen, preprocess)
