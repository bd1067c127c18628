"""The content of ptq.json: methods and trials of each target. Scores are fractions; unknown values are None."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

Engine = Literal["compress", "onnxruntime", "neural-compressor"]  # which library quantizes
Method = Literal["minmax", "percentile", "entropy"]  # how ranges are chosen


class MethodRow(TypedDict):
    """One method of calibrating INT8 without training, with None if it failed; agreement is with the float student."""

    engine: Engine
    method: str
    scored_in: str
    score: float | None
    agreement: float | None
    integer_layers: int | None
    float_layers: int | None
    note: str | None


class GroupRow(TypedDict):
    """Damage to the float network's outputs by quantizing one group of layers alone: mean KL in nats, drop in score."""

    group: str
    kl: float
    drop: float


class TrialRow(TypedDict):
    """One file that tuning built: how, its score and drop against the float network on the same images.

    `kl` is the mean divergence of its outputs, in nats; `latency_ratio` is the float file's time over this file's.
    """

    number_format: Literal["int8", "fp16"]
    calibration: str
    keep_float: list[str]
    engine: NotRequired[Engine]  # missing in older reports, which had only this project's
    score: float
    drop: float
    agreement: float
    kl: float
    latency_ratio: float | None
    latency_ci95: NotRequired[list[float] | None]  # missing in older reports
    met: bool


class SpeedRow(TypedDict):
    """A layer's time in the float file and in the file all in integers, with what follows it up to the next layers."""

    layer: str
    float_ms: float
    integer_ms: float
    in_float: bool  # the kept file has it in float for this reason


class PtqTarget(TypedDict):
    """INT8 without training on one target's grid; `chosen` is an index into `trials`, which are scored on tuning images.

    `kept` is the index whose INT8 file was kept, another one if FP16 was chosen. `score` is the chosen file's on validation images,
    `calibration` the best method, from which qat starts.
    """

    methods: list[MethodRow]
    sensitivity: list[GroupRow]
    trials: list[TrialRow]
    chosen: int
    kept: NotRequired[int]  # missing in older reports
    speed: NotRequired[list[SpeedRow]]  # empty where layers were not timed
    calibration: Method
    score: float


def faster_in_float(found: PtqTarget) -> list[SpeedRow]:
    """Return the layers that stay in float because they are faster so."""
    return [row for row in found.get("speed", ()) if row["in_float"]]


class Ptq(TypedDict):
    """The whole file: methods are scored on `images` validation images, trials on `tuning_images` training images.

    `outliers` are the files that calibration left out.
    """

    images: int
    float_score: float
    tuning_images: int
    outliers: NotRequired[list[str]]  # missing in older reports
    targets: dict[str, PtqTarget]
