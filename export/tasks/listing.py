"""What data sets, digests and scores ask of a folder's images, whatever their truths are."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import ClassVar, Protocol


class Listing(Protocol):
    """The images of a folder with their truths, by split; `val` is None without a validation set."""

    fewest: ClassVar[int]
    """The number of classes with which something can be learned."""

    @property
    def root(self) -> Path:
        """The folder."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names in the order of their indices."""

    @property
    def train(self) -> Sized:
        """The training images."""

    @property
    def val(self) -> Sized | None:
        """The validation images."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was chosen or left out."""

    def place(self, part: str) -> str:
        """Return where the images of a split belong."""

    def names(self) -> list[str]:
        """Return the paths of all files."""

    def decisive(self) -> Mapping[str, object]:
        """Return what decides the data besides the classes' names and the files' content."""
