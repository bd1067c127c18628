"""The images that set a network's INT8 ranges, without those whose values are many times the usual."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from compress.logs.stage_log import StageLog
from compress.models.saved import load_float
from compress.quant.outliers import TIMES, outliers, without
from compress.run import Run
from compress.training.device import place_
from export.errors import first


@dataclass(frozen=True)
class Calibration:
    """The first `images` calibration images, but for the outliers of the float network in the artifact `src`; read anew each time."""

    run: Run
    src: Path
    images: int

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches (n, channels, height, width) on the run's device."""
        return without(self._all(), self._left_out)

    def _all(self) -> Iterator[Tensor]:
        return (batch.images for batch in self.run.feed.calibration(self.images))

    @cached_property
    def _left_out(self) -> Tensor:
        return outliers(place_(load_float(self.src, trust_code=self.run.trust_code), self.run.device), self._all())

    def outliers(self, log: StageLog) -> list[str]:
        """Return the files of the outliers, and log them."""
        log.doing("looks for outliers among the calibration images")
        is_one, names = self._left_out.tolist(), self.run.feed.calibration_names(self.images)
        found = [name for name, left_out in zip(names, is_one, strict=True) if left_out]
        if found:
            log.note(
                f"calibrates without {len(found)} of {len(names)} images, on which the network's values are more than "
                f"{TIMES:g} times the usual: {first(found)}"
            )
        return found
