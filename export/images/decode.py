"""Open an image file safely: known formats only, a limit on its pixels, nothing truncated, 8 bits per channel, upright."""

import struct
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.errors import DataError, first

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte decoded
# Exceptions that Pillow's decoders raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error)
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
NAMED = 3  # broken files that an error lists; the rest are counted


class BrokenImage(Exception):
    """Report why a file is not a usable image; callers count and list such files."""


def require_pillow(path: Path) -> None:
    """Raise DataError if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise DataError(f"{path}: reading images needs Pillow: pip install pillow")


def read_image(path: Path | BytesIO, *, upright: bool) -> "Image.Image":
    """Return a file's pixels, from disk or memory, as RGB, fully decoded; the header's size is checked before decoding.

    `upright` applies the EXIF orientation; 16-bit grey is cut to its upper 8 bits, as Pillow does with colours.
    Raises BrokenImage for a file that is missing, truncated, of another format, or above MAX_PIXELS.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenImage(f"{width:,} x {height:,} is more than {MAX_PIXELS:,} pixels")
            rgb, turn = _rgb(image), TURNS.get(_orientation(image)) if upright else None
            return rgb if turn is None else rgb.transpose(Image.Transpose[turn])
    except UnidentifiedImageError:
        raise BrokenImage(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the warning, if warnings are errors
        raise BrokenImage(f"more than {MAX_PIXELS:,} pixels") from None
    except DAMAGE as error:
        raise BrokenImage(getattr(error, "strerror", None) or str(error)) from None


def read_area(path: Path | BytesIO) -> int:
    """Return an image's number of pixels from its header, 0 if it has none."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.width * image.height
    except (*DAMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return 0


def describe_broken(broken: Mapping[str, str], total: int) -> str:
    """Return a sentence that counts the broken files and lists the first few with their reasons."""
    named = first([f"{name} ({broken[name]})" for name in sorted(broken)], NAMED)
    return f"{len(broken):,} of {total:,} images cannot be read: {named}"


def _rgb(image: "Image.Image") -> "Image.Image":
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip to white
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _orientation(image: "Image.Image") -> int:
    """Return the EXIF orientation, 1 (upright) if there is none that can be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return 1
    return found if isinstance(found, int) else 1
