"""Look at a folder of images: its classes, sizes, channels, and what cannot be read."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from compress.data.digest import shards_in
from compress.data.images import FileImages, images_of
from compress.data.shards import ShardListing
from compress.errors import CompressError
from export.errors import DataError
from export.images.decode import RGB, BrokenImage, Pixel
from export.images.folders import FolderListing, list_folder
from export.images.listing import TRAIN, VAL_NAMES
from export.images.read import spread
from export.tasks import TASKS
from export.tasks.unlabelled import list_images

SEEN = Path("runs", ".images")  # the cache of shard contents that a later run uses
LOOKED_AT = 200  # images opened, spread over the folder


@dataclass(frozen=True)
class Folder:
    """The images of a folder, and what opening some of them showed: their sizes, and the broken ones with the reason."""

    listing: FolderListing | ShardListing
    sides: list[int]  # the shorter side of each opened image
    broken: dict[str, str]
    stored: Counter[Pixel]  # channels and bits of those opened
    pixel: Pixel = RGB  # as the network takes them

    @property
    def is_labelled(self) -> bool:
        """Whether the images have labels; otherwise the network's predictions take their place."""
        return bool(self.listing.classes)

    @property
    def train(self) -> int:
        """The number of training images."""
        return len(self.listing.train) if self.listing.val is not None else round(0.8 * len(self.listing.train))

    def images(self, *, judged: bool = False) -> FileImages:
        """Return the training images, or the validation images if `judged` and there are any."""
        rows = self.listing.val if self.listing.val and (judged or not self.listing.train) else self.listing.train
        return replace(images_of(self.listing, rows), pixel=self.pixel)


def refuse_other_tasks(data: Path, weights: str) -> None:
    """Raise CompressError, with the command to use instead, if the folder is a data set for another task than classification."""
    for task in TASKS.values():
        if task.listing is list_folder or not task.labelled:
            continue
        try:
            task.listing(data)
        except DataError:
            continue
        raise CompressError(
            f"{data}: is a data set for {task.name}, but init writes recipes for classification only: run `compress run "
            f"recipes/{task.name}_int8.yaml --data {data} --weights {weights} --set model.arch=NAME` with your network's name"
        )


def look_at(data: Path) -> Folder:
    """List the folder and open some of its images."""
    found = shards_in(data, SEEN)
    listing = _listed(data) if found is None else found.listing
    assert isinstance(listing, FolderListing | ShardListing)
    sides, broken, stored = list[int](), dict[str, str](), Counter[Pixel]()
    folder = Folder(listing, sides, broken, stored)
    images = folder.images()
    for index in spread(len(images), LOOKED_AT):
        try:
            sides.append(min(images.whole(index).size))
            stored[images.stored(index) or RGB] += 1
        except BrokenImage as error:
            broken[images.name(index)] = str(error)
    if not sides:
        raise CompressError(
            f"{data}: none of the {len(broken)} images opened can be read ({next(iter(broken.values()))})"
        )
    return folder


def _listed(data: Path) -> FolderListing:
    """List a folder's images, without labels if none lies in a class folder; DataError if it has another layout."""
    try:
        return list_folder(data)
    except DataError:
        with suppress(DataError):
            found = list_images(data)
            parents = {Path(path).parent.as_posix().lower() for path, _ in (*found.train, *(found.val or ()))}
            if parents <= {".", TRAIN, *VAL_NAMES}:
                return found
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
