"""The installed distribution of this package: version, requirements, license."""

from functools import cache
from importlib.metadata import Distribution, distributions

from compress.errors import CompressError


@cache
def own_distribution() -> Distribution:
    """Return the distribution that contains the package `compress`, since on the index that name is another project's.

    An `*.egg-info` that a build leaves in the clone does not count: it has no RECORD and no license. Raises CompressError if
    there is no distribution.
    """
    for found in distributions():
        if "compress" in (found.read_text("top_level.txt") or "").split() and found.read_text("RECORD") is not None:
            return found
    raise CompressError("compress: is on the path but not installed: run make setup, or pip install -e . in the clone")
