"""Open a data set of images with masks, and write its validation images."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compress.data.dataset import Dataset, Lazy
from compress.data.digest import DataSettings
from compress.data.images import ArrayImages, FileImages
from compress.data.placed import ArrayMasks, mask_files
from compress.data.planar import Planar
from compress.data.scenes import CLASSES as SCENE_CLASSES
from compress.data.scenes import Scenes
from export.errors import DataError
from export.images.decode import BrokenImage
from export.images.masks import CLASSES, IMAGES, MASKS, MaskListing, Pair
from export.images.preprocess import Preprocess


def _files(listing: MaskListing, pairs: Sequence[Pair], settings: DataSettings, preprocess: Preprocess) -> FileImages:
    masks = mask_files(listing.root, pairs, classes=len(listing.classes), preprocess=preprocess)
    labels = torch.zeros(len(pairs), dtype=torch.int64)
    return FileImages(listing.root, masks.paths[:, 0], labels, settings.skip_broken, placed=masks)


def _arrays(scenes: Scenes, chosen: np.ndarray, preprocess: Preprocess) -> ArrayImages:
    labels = torch.zeros(len(chosen), dtype=torch.int64)
    return ArrayImages(scenes.images[chosen], labels, placed=ArrayMasks(scenes.masks[chosen], preprocess))


def _centred(settings: DataSettings, size: int) -> Preprocess:
    resized = round(size * settings.resize)
    return Preprocess(size, resized, settings.mean, settings.std, ignore_index=settings.ignore_index)


open_masks = Planar("masks", MaskListing, SCENE_CLASSES, _centred, _files, _arrays).open


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
