"""Truths that move with an image's view: what image sets ask of masks and of boxes."""

from typing import Protocol

import numpy as np
from torch import Tensor

from compress.data.stored import Stored
from compress.data.views import Boxes
from export.images.size import Size


class Fill(Protocol):
    """Reads each image's truth into memory while the images are decoded."""

    def put_(self, index: int, kept: tuple[int, int]) -> None:
        """Read the truth of an image that is stored at (height, width) `kept`; raises BrokenImage."""

    def filled(self, good: np.ndarray, still: Stored, whole: Stored | None) -> "Placed":
        """Return the truths of the images that were not broken, at the sizes at which those are stored."""


class Placed(Protocol):
    """The truths of a set of images, by their indices."""

    def still(self, chosen: Tensor) -> Tensor:
        """Return the truths (m, ...) of the chosen images in evaluation's view."""

    def seen(self, chosen: Tensor, boxes: Boxes, size: Size, *, whole: bool) -> Tensor:
        """Return the truths in an augmented view, whose `boxes` are cut from the whole images or from evaluation's."""


class PlacedSource(Placed, Protocol):
    """The truths of images that are not decoded yet."""

    def take(self, chosen: np.ndarray) -> "PlacedSource":
        """Return the truths of the images with these indices."""

    def begin(self, area: int) -> Fill:
        """Return the object that reads the truths into memory; with `area` > 0 also those of whole images."""
