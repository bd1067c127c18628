"""The shape of `report.json`. Accuracies are fractions, what is unknown is None."""

from typing import Any, Literal, TypedDict

Verdict = Literal["pass", "fail"]
Json = dict[str, Any]


class StageRow(TypedDict):
    """One stage: what it measured, how long it took, and whether it was kept from an earlier run."""

    stage: str
    key: str
    directory: str
    cached: bool
    seconds: float | None
    metrics: dict[str, float | None]


class Speedup(TypedDict):
    """How many times faster than the file `vs` under the same conditions, with its 95 % interval."""

    vs: str
    ratio: float
    ci95: list[float]


class DeployedRow(TypedDict):
    """One file, timed with one provider, thread count (0 is all), batch and image size.

    Top-1 and agreement (with the float student's answers, over `images`) are the file's, in ONNX Runtime.
    """

    name: str
    file: str
    precision: str
    provider: str
    provider_options: Json
    threads: int
    batch: int
    image_size: int
    top1: float | None
    agreement: float | None
    images: int | None
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    throughput_ips: float | None
    runs: int | None
    size_mb: float | None
    peak_memory_mb: float | None
    speedup: Speedup | None
    speedup_vs_student_fp32: Speedup | None


class Report(TypedDict):
    """Everything a run measured, and whether that is what its recipe wanted."""

    schema_version: Literal[1]
    recipe: Json
    command: str
    environment: Json
    stages: list[StageRow]
    deployed: list[DeployedRow]
    targets: dict[str, float | None]
    verdict: Verdict
    failures: list[str]
    warnings: list[str]
