"""Shell patterns for the names of layers: what they match, and a refusal of one that matches nothing."""

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from compress.errors import ModelError

NAMED = 12  # layers that a refusal lists; the rest are counted


def matching(field: str, patterns: Collection[str], names: Sequence[str]) -> set[str]:
    """Return the names that one of the patterns matches.

    Raises ModelError, which starts with the recipe's `field`, for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            within = f"{pattern}.*" if any(name.startswith(f"{pattern}.") for name in names) else None
            near = within or next(iter(difflib.get_close_matches(pattern, names, 1)), None)
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            raise ModelError(
                f"{field}: {pattern} names no layer; {f'did you mean {near}? ' if near else ''}"
                f"(known: {', '.join(names[:NAMED])}{more})"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
