"""Errors that a user can cause, a branch of the tree in `export.errors`.

CompressError            one sentence with the thing, the value and the repair; the command line prints it and exits with 2
├── RecipeError          one or more mistakes in a recipe, one line each
├── ModelError           an architecture or its weights
└── ArtifactError        a run folder: not writable, in use, damaged
"""

import re
import sysconfig
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from traceback import format_exception

from export.errors import UserError, nearest

STACK_LINE = re.compile(r'File "([^"<]+)", line (\d+), in .+\n\s*(.+)')
PACKAGE = Path(__file__).parent
FOREIGN = (sysconfig.get_path("stdlib"), str(PACKAGE), str(PACKAGE.with_name("export")))


class CompressError(UserError):
    """Report a user's mistake; the message names the thing, its value and the repair."""


class RecipeError(CompressError):
    """Report every mistake found in a recipe, one line each."""


class ModelError(CompressError):
    """Report an architecture or weights that cannot be used as they are."""


class ArtifactError(CompressError):
    """Report a run folder that cannot be written, is in use, or is damaged."""


def own_line(error: BaseException) -> str:
    """Return ` (mine.py, line 12: if x.sum() > 0:)`, the innermost line of the user's code that raised an error, or ""."""
    own = [
        (file, line, code)
        for file, line, code in STACK_LINE.findall("".join(format_exception(error)))
        if "-packages" not in file and not file.startswith(FOREIGN)
    ]
    return " ({}, line {}: {})".format(*own[-1]) if own else ""


NAMED = 12  # layers that a message lists; the others are counted


def matching(field: str, patterns: Collection[str], names: Sequence[str]) -> set[str]:
    """Return the names that match any of the patterns; raise ModelError, with the recipe's `field`, for one that none matches."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            within = f"{pattern}.*" if any(name.startswith(f"{pattern}.") for name in names) else None
            near = within or nearest(pattern, names)
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            raise ModelError(
                f"{field}: {pattern} matches no layer; {f'did you mean {near}? ' if near else ''}"
                f"(known: {', '.join(names[:NAMED])}{more})"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
