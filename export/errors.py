"""The tree of errors that a user can correct.

UserError                a sentence that names the thing, the value and the repair; a command prints it and exits with 2
├── BundleError          a model file or bundle
│   ├── ContentError       text of a bundle that readers would refuse
│   └── BrokenBundleError  the bundle that the gate judges (exit code 3)
├── DataError            a data folder, an image, a split; also in training
└── CompressError        `compress.errors`: recipes, networks, artifacts
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Literal

Defect = Literal[
    "accuracy_differs",  # bundle.json has another score than the file's export measured
    "bad_content",  # a text file has content that readers would refuse
    "cannot_run",  # ONNX Runtime refuses the file
    "changed_file",  # a digest differs
    "crashed",  # ONNX or ONNX Runtime crashed on the file
    "external_data",  # the file keeps weights in other files
    "float_layers",  # layers run in float that bundle.json does not list
    "golden_differs",  # the file's outputs for the golden inputs are not the expected ones
    "labels_differ",  # labels.txt differs from the classes that the network was trained with
    "link",  # a symbolic link
    "missing_class",  # labels.txt has fewer or more classes than the network's output
    "missing_file",
    "not_onnx",  # not an ONNX model, or a damaged one
    "other_copy",  # a server would run another file than the bundle describes
    "out_of_memory",  # the file needs more memory than allowed
    "outside_path",  # a path that leaves the bundle
    "preprocess_differs",  # preprocess.json differs from the network's training
    "saturating_weights",  # weights off the target's grid, so that sums saturate there
    "target_differs",  # made for another target than bundle.json says
    "timed_out",  # the file takes more time than allowed
    "too_large",  # is, or claims to be, larger than allowed
    "unlisted_file",  # not in SHA256SUMS
    "unusable",  # any other reason why a model or bundle cannot be used
    "wrong_facts",  # bundle.json contradicts the file
    "wrong_runtime",  # no fault of the file: this ONNX Runtime computes it wrongly on this processor
    "wrong_shape",  # not one input for square images and one output
]


MAX_LENGTH = 1500  # characters of a message


class UserError(Exception):
    """Report what the user can correct; the message names the thing, its value and the repair."""


class BundleError(UserError):
    """Report a model or bundle that cannot be used as it is; the message names the thing, its value and the repair.

    `defect` names the kind of problem. Messages contain untrusted names: control characters, which could control the reader's
    terminal, are escaped, and the middle of a very long message is left out.
    """

    def __init__(self, message: str, *, defect: Defect = "unusable") -> None:
        super().__init__(_harmless(message))
        self.defect: Defect = defect


class ContentError(BundleError):
    """Report text in a bundle that readers would refuse."""

    def __init__(self, message: str) -> None:
        super().__init__(message, defect="bad_content")


class DataError(UserError):
    """Report images that cannot be used as they are; control characters in file names are escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(_harmless(message))


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name most similar to this one (difflib's ratio at least `cutoff`), or None."""
    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, most: int = 1) -> str:
    """Return `did you mean X?` with the known names most similar to this one, or `otherwise` if there are none."""
    near = get_close_matches(name, list(known), most)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def first(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _harmless(message: str) -> str:
    if len(message) > MAX_LENGTH:
        message = f"{message[: MAX_LENGTH - 300]} … {message[-200:]}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message)
