"""Find images with their masks, one class index per pixel, and read them; the rules are in docs/segmentation.md."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first
from export.images.decode import DAMAGE, MAX_PIXELS, WIDE, BrokenImage, require_pillow, turned
from export.images.folders import SUFFIXES, check_folder, images_in
from export.images.listing import TRAIN, VAL_NAMES, Pair, SplitListing, check_lengths, is_label
from export.images.orientation import read_header, turn_of
from export.images.preprocess import IGNORED, Preprocess
from export.images.read import Examples, file_examples, spread
from export.images.voc import trainval

if TYPE_CHECKING:
    from PIL import Image

CLASSES, IMAGES, MASKS = "classes.txt", "images", "masks"
VOC = (  # Everingham 2010; the outlines of its objects are 255
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CITYSCAPES = (  # Cordts 2016: the evaluated classes, by their training indices
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person",
    "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
TRIMAPS = "annotations/trimaps"
PETS = ("none", "pet", "background", "border")  # Parkhi 2012, by the numbers in its files, which have no 0
GREY = ("1", "L", "P")  # Pillow's modes with one number up to 255 per pixel; a palette's colours do not matter
SAMPLE = 200  # masks that are read to decide what they are


@dataclass(frozen=True)
class MaskListing(SplitListing[str]):
    """Images with the files of their masks."""

    where = f"{{root}}/{IMAGES}/{{part}}/, their masks in {{root}}/{MASKS}/{{part}}/"

    def decisive(self) -> dict[str, object]:
        """Return what decides the data besides the classes' names and the files' content."""
        return {**super().decisive(), "masks": 2}  # raise it when masks become other tensors


def list_masks(root: Path) -> MaskListing:
    """List images/ and masks/, with or without train/ and val/ in both, and classes.txt with one class per line; or VOC, Cityscapes or Oxford pets.

    A mask has its image's path, but for the suffix. Raises DataError for other layouts, and for images without masks.
    """
    check_folder(root)
    for mark, listed in LAYOUTS.items():
        if (root / mark).is_dir():
            return listed(root)
    if missing := [name for name in (f"{IMAGES}/", f"{MASKS}/", CLASSES) if not (root / name).exists()]:
        raise DataError(
            f"{root}: has no {missing[0]}: put images into {IMAGES}/{TRAIN}/ and {IMAGES}/val/, their masks under the same "
            f"names into {MASKS}/{TRAIN}/ and {MASKS}/val/, and the classes' names in the order of their indices into {CLASSES}"
        )
    parts = {path.name.lower(): path for path in (root / IMAGES).iterdir() if path.is_dir()}
    held_out = next((parts[name] for name in VAL_NAMES if name in parts), None)
    folder = parts.get(TRAIN, root / IMAGES if held_out is None else None)
    train = () if folder is None else _pairs(root, folder)
    val = None if held_out is None else _pairs(root, held_out)
    return MaskListing(root, read_classes(root / CLASSES), train, val)


def _voc(root: Path) -> MaskListing:
    """List Pascal VOC: JPEGImages/, SegmentationClass/, and the names of each split in ImageSets/Segmentation/."""
    lists, own = root / "ImageSets" / "Segmentation", root / CLASSES
    named, notes = trainval(root, lists)
    named = named or {part: lists / f"{part}.txt" for part in (TRAIN, "val")}
    train, val = (
        _named(root, named[part], "JPEGImages", "SegmentationClass") if part in named else () for part in (TRAIN, "val")
    )
    return MaskListing(root, read_classes(own) if own.is_file() else VOC, train, val or None, notes)


def _pets(root: Path) -> MaskListing:
    """List Oxford-IIIT Pet: images/, annotations/trimaps/, and the names of each split in annotations/."""
    train, val = (_named(root, root / f"annotations/{part}.txt", IMAGES, TRIMAPS) for part in ("trainval", "test"))
    return MaskListing(root, PETS, train, val or None)


def _named(root: Path, listed: Path, images: str, masks: str) -> tuple[Pair, ...]:
    """Return the pairs that a file names, by the first word of each line; none where it does not exist."""
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [line.split()[0] for line in lines if line.strip()]
    pairs = tuple((f"{images}/{name}.jpg", f"{masks}/{name}.png") for name in names)
    if missing := [path for pair in pairs for path in pair if not (root / path).is_file()]:
        raise DataError(f"{listed}: names {len(missing):,} files that do not exist: {first(missing)}: unpack it again")
    return pairs


def _cityscapes(root: Path) -> MaskListing:
    """List Cityscapes: images leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, masks gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png."""

    def pairs(part: str) -> tuple[Pair, ...]:
        folder = root / "leftImg8bit" / part
        images = images_in(root, folder) if folder.is_dir() else []
        masks = [name.replace("leftImg8bit/", "gtFine/", 1) for name in images]
        masks = [name.replace("_leftImg8bit", "_gtFine_labelTrainIds") for name in masks]
        if missing := [mask for mask in masks if not (root / mask).is_file()]:
            raise DataError(
                f"{root}: {len(missing):,} masks do not exist: {first(missing)}: make them with cityscapesscripts' csCreateTrainIdLabelImgs"
            )
        return tuple(zip(images, masks, strict=True))

    return MaskListing(root, CITYSCAPES, pairs(TRAIN), pairs("val") or None)


LAYOUTS: Mapping[str, Callable[[Path], MaskListing]] = {
    "SegmentationClass": _voc,
    "leftImg8bit": _cityscapes,
    TRIMAPS: _pets,
}
"""The layouts of public data sets, by the folder that identifies them."""


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the classes' names from a file with one per line in the order of their indices."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): save it as UTF-8 text, one class per line") from error
    if not 2 <= len(lines) <= IGNORED or len(set(lines)) < len(lines) or not all(map(is_label, lines)):
        raise DataError(f"{path}: must name 2 to {IGNORED} different classes, one per line, got {len(lines)} lines")
    check_lengths(path, lines)
    return tuple(lines)


def _pairs(root: Path, folder: Path) -> tuple[Pair, ...]:
    """Return every image of a folder with its mask, which has the same path."""
    images = images_in(root, folder)
    masks = {str(Path(name).with_suffix("")): name for name in images_in(root, root / MASKS)}
    wanted = {name: masks.get(MASKS + str(Path(name).with_suffix(""))[len(IMAGES) :]) for name in images}
    if alone := [name for name, mask in wanted.items() if mask is None]:
        raise DataError(
            f"{root}: {len(alone):,} of {len(images):,} images have no mask of the same name in {MASKS}/: {first(alone)}: "
            "add their masks, or remove them"
        )
    if not images:
        raise DataError(f"{folder}: has no images ({', '.join(SUFFIXES[:6])} …): add some")
    return tuple((name, mask) for name, mask in wanted.items() if mask is not None)


def read_mask(mask: Path, image: Path, *, classes: int, preprocess: Preprocess) -> tuple["Image.Image", bool]:
    """Return an image's mask as one byte per pixel, a class or IGNORED, and whether it was turned upright with its image.

    A mask of the size of the stored pixels is turned, one of the size of the upright image is taken as it is.
    Raises BrokenImage if it is not a mask for this image.
    """
    from PIL import Image

    indices, header = _indices(mask), read_header(image)
    if not preprocess.upright:
        header = header._replace(orientation=1)
    height, width = indices.shape
    if header.orientation == 1 and (width, height) != header.size:
        raise BrokenImage(f"its mask has {width} x {height} pixels, the image {header.size[0]} x {header.size[1]}")
    turn = turn_of(header, (width, height))
    if preprocess.binary_masks:
        if len(other := indices[(indices != 0) & (indices != IGNORED)]):
            raise BrokenImage(
                f"its mask has {other.max()}, but 0 and 255 are read as the two classes, as the other masks have nothing "
                "else: write 255 in its place, or the classes 0 and 1 in all masks"
            )
        indices //= IGNORED
    indices[indices == (IGNORED if preprocess.ignore_index is None else preprocess.ignore_index)] = IGNORED
    beyond = indices[(indices >= classes) & (indices != IGNORED)]
    if len(beyond):
        raise BrokenImage(
            f"its mask has the class {beyond.max()}, but there are {classes} (0 to {classes - 1}); if that is not a class, "
            f"set data.ignore_index: {beyond.max()}"
        )
    return turned(Image.fromarray(indices.astype(np.uint8)), turn), turn != 1


def _indices(path: Path) -> NDArray[np.int64]:
    """Return a mask file's numbers (height, width)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"its mask has more than {MAX_PIXELS:,} pixels")
            if image.mode not in (*GREY, *WIDE):
                raise BrokenImage(
                    f"its mask is {image.mode}: it must have one class index per pixel, as a grey or palette PNG has"
                )
            return np.asarray(image).astype(np.int64)
    except UnidentifiedImageError:
        raise BrokenImage("its mask is not a PNG") from None
    except DAMAGE as error:
        raise BrokenImage(f"its mask: {getattr(error, 'strerror', None) or error}") from None


