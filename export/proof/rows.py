"""The content of verify.json: how far each INT8 file is from its reference."""

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class DistanceRow(TypedDict):
    """What is reported of a distance: levels of the grid (LSB), the fraction of values that differ, decibels."""

    max_lsb: int
    mean_lsb: float
    differing: float
    snr_db: float | None


class Saturation(TypedDict):
    """A layer that this machine's kernels compute wrongly, because sums of two products exceed 16 bits."""

    layer: str
    max_lsb: int
    weight_sum: int
    values: float  # fraction of its outputs that differ by more than rounding


class TensorRow(DistanceRow):
    """One tensor's distance end to end; `local` is that of its own layers alone, run on the reference's inputs."""

    name: str
    layers: tuple[str, ...]
    local: DistanceRow


class VerifyRow(TypedDict):
    """How a file's predictions and tensors compare with its reference; one file's entry of verify.json."""

    images: int
    tensor_images: int
    agreement: float
    agreement_ci95: tuple[float, float]
    score_reference: float | None
    score: float | None
    tensors: list[TensorRow]
    first_divergence: str | None
    saturation: tuple[Saturation, ...]
    saturation_possible: tuple[str, ...]
