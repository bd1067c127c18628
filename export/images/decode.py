"""Open an image file safely: known formats only, a limit on its pixels, nothing truncated, the channels and bits asked for, upright."""

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.errors import DataError, first

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte decoded
# Exceptions that Pillow's decoders raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error)
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
WIDE = ("I", "I;16", "I;16B", "I;16L")  # Pillow's modes of 16-bit grey
CHANNELS = {1: ("1", "L", *WIDE), 4: ("RGBA",), 3: ("RGB", "P", "CMYK", "YCbCr")}  # and its modes of so many channels
NAMED = 3  # broken files that an error lists; the rest are counted


class Pixel(NamedTuple):
    """1 channel (grey, depth, infrared) of 8 or 16 bits, 3 (red, green, blue) of 8, or 4 (with another) of 8."""

    channels: int = 3
    bits: int = 8

    @property
    def largest(self) -> int:
        """A channel's largest value, which is scaled to 1."""
        return int(2**self.bits - 1)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The type of a channel's values."""
        return np.uint8 if self.bits == 8 else np.uint16

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.bits} bits"


RGB = Pixel()


class BrokenImage(Exception):
    """Report why a file is not a usable image; callers count and list such files."""


def require_pillow(path: Path) -> None:
    """Raise DataError if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise DataError(f"{path}: reading images needs Pillow: pip install pillow")


@contextmanager
def opened(path: Path | BytesIO) -> "Iterator[Image.Image]":
    """Open a file, on disk or in memory, without decoding it.

    Raises BrokenImage for a file that is missing, damaged, of another format or above Pillow's limit on pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise BrokenImage(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the warning, if warnings are errors
        raise BrokenImage(f"more than {MAX_PIXELS:,} pixels") from None
    except DAMAGE as error:
        raise BrokenImage(getattr(error, "strerror", None) or str(error)) from None


def read_image(path: Path | BytesIO, *, upright: bool, pixel: Pixel = RGB) -> "Image.Image":
    """Return a file's pixels, from disk or memory, fully decoded; the header's size is checked before decoding.

    `upright` applies the EXIF orientation. Any file is converted to RGB, 16-bit grey cut to its upper 8 bits, as Pillow does with
    colours; one and four channels are the file's own, in the modes L, I (16 bits) and RGBA.
    Raises BrokenImage for a file that is missing, truncated, of another format, channels or bits, or above MAX_PIXELS.
    """
    with opened(path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BrokenImage(f"{width:,} x {height:,} is more than {MAX_PIXELS:,} pixels")
        found = _rgb(image) if pixel == RGB else _as_stored(image, pixel)
        return turned(found, orientation_of(image)) if upright else found


def turned(image: "Image.Image", orientation: int) -> "Image.Image":
    """Return an image, or a mask, whose pixels are stored in this EXIF orientation, upright."""
    from PIL import Image

    return image if orientation not in TURNS else image.transpose(Image.Transpose[TURNS[orientation]])


def orientation_of(image: "Image.Image") -> int:
    """Return an opened file's EXIF orientation, 1 (upright) if there is none that can be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return 1
    return found if found in TURNS else 1


def read_pixels_of(path: Path | BytesIO) -> tuple[int, Pixel | None]:
    """Return an image's number of pixels, and their channels and bits, from its header; 0 and None if it has none."""
    try:
        with opened(path) as image:
            return image.width * image.height, _pixel(image)
    except BrokenImage:
        return 0, None


def resize(image: "Image.Image", size: tuple[int, int], resampling: "Image.Resampling") -> "Image.Image":
    """Return an image with this width and height; Pillow would take a fourth channel for opacity, so each is resized alone."""
    if image.mode != "RGBA":
        return image.resize(size, resampling)
    from PIL import Image

    return Image.merge("RGBA", [band.resize(size, resampling) for band in image.split()])


def values_of(image: "Image.Image") -> NDArray[Any]:
    """Return the values of what `read_image` returned, uint8 or uint16 (height, width, channels)."""
    values = np.asarray(image)
    if image.mode == "I":
        values = values.astype(np.uint16)
    return values if values.ndim == 3 else values[..., None]


def image_of(values: NDArray[Any]) -> "Image.Image":
    """Return values, uint8 or uint16 (height, width, channels), as `read_image` returns an image."""
    from PIL import Image

    wide = values.astype(np.int32) if values.dtype == np.uint16 else values
    return Image.fromarray(wide[..., 0] if values.shape[2] == 1 else wide)


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


def _pixel(image: "Image.Image") -> Pixel:
    """Return an opened file's channels and bits; of 16-bit colours Pillow drops half."""
    tiles = getattr(image, "tile", ()) if image.format == "PNG" else ()
    wide = image.mode in WIDE or any(";16" in str(tile[3]) for tile in tiles)
    channels = next((n for n, modes in CHANNELS.items() if image.mode in modes), len(image.getbands()))
    return Pixel(channels, 16 if wide else 8)


def _as_stored(image: "Image.Image", pixel: Pixel) -> "Image.Image":
    """Return an opened image whose file has these channels and bits."""
    found = _pixel(image)
    if found != pixel:
        why = "; Pillow reads 8 bits of 16-bit colours: save it with 8" if found == (pixel.channels, 16) else ""
        raise BrokenImage(f"has {found}, not {pixel}{why if found.channels > 1 else ''}")
    return image.convert({(1, 8): "L", (1, 16): "I", (4, 8): "RGBA"}[pixel])
