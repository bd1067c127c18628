"""Say how large images are: height and width in pixels, which files write as one number where they are equal."""

from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width in pixels."""
Shape = tuple[int, int, int]
"""One image as a network takes it: channels, height, width."""
Written = int | Sequence[int]
"""A size as files hold it: 224, or [96, 320] for height and width."""


def size_of(written: Written) -> Size:
    """Return the height and width that a file's size means."""
    height, width = (written, written) if isinstance(written, int) else written
    return height, width


def written(size: Size) -> int | list[int]:
    """Return a size as files hold it."""
    return size[0] if size[0] == size[1] else [*size]


def said(size: Written) -> str:
    """Return a size for people: 224, or 96 x 320."""
    height, width = size_of(size)
    return str(height) if height == width else f"{height} x {width}"


def area(size: Written) -> int:
    """Return how many pixels an image of a size has."""
    height, width = size_of(size)
    return height * width
