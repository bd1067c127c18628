"""The installed distribution that this package came in: its version, its requirements, its license."""

from functools import cache
from importlib.metadata import Distribution, distributions

from compress.errors import CompressError


@cache
def own_distribution() -> Distribution:
    """Return the distribution that holds the package `compress`: in an index that name is another project's.

    What a build leaves in the clone (`*.egg-info`) is no installed one: it has no RECORD, and no license. Raises CompressError
    where there is none.
    """
    for found in distributions():
        if "compress" in (found.read_text("top_level.txt") or "").split() and found.read_text("RECORD") is not None:
            return found
    raise CompressError("compress: is not installed, only on the path: make setup, or pip install -e . in the clone")
