"""The images of a folder by split, each with its truth or the file that has it; and the names of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from export.errors import DataError

TRAIN, VAL_NAMES = "train", ("val", "valid", "validation", "test")
NO_LABEL = -1  # the class of an image without one
LONGEST_NAME = 200  # characters of a class's name
Truth = TypeVar("Truth", int, str)
Pair = tuple[str, str]
"""The paths of an image and of the file with its truth, relative to the data set's root."""


@dataclass(frozen=True)
class SplitListing(Generic[Truth]):
    """Images in the order of their paths, each with its class or the file of its truth; all paths are relative to `root`.

    `val` is None without a validation set, `train` is empty if there is nothing else. `notes` are sentences on what was
    chosen or left out.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, Truth], ...]
    val: tuple[tuple[str, Truth], ...] | None
    notes: tuple[str, ...] = ()
    fewest: ClassVar[int] = 1  # classes with which something can be learned
    where: ClassVar[str]  # the images of a split `part` below `root` belong

    @property
    def judged(self) -> tuple[tuple[str, Truth], ...]:
        """The validation images; all where there is no split."""
        return self.train if self.val is None else self.val

    @property
    def every(self) -> tuple[tuple[str, Truth], ...]:
        """All images."""
        return self.train + (self.val or ())

    def place(self, part: str) -> str:
        """Return where the images of a split belong."""
        return self.where.format(root=self.root, part=part)

    def names(self) -> list[str]:
        """Return the paths of all files."""
        return sorted({name for entry in self.every for name in entry if isinstance(name, str)})

    def decisive(self) -> dict[str, object]:
        """Return what decides the data besides the classes' names and the files' content."""
        return {"labels": sorted(self.every)}


def is_label(text: str) -> bool:
    """Tell whether a class name is one printable line."""
    return text.isprintable() and text == text.strip() != ""


def check_lengths(where: object, classes: Sequence[str]) -> None:
    """Raise DataError for a class name of more than LONGEST_NAME characters."""
    if long := next((name for name in classes if len(name) > LONGEST_NAME), None):
        raise DataError(
            f"{where}: the class name {long[:40]!r} … has {len(long):,} characters, at most {LONGEST_NAME} are allowed: shorten it"
        )


def count(names: Sequence[str], noun: str) -> str:
    """Return the number of names with the noun in singular or plural."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{len(names):,} {noun}{'' if len(names) == 1 else plural}"
