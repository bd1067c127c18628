"""Open a data set: its images, split, classes and preprocessing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compress.data.augment import Augmentation
from compress.data.digest import (
    DataSettings,
    Given,
    dataset_digest,
    given,
    given_unlabelled,
    unlabelled_digest,
)
from compress.data.images import (
    MEMORY_BYTES,
    UNLABELLED,
    ArrayImages,
    FileImages,
    ImageSet,
    Lazy,
    decode_all,
    from_files,
    images_of,
    labelled,
    largest_area,
    with_pixels,
)  # fmt: skip
from compress.data.named import NAMED, Arrays, NamedSet
from compress.data.shards import Rows, ShardListing
from compress.data.split import held_out, limited, split
from compress.logs.stage_log import say
from export.errors import DataError
from export.images.folders import File, Listing
from export.images.preprocess import Preprocess
from export.images.read import digest
from export.images.size import area as area_of


@dataclass(frozen=True)
class Dataset:
    """Training images, validation images, and the preprocessing that makes them the network's input.

    `files` are the digests of a folder's files by path; `held_out` are the validation images, not decoded. Where there
    are images without a label (-1), `everything` is the training images followed by them, with the digest of all. `notes`
    are sentences that a run's log and report repeat.
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


def open_dataset(settings: DataSettings, augmentation: Augmentation) -> Dataset:
    """Open a data set by name; decode it into memory where it fits, so that broken images are found now.

    Without a validation set of its own, a fraction of each class is held out by seed. `limit_per_class` limits training
    only. Whole training images are kept where `augmentation` crops from them. Raises DataError for data that are missing,
    unreadable or cannot be split.
    """
    name, files = settings.name, given(settings)
    if name not in NAMED and files.listing is None:
        raise DataError(
            f"{name}: has no label per image, so it is not for {settings.task}: set another task or data set"
        )
    found = files.listing or NAMED[name](settings.path)
    assert isinstance(found, Listing | ShardListing | NamedSet), "the task lists folders of its own kind"
    labels = np.array([label for _, label in found.train]) if isinstance(found, Listing) else found.train.labels
    val = None
    if found.val is None:
        val = held_out(labels, found.classes, fraction=settings.val_fraction, seed=settings.seed)
    train = np.arange(len(labels)) if val is None else np.setdiff1d(np.arange(len(labels)), val)
    judged: Sequence[tuple[str, int]] = ()
    if isinstance(found, Listing):
        judged = (
            found.val if val is None and found.val else [found.train[index] for index in ([] if val is None else val)]
        )
    if settings.tuning:
        chosen = held_out(labels[train], found.classes, fraction=settings.val_fraction, seed=settings.seed)
        val, train = train[chosen], np.delete(train, chosen)
        found = replace(found, val=None)
    if settings.limit_per_class is not None:
        chosen = limited(labels[train], len(found.classes), per_class=settings.limit_per_class, seed=settings.seed)
        train = train[chosen]
    picked = _pick(found, train, val, skip_broken=settings.skip_broken)
    lazy, preprocess = with_pixels(*picked, centred(settings))
    more = _more(settings, lazy, files, judged)
    everything, val_images = in_memory(more or lazy[0], lazy[1], preprocess, augmentation)
    train_images = everything if more is None else labelled(everything)
    _check(train_images, val_images, found.classes)
    own = dataset_digest(settings, files)
    return Dataset(
        name,
        train_images,
        val_images,
        classes=found.classes,
        preprocess=preprocess,
        digest=own,
        files=files.digests,
        held_out=lazy[1],
        everything=None if more is None else (everything, f"{own}-{unlabelled_digest(settings)}"),
        notes=copies(*lazy, files.digests),
    )


def open_unlabelled(settings: DataSettings, augmentation: Augmentation) -> Dataset:
    """Open a folder of images without labels; each gets its number as label until a teacher labels them (`relabelled`).

    Without a validation set of its own, a fraction of the images is held out by seed. `limit_per_class` limits the number
    of training images. Raises DataError for data that are missing or unreadable.
    """
    files = given(settings)
    if not isinstance(files.listing, Listing):
        raise DataError(
            f"{settings.name}: has labels: leave out `task: unlabelled`, or give a folder of images (DATA=)"
        )
    listing = files.listing
    train, val = (
        from_files(listing.root, [(path, n) for n, (path, _) in enumerate(chosen)], skip_broken=settings.skip_broken)
        for chosen in split(listing.train, listing.val, settings)
    )
    lazy, preprocess = with_pixels(train, val, centred(settings))
    images = in_memory(*lazy, preprocess, augmentation)
    if not all(map(len, images)):
        raise DataError(f"{settings.name}: none of its images can be read; repair them or give other ones")
    digest = dataset_digest(settings, files)
    return Dataset(settings.name, *images, (), preprocess, digest, files.digests, lazy[1])