def are_binary(root: Path, pairs: Sequence[Pair]) -> bool:
    """Tell whether the masks have 0 and 255 and nothing else, by those among them, spread, that have more than 0.

    At most SAMPLE of these are read: `read_mask` refuses a mask that does not fit what was decided.
    """
    found = 0
    for index in spread(len(pairs), len(pairs)):
        with suppress(BrokenImage):  # reported when it is used
            values = set(np.unique(_indices(root / pairs[index][1])).tolist()) - {0}
            if values - {IGNORED}:
                return False
            found += bool(values)
        if found == SAMPLE:
            break
    return found > 0


def values_of_masks(listing: MaskListing) -> set[int]:
    """Return the values of at most SAMPLE training masks, spread over them; those that cannot be read are left out."""
    found, pairs = set[int](), listing.train or listing.val or ()
    for index in spread(len(pairs), SAMPLE):
        with suppress(BrokenImage):  # reported when it is used
            found |= set(np.unique(_indices(listing.root / pairs[index][1])).tolist())
    return found


def mask_examples(data: Path, preprocess: Preprocess, labels: Sequence[str]) -> Examples:
    """Find the images of a folder (of its validation split, if it has one) with their masks.

    Raises DataError for other classes than a bundle's `labels`, and for masks that cannot be used.
    """
    require_pillow(data)
    listing = list_masks(data)
    if listing.classes != tuple(labels):
        raise DataError(
            f"{data / CLASSES}: its {len(listing.classes)} classes are not the {len(labels)} of the bundle: "
            "name them as in labels.txt, in the same order"
        )
    pairs = listing.judged
    ordinary = preprocess.ignore_index is None and not preprocess.binary_masks
    if len(labels) == 2 and ordinary and are_binary(data, pairs):
        raise DataError(
            f"{data}: its masks have only 0 and 255, and this network's bundle ignores 255, so every pixel that counts would "
            f"be {labels[0]}: write 1 in place of 255"
        )
    found = [_truth(listing, pair, preprocess) for pair in pairs]
    notes = turned_note(sum(turned for _, turned in found), len(found))
    return file_examples(listing, np.stack([truth for truth, _ in found]), preprocess, notes)


def turned_note(turned: int, among: int) -> tuple[str, ...]:
    """Return a sentence on the masks that were turned upright; nothing if none was."""
    if not turned:
        return ()
    return (f"{turned:,} of {among:,} masks were turned upright with their images, whose stored pixels they fit",)


def _truth(listing: MaskListing, pair: Pair, preprocess: Preprocess) -> tuple[NDArray[np.uint8], bool]:
    image, mask = (listing.root / name for name in pair)
    try:
        whole, turned = read_mask(mask, image, classes=len(listing.classes), preprocess=preprocess)
        return preprocess.mask(whole), turned
    except BrokenImage as error:
        raise DataError(f"{image}: {error}") from error
