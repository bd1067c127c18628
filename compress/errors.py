"""What a user can cause beside `export.errors`, whose tree this is a branch of.

CompressError            a sentence that names the thing, the value and the repair; the command line prints it and exits with 2
├── RecipeError          one or more mistakes in a recipe, one line each
├── ModelError           an architecture or its weights
└── ArtifactError        a run folder: not writable, in use, damaged
"""

from export.errors import UserError


class CompressError(UserError):
    """Report a mistake of the user's; the message names the thing, its value and the repair."""


class RecipeError(CompressError):
    """Report every mistake found in a recipe, one line each."""


class ModelError(CompressError):
    """Report an architecture or weights that cannot be used as they are."""


class ArtifactError(CompressError):
    """Report a run folder that cannot be written, is in use, or is damaged."""
