"""The content of bench.json: accuracy for each file, and a row of timings for each file at each setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from export.images.size import Size, said, written
from export.onnx_file.model_file import ModelFile
from export.onnx_file.roles import FP32, TEACHER
from export.onnx_file.targets import CPU
from export.runtime.conditions import Conditions
from export.runtime.latency import Timing, speedup
from export.tasks.task import Metric


class AccuracyRow(TypedDict):
    """One file on all images: its score, its task's further metrics by name, and its agreement with the float student."""

    score: float
    further: dict[str, float | None]
    agreement: float
    images: int
    score_ci95: NotRequired[tuple[float, float]]  # by resampling images, if the score does not count them
    agreement_ci95: NotRequired[tuple[float, float]]


class Speedup(TypedDict):
    """How many times faster than the file `vs`, with the 95 % interval."""

    vs: str
    ratio: float
    ci95: list[float]


class TimingRow(TypedDict):
    """One file at one setting; MB are 10^6 bytes, and peak memory is what a run on one thread adds to ONNX Runtime's own."""

    name: str
    file: str
    precision: str
    provider: str
    threads: int
    batch: int
    image_size: int | list[int]  # a square's side, or height and width
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_ips: float
    runs: int
    block_ms: NotRequired[list[float]]  # each block's median; missing in older reports
    size_mb: float
    peak_memory_mb: float | None
    provider_options: dict[str, str]
    speedup: Speedup | None
    speedup_vs_student_fp32: Speedup | None


class MetricJson(TypedDict):
    """The metric of every `score`: its name in files and its title for readers."""

    name: str
    title: str


def metric_json(metric: Metric) -> MetricJson:
    """Return a task's metric as JSON."""
    return MetricJson(name=metric.name, title=metric.title)


class BenchJson(TypedDict):
    """The whole file."""

    metric: MetricJson
    accuracy: dict[str, AccuracyRow]
    timings: list[TimingRow]
    environment: dict[str, object]
    warnings: list[str]


@dataclass(frozen=True)
class Setting(Conditions):
    """The conditions under which files are compared, with the images' size."""

    image_size: Size

    def __str__(self) -> str:
        threads = {0: "all cores", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        where = f"CPU, {threads}" if self.provider == CPU else "CUDA"
        return f"{where}, batch {self.batch}, {said(self.image_size)} px"


def is_headline(provider: str, threads: int, batch: int) -> bool:
    """Tell whether these are the headline's conditions: batch 1, and on a CPU one thread."""
    return batch == 1 and (threads == 1 or provider != CPU)


def timing_row(
    name: str,
    file: Path,
    facts: ModelFile,
    setting: Setting,
    timed: Mapping[str, Timing],
    *,
    provider_options: dict[str, str],
    peak_memory_mb: float | None,
) -> TimingRow:
    """Return the row of one file among those `timed` together."""
    timing = timed[name]
    p50, p90, p99 = (timing.percentile(percent) for percent in (50, 90, 99))
    return TimingRow(
        name=name,
        file=file.name,
        precision=facts.precision,
        provider=setting.provider,
        threads=setting.threads,
        batch=setting.batch,
        image_size=written(setting.image_size),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        throughput_ips=setting.batch / p50 * 1e3,
        runs=timing.runs,
        block_ms=timing.block_ms.tolist(),
        size_mb=facts.bytes / 1e6,
        peak_memory_mb=peak_memory_mb,
        provider_options=provider_options,
        speedup=speedup_row(TEACHER, name, timed),
        speedup_vs_student_fp32=speedup_row(FP32, name, timed),
    )


def speedup_row(reference: str, name: str, timed: Mapping[str, Timing]) -> Speedup | None:
    """Return the speed-up of `name` over `reference`, or None if the reference was not timed."""
    if reference not in timed:
        return None
    found = speedup(timed[reference], timed[name])
    return Speedup(vs=reference, ratio=found.ratio, ci95=[found.low, found.high])
