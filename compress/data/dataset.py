"""Open a data set: its images with their truths, split, classes and preprocessing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from compress.data.augment import Augmentation
from compress.data.digest import Given, dataset_digest, downloaded, given, given_unlabelled, unlabelled_digest
from compress.data.images import (
    MEMORY_BYTES,
    ArrayImages,
    FileImages,
    ImageSet,
    Lazy,
    decode_all,
    from_files,
    labelled,
    largest_area,
    with_pixels,
)  # fmt: skip
from compress.data.named import DATA_SETS
from compress.data.scenes import Scenes, scenes_of
from compress.data.settings import DataSettings
from compress.data.shards import ShardListing
from compress.data.split import parts_of
from compress.logs.stage_log import say
from export.errors import DataError
from export.images.folders import FolderListing
from export.images.listing import NO_LABEL
from export.images.preprocess import Preprocess
from export.images.read import digest
from export.images.size import area as area_of
from export.onnx_file.outputs import Output
from export.tasks.decoder import Decoder


@dataclass(frozen=True)
class Dataset:
    """Training images, validation images, and the preprocessing that makes them the network's input.

    `files` are the digests of a folder's files by path; `held_out` are the validation images, not decoded. Where there
    are images without a label (-1), `everything` is the training images followed by them, with the digest of all. `notes`
    are sentences that a run's log and report repeat. `outputs` are a network's, if it has several, which lie side by side (so do the
    truths that are another network's), and a detector's `decoder` reads them; `own_loss` is what its library learns from labels by.
    """

    name: str
    train: ImageSet
    val: ImageSet
    classes: tuple[str, ...]
    preprocess: Preprocess
    digest: str
    files: Mapping[str, str]
    held_out: Lazy
    everything: tuple[ImageSet, str] | None = None
    notes: tuple[str, ...] = ()
    outputs: tuple[Output, ...] = ()
    decoder: Decoder | None = None
    own_loss: Callable[..., torch.Tensor] | None = None

    @property
    def with_unlabelled(self) -> "Dataset":
        """The data set whose training images include those without a label, as a teacher's student sees it."""
        if self.everything is None:
            return self
        images, digest = self.everything
        return replace(self, train=images, everything=None, digest=digest)

    def validation_digests(self) -> list[str]:
        """Return the digest of every validation image, as a file, that is not known to be broken."""
        images = self.held_out
        if isinstance(images, ArrayImages):
            return [digest(images.content(index)) for index in range(len(images))]
        names = [(index, name) for index in range(len(images)) if (name := images.name(index)) not in images.broken]
        return [self.files.get(name) or digest(images.content(index)) for index, name in names]


Parts = tuple[Lazy, Lazy | None, tuple[str, ...]]
"""All training images, the validation images if a data set has some of its own, and the classes."""


def centred(settings: DataSettings, _listing: object = None) -> Preprocess:
    """Return the preprocessing that resizes an image until it covers the size and crops the centre."""
    return Preprocess(
        settings.size, settings.resize_to, settings.mean, settings.std, stretch=settings.stretch, look=settings.look
    )


def drawn(
    images_of: Callable[[Scenes, Preprocess], ArrayImages], classes: tuple[str, ...]
) -> Callable[[DataSettings, Preprocess], Parts | None]:
    """Return what opens the scenes with a name, by the function that takes their truths."""

    def arrays(settings: DataSettings, preprocess: Preprocess) -> Parts | None:
        scenes = scenes_of(settings, preprocess.resize_to)
        return scenes and (images_of(scenes[0], preprocess), images_of(scenes[1], preprocess), classes)

    return arrays


def known(truths: str, task: str) -> str:
    """Return what is said of a data set without a task's truths."""
    named = [name for name, one in DATA_SETS.items() if one.scenes]
    named += [name for name, one in DATA_SETS.items() if task in one.tasks]
    return f"has no {truths}; use {', '.join(named)}, or DATA=/path/to/a/folder"


@dataclass(frozen=True)
class TruthKind:
    """What differs between data sets with one label, several, masks or boxes for each image."""

    files: Callable[[Any, Any, DataSettings, Preprocess], FileImages]
    """(listing, its files of a part, settings, preprocessing) to these images with their truths."""
    arrays: Callable[[DataSettings, Preprocess], Parts | None]
    """A data set that is in memory or drawn; None for another."""
    missing: str
    """What is said of a data set without such truths."""
    preprocess: Callable[[DataSettings, Any], Preprocess] = centred
    """(settings, listing or None) to the preprocessing."""
    one_label: bool = False
    """Whether an image has one class, by which it is split; only these may lie in shards, or beside unlabelled images."""
    moving: str = ""
    """What the truths are called if they lie in the image, and move with its view."""
    notes: Callable[[Dataset], tuple[str, ...]] = lambda _: ()
    """Returns sentences on an opened data set's truths; raises DataError where nothing can be learned from them."""


def open_images(settings: DataSettings, augmentation: Augmentation, kind: TruthKind) -> Dataset:
    """Open a data set by name; decode it into memory where it fits, so that broken images are found now.

    Without a validation set of its own, a fraction of each class, or of all images, is held out by seed. `limit_per_class`
    limits training only. Whole training images are kept where `augmentation` crops from them. Raises DataError for data
    that are missing, unreadable, without such truths or cannot be split, and for changes that would not move the truths.
    """
    spoiling = [name for name in ("randaugment", "mixup", "cutmix") if getattr(augmentation, name)]
    if kind.moving and spoiling:
        raise DataError(
            f"data.augment.{spoiling[0]}: changes images but not their {kind.moving}; use crop, flip and distort"
        )
    files = given(settings)
    if settings.unlabelled is not None and not kind.one_label:
        raise DataError("data.unlabelled: needs images with one label each: leave it out")
    (train, val, classes), preprocess, notes = _whole(settings, files, kind)
    labels, names = (train.labels.numpy(), classes) if kind.one_label else (np.zeros(len(train)), ("images",))
    kept, out = parts_of(labels, names, settings, has_validation=val is not None)
    judged = train.take(out) if val is None or settings.tuning else val
    lazy, preprocess = with_pixels(train.take(kept), judged, preprocess)
    if not classes:  # an image's number, until a teacher labels it
        lazy = replace(lazy[0], labels=torch.arange(len(kept))), replace(lazy[1], labels=torch.arange(len(judged)))
    more = None
    if settings.unlabelled is not None:
        _, own = parts_of(labels, names, replace(settings, tuning=False), has_validation=val is not None)
        more = _with_unlabelled(settings, lazy, train.take(own) if val is None else val, files)
    everything, val_images = in_memory(lazy[0] if more is None else more, lazy[1], preprocess, augmentation)
    train_images = everything if more is None else labelled(everything)
    if not kind.one_label and not (len(train_images) and len(val_images)):
        raise DataError(f"{settings.name}: none of its images can be read; repair them or give other ones")
    found = Dataset(
        settings.name,
        train_images,
        val_images,
        classes,
        preprocess,
        dataset_digest(settings, files),
        files.digests,
        lazy[1],
        notes=notes + (copies(*lazy, files.digests) if classes else ()),
    )
    if more is not None:
        found = replace(found, everything=(everything, f"{found.digest}-{unlabelled_digest(settings)}"))
    return replace(found, notes=found.notes + kind.notes(found))


def _whole(settings: DataSettings, files: Given, kind: TruthKind) -> tuple[Parts, Preprocess, tuple[str, ...]]:
    """Return all images of a data set that has such truths, its preprocessing, and its listing's notes."""
    listing = files.listing or downloaded(settings)
    if isinstance(listing, ShardListing) and not kind.one_label:
        listing = None
    preprocess = kind.preprocess(settings, listing)
    if listing is not None:
        train = kind.files(listing, listing.train, settings, preprocess)
        val = None if listing.val is None else kind.files(listing, listing.val, settings, preprocess)
        return (train, val, listing.classes), preprocess, listing.notes
    if (found := kind.arrays(settings, preprocess)) is None:
        raise DataError(f"{settings.name}: {kind.missing}")
    return found, preprocess, ()


def _with_unlabelled(settings: DataSettings, lazy: tuple[Lazy, Lazy], own: Lazy, files: Given) -> FileImages:
    """Return the training images and the unlabelled ones that are not copies of training or validation images.

    `own` are the data set's validation images, also where others stand in for them.
    """
    train = lazy[0]
    parts = [images for images in (*lazy, own) if isinstance(images, FileImages)]
    if not isinstance(files.listing, FolderListing) or not isinstance(train, FileImages):
        raise DataError(f"data.unlabelled: needs labelled images in a folder, got {settings.name}: leave it out")
    seen = {files.digests.get(images.name(index)) for images in parts for index in range(len(images))}
    paths = [path for path, digest in given_unlabelled(settings).items() if digest not in seen]
    if not paths:
        raise DataError(f"{settings.unlabelled}: holds only copies of training or validation images: leave it out")
    say(f"{settings.unlabelled}: {len(paths):,} images without a label")
    # Unlabelled paths are absolute: joined to the root, they stay as they are.
    names = [*map(train.name, range(len(train))), *paths]
    labels = torch.cat([train.labels, torch.full((len(paths),), NO_LABEL)])
    return replace(from_files(train.root, names, labels, skip_broken=settings.skip_broken), pixel=train.pixel)


def copies(train: Lazy, val: Lazy, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence on the validation images that are training images too, by the digests of their files; nothing if none is."""
    if not isinstance(train, FileImages) or not isinstance(val, FileImages):
        return ()
    trained = {digests[name]: name for name in map(train.name, range(len(train))) if name in digests}
    found = [(name, trained[digests[name]]) for name in map(val.name, range(len(val))) if digests.get(name) in trained]
    if not found:
        return ()
    (name, other), among = found[0], f"{len(found):,} of {len(val):,} validation images"
    return (
        f"{among} are training images too, byte for byte ({name} is {other}): the score counts what was learned by heart; "
        "remove one of each",
    )


def in_memory(train: Lazy, val: Lazy, preprocess: Preprocess, augmentation: Augmentation) -> tuple[ImageSet, ImageSet]:
    """Return the images, decoded if all fit into MEMORY_BYTES; whole training images are kept for random crops."""
    pixel = preprocess.pixel
    each = pixel.channels * pixel.bits // 8  # bytes
    still = each * (len(train) + len(val)) * area_of(preprocess.image_size)
    most = augmentation.whole_area(preprocess.image_size)
    area = largest_area(train, at_most=most) if still <= MEMORY_BYTES else 0
    if still + each * len(train) * area > MEMORY_BYTES:
        return train, val
    return decode_all(train, preprocess, area=area), decode_all(val, preprocess, area=0)
