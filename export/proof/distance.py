"""Distance of a tensor from its reference: in levels of its grid, and as a signal-to-noise ratio."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.proof.rows import DistanceRow

# For a layer alone, file and reference can differ by one level at ties, but not by more. Measured on every tensor of MobileNetV2 and
# EfficientNet-B0 (random weights, 64 pixels, cpu_vnni) and of the tests' networks: no value differed by two levels, at most 0.53 % by
# one, and 3.1 % after an addition with scales 1:2, where every other sum is a tie.
FAR = 2
MAX_FAR = 1e-4
MAX_DIFFERING = 0.1


@dataclass
class Distance:
    """Distance of one tensor from its reference, accumulated over batches."""

    values: int = 0
    max_lsb: int = 0
    sum_lsb: float = 0.0
    differing: int = 0
    far: int = 0  # by FAR levels or more
    signal: float = 0.0
    noise: float = 0.0

    def add_(self, expected: NDArray[np.float32], got: NDArray[np.float32], scale: float | None) -> None:
        """Count one batch; for a tensor without a grid, a level is 1/255 of the reference's range."""
        unit = scale or float(np.ptp(expected)) / 255 or 1.0
        error = expected.astype(np.float64) - got
        levels = np.rint(np.abs(error) / unit)
        self.values += levels.size
        self.max_lsb = max(self.max_lsb, int(levels.max()))
        self.sum_lsb += float(levels.sum())
        self.differing += int(np.count_nonzero(levels))
        self.far += int(np.count_nonzero(levels >= FAR))
        self.signal += float(np.square(expected, dtype=np.float64).sum())
        self.noise += float(np.square(error).sum())

    @property
    def diverges(self) -> bool:
        """Whether the distance is more than rounding, for a layer that got its reference's inputs."""
        return self.far > MAX_FAR * self.values or self.differing > MAX_DIFFERING * self.values

    @property
    def snr_db(self) -> float | None:
        """10 log10 of the reference's energy over the error's; None if either is zero."""
        return 10 * float(np.log10(self.signal / self.noise)) if self.noise and self.signal else None

    def to_json(self) -> DistanceRow:
        """Return the reported numbers."""
        return DistanceRow(
            max_lsb=self.max_lsb,
            mean_lsb=self.sum_lsb / self.values,
            differing=self.differing / self.values,
            snr_db=self.snr_db,
        )