def centred(settings: DataSettings) -> Preprocess:
    """Return the preprocessing that resizes an image until it covers the size and crops the centre."""
    return Preprocess(settings.size, settings.resize_to, settings.mean, settings.std)


def relabelled(dataset: Dataset, classes: tuple[str, ...], train: Tensor, val: Tensor) -> Dataset:
    """Return a data set of `open_unlabelled` with a teacher's labels for its training and validation images, int64 (n,)."""
    assert isinstance(dataset.held_out, FileImages), "a folder's"
    return replace(
        dataset,
        classes=classes,
        train=replace(dataset.train, labels=train[dataset.train.labels]),
        val=replace(dataset.val, labels=val[dataset.val.labels]),
        held_out=replace(dataset.held_out, labels=val),
    )


def _more(
    settings: DataSettings, lazy: tuple[Lazy, Lazy], files: Given, judged: Sequence[tuple[str, int]]
) -> FileImages | None:
    """Return the training images and the unlabelled ones that are not copies of training or validation images.

    `judged` are the validation images, also where others stand in for them. None where the recipe has no unlabelled images.
    """
    if settings.unlabelled is None:
        return None
    train, val = lazy
    if not isinstance(files.listing, Listing) or not isinstance(train, FileImages) or not isinstance(val, FileImages):
        raise DataError(f"data.unlabelled: needs labelled images in a folder, got {settings.name}: leave it out")
    known = {files.digests.get(images.name(index)) for images in (train, val) for index in range(len(images))}
    known |= {files.digests.get(name) for name, _ in judged}
    paths = [path for path, digest in given_unlabelled(settings).items() if digest not in known]
    if not paths:
        raise DataError(f"{settings.unlabelled}: holds only copies of training or validation images: leave it out")
    say(f"{settings.unlabelled}: {len(paths):,} images without a label")
    # Unlabelled paths are absolute: joined to the root, they stay as they are.
    return from_files(
        train.root,
        [
            *zip(map(train.name, range(len(train))), train.labels.tolist(), strict=True),
            *((path, UNLABELLED) for path in paths),
        ],
        skip_broken=settings.skip_broken,
        pixel=train.pixel,
    )


def _pick(
    found: Listing | ShardListing | NamedSet, train: np.ndarray, val: np.ndarray | None, *, skip_broken: bool
) -> tuple[Lazy, Lazy]:
    """Return the chosen training images, and validation images: `val` of the same set, or its own for None."""
    if isinstance(found, NamedSet):
        held = found.train if found.val is None else found.val
        return _arrays(found.train, train), _arrays(held, np.arange(len(held.labels)) if val is None else val)
    held_out = found.val if val is None else _rows(found, val)
    assert held_out is not None
    return (
        images_of(found, _rows(found, train), skip_broken=skip_broken),
        images_of(found, held_out, skip_broken=skip_broken),
    )


def _rows(found: Listing | ShardListing, chosen: np.ndarray) -> Sequence[File] | Rows:
    return found.train[chosen] if isinstance(found, ShardListing) else [found.train[index] for index in chosen]


def _arrays(arrays: Arrays, chosen: np.ndarray) -> ArrayImages:
    return ArrayImages(arrays.images[chosen], torch.from_numpy(arrays.labels[chosen].astype(np.int64)))


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


def _check(train: ImageSet, val: ImageSet, classes: tuple[str, ...]) -> None:
    """Raise DataError where broken images empty a class or the validation set; log classes without validation."""
    untrained, unjudged = (
        [name for label, name in enumerate(classes) if label not in present]
        for present in (set(train.labels.tolist()), set(val.labels.tolist()))
    )
    if untrained:
        raise DataError(f"class {untrained[0]!r}: none of its training images can be read; repair them or remove it")
    if len(val) == 0:
        raise DataError("validation: none of its images can be read; repair them or give other ones")
    if unjudged:
        say(f"validation has no image of {len(unjudged):,} classes, {unjudged[0]} first")
