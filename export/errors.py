"""One tree of errors that a person can correct.

UserError                a sentence that names the thing, the value and the repair; a command prints it and exits with 2
├── BundleError          a model file or bundle
│   └── BrokenBundleError  the one that the gate judges (exit code 3)
├── DataError            a data folder, an image, a split; in training, too
└── CompressError        `compress.errors`: recipes, networks, artifacts
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal

Defect = Literal[
    "accuracy_differs",  # bundle.json gives another accuracy than the file was exported with
    "bad_content",  # one of its text files is not what every reader takes
    "cannot_run",  # ONNX Runtime refuses the file
    "changed_file",  # a digest differs
    "crashed",  # ONNX or ONNX Runtime crashed on the file
    "external_data",  # the file keeps weights in other files
    "float_layers",  # layers run in float that bundle.json does not promise so
    "golden_differs",  # the file does not answer the golden inputs as expected
    "labels_differ",  # labels.txt is not the list that the network was trained with
    "link",  # a symbolic link
    "missing_class",  # labels.txt names fewer or more classes than the network answers
    "missing_file",
    "not_onnx",  # not an ONNX model, or a damaged one
    "other_copy",  # what a server would run is not what the bundle describes
    "out_of_memory",  # the file needs more memory than it may
    "outside_path",  # a path that leaves the bundle
    "preprocess_differs",  # preprocess.json is not what the network was trained with
    "saturating_weights",  # weights off the target's grid: sums saturate where it will run
    "target_differs",  # made for another machine than bundle.json says
    "timed_out",  # the file takes more time than it may
    "too_large",  # larger, or claims to be larger, than any legal one
    "unlisted_file",  # SHA256SUMS does not cover it
    "unusable",  # anything else that keeps a model or bundle from being used
    "wrong_facts",  # bundle.json says of a file what the file is not
    "wrong_shape",  # not one batch of square images in and one output out
]


MAX_LENGTH = 1500  # characters of a message


class UserError(Exception):
    """Report what a person can correct; the message names the thing, its value and the repair."""


class BundleError(UserError):
    """Report a model or bundle that cannot be used as it is; the message names the thing, its value and the repair.

    `defect` names what is wrong with a bundle. Foreign names are in the message: control characters, which could drive
    the reader's terminal, are escaped, and the middle of an endless one is left out.
    """

    def __init__(self, message: str, *, defect: Defect = "unusable") -> None:
        super().__init__(_harmless(message))
        self.defect: Defect = defect


class DataError(UserError):
    """Report images that cannot be used as they are; of the names of files, too, control characters are escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(_harmless(message))


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like this one (difflib's ratio, from 0 to 1), None where none is like it."""
    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, most: int = 1) -> str:
    """Return `did you mean X?` with the known names that are most like this one, or another sentence where none is."""
    near = get_close_matches(name, list(known), most)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _harmless(message: str) -> str:
    if len(message) > MAX_LENGTH:
        message = f"{message[: MAX_LENGTH - 300]} … {message[-200:]}"
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message)
