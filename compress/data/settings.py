"""What decides a data set's images, their split and their preprocessing, as plain values. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from compress.data.named import DATA_SETS
from export.images.preprocess import Look
from export.images.size import Size, size_of


@dataclass(frozen=True)
class DataSettings:
    """The settings that decide a data set's images, their split and their preprocessing.

    With `tuning` the validation images are held out of the training images, even if the data set has a validation set.
    `memory` is the folder where file digests are cached; it changes no result.
    """

    name: str
    path: Path | None
    image_size: Size | None  # None takes the data set's own
    resize: float
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    val_fraction: float
    limit_per_class: int | None
    skip_broken: bool
    task: str
    ignore_index: int | None
    seed: int
    tuning: bool
    memory: Path
    unlabelled: Path | None = None
    stretch: bool = False
    look: Look = field(default_factory=Look)

    @property
    def size(self) -> Size:
        """What the network sees."""
        return self.image_size or size_of(DATA_SETS[self.name].size)

    @property
    def resize_to(self) -> Size:
        """What evaluation resizes images to before it crops them."""
        height, width = self.size
        return round(height * self.resize), round(width * self.resize)
