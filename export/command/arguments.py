"""What the commands on a bundle ask for in the same words."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from export.bundle.read import Bundle
from export.errors import BundleError


def chosen(bundle: Bundle, name: str | None) -> Path:
    """Return the file `name`, or the one that the bundle is made to serve; raise BundleError for a name it lacks."""
    if name is not None and name not in bundle.files:
        raise BundleError(f"--file: the bundle has {', '.join(bundle.files)}, got {name!r}: name one of them")
    return bundle.files[name or bundle.served]


def at_least(lowest: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `lowest` on, for argparse."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise ArgumentTypeError(f"must be a whole number >= {lowest}, got {text!r}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Read a number above zero, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value
