"""The shape of `report.json`. Accuracies are fractions; unknown values are None."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from compress.quant.rows import Ptq
from export.proof.audit import Audit, FloatTimes
from export.proof.rows import VerifyRow
from export.runtime.end_to_end import EndToEnd
from export.runtime.providers import Arithmetic
from export.runtime.rows import AccuracyRow, MetricJson, TimingRow
from export.tasks.task import Classes

Verdict = Literal["pass", "fail", "partial"]  # partial: stopped before the recipe's end, so its targets are not judged
Json = dict[str, Any]
REPORT_VERSION: Literal[3] = 3


class StageRow(TypedDict):
    """One stage: its metrics, how long it took, and whether it was reused from an earlier run."""

    stage: str
    key: str
    directory: str
    cached: bool
    seconds: float
    metrics: dict[str, float | None]


class DeployedRow(TimingRow, AccuracyRow):
    """One file timed at one setting in ONNX Runtime, with its accuracy there, the same in all of the file's rows."""


class Best(TypedDict):
    """A file in the provider and arithmetic in which it is served."""

    file: str
    provider: str
    arithmetic: Arithmetic


class Recommendation(TypedDict):
    """The file to serve on the target, None if the target was not measured, and the reason.

    `best` is what another provider of this machine serves faster; `file` is then for machines without that provider.
    """

    file: str | None
    sentence: str
    best: NotRequired[Best]


class Report(TypedDict):
    """Everything a run measured, and whether it meets the recipe's targets.

    `ptq`, `audit` and `verify` are None if no stage wrote them; audit and verify are by file. `limits` has a sentence for each of
    the export stage's limits that the deployed file exceeds. Every `score` is of `metric`. `data_digest` identifies the labelled images and, after a dash, those without labels.
    """

    schema_version: Literal[3]
    metric: MetricJson
    recipe: Json
    student: NotRequired[str]  # its name; missing where the run has a single one
    command: str
    environment: Json
    data_digest: str
    stages: list[StageRow]
    deployed: list[DeployedRow]
    end_to_end: NotRequired[dict[str, EndToEnd]]  # missing in older reports
    float_times: NotRequired[dict[str, FloatTimes]]  # by file
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
