"""The shape of `report.json`. Accuracies are fractions, what is unknown is None."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads a report by these; typing's it takes from Python 3.12 on

from export.audit import Audit
from export.runtime.end_to_end import EndToEnd
from export.runtime.rows import AccuracyRow, MetricJson, TimingRow
from export.tasks.task import Classes

Verdict = Literal["pass", "fail", "partial"]  # partial: stopped before the recipe's end, so its targets are not judged
Json = dict[str, Any]
REPORT_VERSION: Literal[3] = 3


class StageRow(TypedDict):
    """One stage: what it measured, how long it took, and whether it was kept from an earlier run."""

    stage: str
    key: str
    directory: str
    cached: bool
    seconds: float
    metrics: dict[str, float | None]


class DeployedRow(TimingRow, AccuracyRow):
    """One file, timed at one setting in ONNX Runtime, with its accuracy there, which is the same in all of its rows."""


class MethodRow(TypedDict):
    """One way of calibrating INT8 without training, None where it failed; agreement is with the float student's answers."""

    engine: str
    method: str
    scored_in: str
    score: float | None
    agreement: float | None
    integer_layers: int | None
    float_layers: int | None
    note: str | None


class GroupRow(TypedDict):
    """What quantizing one group of layers alone does to the float student's answers."""

    group: str
    kl: float
    drop: float


class TrialRow(TypedDict):
    """One file that tuning built: how, what it loses against the float student, how many times faster than it (FP32) it is.

    `kl` is the mean divergence in nats of its answers from that one's.
    """

    number_format: str
    engine: NotRequired[str]  # whose quantizer; a report.json of before has this pipeline's alone
    calibration: str
    keep_float: list[str]
    score: float
    drop: float
    agreement: float
    kl: float
    latency_ratio: float | None
    met: bool


class PtqTarget(TypedDict):
    """INT8 without training on one target's grid; `chosen` is an index of the trials, whose numbers are of the tuning images.

    `score` is the chosen file's on the validation images, `calibration` the best method, from which qat starts.
    """

    methods: list[MethodRow]
    sensitivity: list[GroupRow]
    trials: list[TrialRow]
    chosen: int
    calibration: str
    score: float


class Ptq(TypedDict):
    """The ptq stage's ptq.json: methods are reported on `images` of validation, trials are chosen by `tuning_images` of training."""

    images: int
    float_score: float
    tuning_images: int
    targets: dict[str, PtqTarget]


class Distance(TypedDict):
    """How far one tensor of the file lies from the reference's, in levels of its grid (LSB) and in decibels."""

    max_lsb: int
    mean_lsb: float
    differing: float
    snr_db: float | None


class TensorRow(Distance):
    """One tensor end to end; `local` is what its own layers add, run on the reference's inputs."""

    name: str
    local: Distance


class SaturationRow(TypedDict):
    """One layer whose 16-bit sums overflow on the machine that verified it."""

    layer: str
    max_lsb: int
    weight_sum: int
    values: float


class VerifyRow(TypedDict):
    """One INT8 file in ONNX Runtime against its reference, tensor by tensor on the first `tensor_images` images."""

    images: int
    tensor_images: int
    agreement: float
    agreement_ci95: list[float]
    score_reference: float | None
    score: float | None
    tensors: list[TensorRow]
    first_divergence: str | None
    saturation: list[SaturationRow]
    saturation_possible: list[str]


class Recommendation(TypedDict):
    """The file to serve on the target, None where the target was not measured, and why."""

    file: str | None
    sentence: str


class Report(TypedDict):
    """Everything a run measured, and whether that is what its recipe wanted.

    `ptq`, `audit` and `verify` are None where no stage wrote them; audit and verify are by file. `limits` has a sentence for each of
    the export stage's limits that the deployed file is over. `metric` is what every `score` is of. `data_digest` names the images.
    """

    schema_version: Literal[3]
    metric: MetricJson
    recipe: Json
    command: str
    environment: Json
    data_digest: str
    stages: list[StageRow]
    deployed: list[DeployedRow]
    end_to_end: NotRequired[dict[str, EndToEnd]]  # a report.json of before has none
    classes: Classes | None
    ptq: Ptq | None
    audit: dict[str, Audit] | None
    verify: dict[str, VerifyRow] | None
    limits: list[str]
    recommendation: Recommendation | None
    targets: dict[str, float | None]
    verdict: Verdict
    failures: list[str]
    warnings: list[str]
