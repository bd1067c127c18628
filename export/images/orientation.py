"""Which pixels an annotation was made on, an image's stored or its upright ones; and turning it with the image."""

from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.images.decode import BrokenImage, opened, orientation_of

WidthHeight = tuple[int, int]
"""Width and height in pixels."""
LYING = (5, 6, 7, 8)  # the EXIF orientations that swap width and height
MIRRORED = ((2, 3, 6, 7), (3, 4, 7, 8))  # those that, after the swap, mirror left and right, and top and bottom
TEXTS = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # where a PNG's orientation may be
REPAIR = "write its pixels upright without the tag (mogrify -auto-orient, or PIL.ImageOps.exif_transpose)"


class Header(NamedTuple):
    """An image's size as stored, and the EXIF orientation (1 to 8) that turns it upright."""

    size: WidthHeight
    orientation: int

    @property
    def upright(self) -> WidthHeight:
        """The size of the upright image."""
        width, height = self.size
        return (height, width) if self.orientation in LYING else self.size


def read_header(path: Path | BytesIO) -> Header:
    """Return an image's size and orientation from its header; raise BrokenImage if it has none."""
    from PIL.PngImagePlugin import PngImageFile

    with opened(path) as image:
        if isinstance(image, PngImageFile) and image.fp is not None and not _ends_in_text(image.fp):
            image.info.setdefault("exif", None)  # or Pillow would decode the pixels to look for it behind them
        return Header(image.size, orientation_of(image))


def _ends_in_text(file: IO[bytes]) -> bool:
    """Tell whether a PNG has text or EXIF behind its pixels."""
    start, kinds = file.tell(), list[bytes]()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        kinds.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    file.seek(start)
    return b"IDAT" in kinds and not TEXTS.isdisjoint(kinds[kinds.index(b"IDAT") :])


def turn_of(image: Header, stated: WidthHeight) -> int:
    """Return the orientation by which an annotation made on pixels of the `stated` size is to be turned with its image.

    It is 1 (as it is) for an image without orientation, and for an annotation of the upright pixels.
    Raises BrokenImage for a size that is neither the stored nor the upright one, and where an orientation leaves it as it is.
    """
    if stated not in (image.size, image.upright):
        (width, height), (other, high) = image.size, image.upright
        sizes = f"{width} x {height}" + (
            f" as stored and {other} x {high} upright" if image.orientation in LYING else ""
        )
        raise BrokenImage(
            f"its annotation is for {stated[0]} x {stated[1]} pixels, the image has {sizes}: export it again for this image"
        )
    if image.orientation == 1:
        return 1
    if image.size == image.upright:
        raise BrokenImage(
            f"has EXIF orientation {image.orientation} and the same size stored and upright, so its annotation may be for "
            f"either: {REPAIR}"
        )
    return 1 if stated == image.upright else image.orientation


def turned_corners(corners: NDArray[np.floating], orientation: int) -> NDArray[np.floating]:
    """Return boxes (n, 4: left, top, right, bottom, as fractions of the stored image) on the upright one."""
    points = corners.reshape(-1, 2, 2)  # (n, corner, x and y)
    if orientation in LYING:
        points = points[..., ::-1]
    mirrored = [orientation in those for those in MIRRORED]
    points = np.where(mirrored, 1 - points[:, ::-1], points)  # a mirrored box's first corner comes from its second
    return np.ascontiguousarray(points.reshape(-1, 4))
