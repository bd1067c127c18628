"""Types for argparse that the commands share."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """Return a parser for integers >= `lowest`, for argparse."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise ArgumentTypeError(f"must be a whole number >= {lowest}, got {text!r}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Parse a number above zero, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value
