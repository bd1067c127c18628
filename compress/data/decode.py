"""Open an image file under guard: named formats, a cap on its pixels, nothing truncated."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte decoded
# What Pillow's decoders raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error)
NAMED = 3  # broken files that an error names; the rest are counted


class BrokenImage(Exception):
    """Report why one file is not an image that can be used; callers count and name them."""


def read_image(path: Path) -> Image.Image:
    """Return the file's pixels as RGB, fully decoded; the header alone decides whether decoding starts.

    Raises `BrokenImage` for a file that is missing, truncated, of another format, above `MAX_PIXELS`, or wider than 8 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _rgb(image)
    except UnidentifiedImageError:
        raise BrokenImage(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # a warning where warnings are errors
        raise BrokenImage(f"more than {MAX_PIXELS:,} pixels") from None
    except DAMAGE as error:
        raise BrokenImage(getattr(error, "strerror", None) or str(error)) from None


def _rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width:,} x {height:,} is more than {MAX_PIXELS:,} pixels")
    if image.mode.startswith(("I", "F")):
        raise BrokenImage(f"more than 8 bits a channel (mode {image.mode}); convert it to 8")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def describe_broken(broken: Mapping[str, str], total: int) -> str:
    """Return one sentence that counts the broken files and names the first few, with the reason for each."""
    named = [f"{name} ({broken[name]})" for name in sorted(broken)[:NAMED]]
    more = f" and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
    return f"{len(broken):,} of {total:,} images cannot be read: {', '.join(named)}{more}"
