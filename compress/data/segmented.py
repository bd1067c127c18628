"""Open a data set of images with masks, and write its validation images."""

import io
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compress.data.augment import Augmentation
from compress.data.dataset import Dataset, in_memory
from compress.data.digest import NATIVE_SIZE, DataSettings, dataset_digest, given
from compress.data.images import ArrayImages, FileImages
from compress.data.placed import ArrayMasks, mask_files
from compress.data.scenes import CLASSES as SCENE_CLASSES
from compress.data.scenes import SCENES, Scenes, draw_scenes
from compress.data.split import parts_of
from export.errors import DataError
from export.images.decode import BrokenImage
from export.images.masks import CLASSES, IMAGES, MASKS, MaskListing, Pair
from export.images.preprocess import Preprocess

Lazy = FileImages | ArrayImages


def open_masks(settings: DataSettings, augmentation: Augmentation) -> Dataset:
    """Open a data set by name, as `open_dataset` does one of labels.

    Without a validation set of its own a fraction of the images is held out by seed; `limit_per_class` is how many images are trained on.
    Raises `DataError` for data that are missing or unreadable or have no masks, and for changes that would move an image but not its mask.
    """
    moved = [name for name in ("randaugment", "mixup", "cutmix") if getattr(augmentation, name)]
    if moved:
        raise DataError(f"data.augment.{moved[0]}: changes an image and not its mask; use crop, flip and distort")
    files = given(settings)
    if settings.unlabelled is not None:
        raise DataError("data.unlabelled: goes with images that have one label each: leave it out")
    size = settings.image_size or NATIVE_SIZE[settings.name]
    preprocess = Preprocess(
        size, round(size * settings.resize), settings.mean, settings.std, ignore_index=settings.ignore_index
    )
    if isinstance(files.listing, MaskListing):
        lazy, classes = _of_folder(files.listing, settings, preprocess), files.listing.classes
    elif settings.name in SCENES:
        lazy, classes = _of_scenes(settings, preprocess), SCENE_CLASSES
    else:
        raise DataError(
            f"{settings.name}: has labels and no masks; take {', '.join(SCENES)}, or DATA=/path/to/a/folder"
        )
    images = in_memory(*lazy, preprocess, augmentation.whole_area(size))
    if not all(map(len, images)):
        raise DataError(f"{settings.name}: none of its images can be read; repair them or give other ones")
    return Dataset(
        settings.name,
        *images,
        classes=classes,
        preprocess=preprocess,
        digest=dataset_digest(settings, files),
        files=files.digests,
        held_out=lazy[1],
    )


def _of_folder(listing: MaskListing, settings: DataSettings, preprocess: Preprocess) -> tuple[Lazy, Lazy]:
    train, out = parts_of(len(listing.train), settings, has_validation=listing.val is not None)
    judged = [listing.train[index] for index in out] if listing.val is None or settings.tuning else list(listing.val)
    trained = [listing.train[index] for index in train]
    return _files(listing, trained, settings, preprocess), _files(listing, judged, settings, preprocess)


def _files(listing: MaskListing, pairs: list[Pair], settings: DataSettings, preprocess: Preprocess) -> FileImages:
    masks = mask_files(listing.root, pairs, classes=len(listing.classes), preprocess=preprocess)
    labels = torch.zeros(len(pairs), dtype=torch.int64)
    return FileImages(listing.root, masks.paths[:, 0], labels, settings.skip_broken, placed=masks)


def _of_scenes(settings: DataSettings, preprocess: Preprocess) -> tuple[Lazy, Lazy]:
    drawn = draw_scenes(SCENES[settings.name], "train", size=preprocess.resize_to, seed=settings.seed)
    train, out = parts_of(len(drawn.images), settings, has_validation=True)
    if settings.tuning:
        return _arrays(drawn, train, preprocess), _arrays(drawn, out, preprocess)
    judged = draw_scenes(SCENES[settings.name], "val", size=preprocess.resize_to, seed=settings.seed)
    return _arrays(drawn, train, preprocess), _arrays(judged, np.arange(len(judged.images)), preprocess)


def _arrays(scenes: Scenes, chosen: np.ndarray, preprocess: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(chosen), dtype=torch.int64)
    return ArrayImages(scenes.images[chosen], labels, placed=ArrayMasks(scenes.masks[chosen], preprocess))


def write_masks(dataset: Dataset, folder: Path) -> int:
    """Write the validation images and their masks as a folder that `list_masks` reads, and return how many.

    Files are copied as they are. Raises DataError for a folder that is there already.
    """
    if folder.exists():
        raise DataError(f"{folder}: is there already; name a new folder")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for name in (IMAGES, MASKS):
        (aside / name / "val").mkdir(parents=True)
    (aside / CLASSES).write_text("".join(f"{name}\n" for name in dataset.classes), encoding="utf-8")
    images, written = dataset.held_out, 0
    for index in range(len(images)):
        try:
            image, mask, suffix = _pair(images, index)
        except BrokenImage as error:
            assert isinstance(images, FileImages)
            images.report_broken({index: str(error)})  # which raises unless they are to be left out
            continue
        (aside / IMAGES / "val" / f"{index:06d}{suffix}").write_bytes(image)
        (aside / MASKS / "val" / f"{index:06d}.png").write_bytes(mask)
        written += 1
    aside.rename(folder)
    return written


def _pair(images: Lazy, index: int) -> tuple[bytes, bytes, str]:
    """Return the bytes of an image's file and of its mask's, and the image's suffix."""
    if isinstance(images, ArrayImages):
        assert isinstance(images.placed, ArrayMasks)
        stream = io.BytesIO()
        Image.fromarray(images.placed.arrays[index]).save(stream, "PNG")
        return images.file(index), stream.getvalue(), ".bmp"
    images.whole(index)
    name = images.name(index)
    mask = images.root / images.placed.name(index)  # type: ignore[union-attr]
    return (images.root / name).read_bytes(), mask.read_bytes(), Path(name).suffix
