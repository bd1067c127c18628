"""The content of bench.json: accuracy for each file, and a row of timings for each file at each setting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from export.images.size import Size, said, written
from export.onnx_file.model_file import ModelFile
from export.onnx_file.roles import FP32, TEACHER
from export.runtime.conditions import Conditions
from export.runtime.latency import Timing, speedup
from export.runtime.providers import PLAIN, Arithmetic, Runtime, provider_named
from export.runtime.session import Run
from export.tasks.task import Metric


class AccuracyRow(TypedDict):
    """One file on all images: its score, its task's further metrics by name, and its agreement with the float student."""

    score: float
    further: dict[str, float | None]
    agreement: float
    images: int
    score_ci95: NotRequired[tuple[float, float]]  # by resampling images, if the score does not count them
    agreement_ci95: NotRequired[tuple[float, float]]
    measures: NotRequired[dict[str, float | None]]  # in their own units: SNR in dB, a person's metric; more is better


class OtherAccuracy(TypedDict):
    """The files' accuracy in another provider or arithmetic than the CPU provider in f32; agreement is with its float student."""

    provider: str
    arithmetic: Arithmetic
    files: dict[str, AccuracyRow]


class Speedup(TypedDict):
    """How many times faster than the file `vs`, with the 95 % interval."""

    vs: str
    ratio: float
    ci95: list[float]


class TimingRow(TypedDict):
    """One file at one setting; MB are 10^6 bytes, and peak memory is what a run on one thread adds to ONNX Runtime's own.

    Speed-ups are over the files of the setting's first provider in f32: on a CPU the CPU provider's, if it was timed.
    """

    name: str
    file: str
    precision: str
    provider: str
    arithmetic: NotRequired[Arithmetic]  # of float parts; missing in older reports, which is f32
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
    open_ms: NotRequired[float | None]  # to open a session, compiling included
    left_to_others: NotRequired[list[str]]  # nodes that a plugin left to another provider
    speedup: Speedup | None
    speedup_vs_student_fp32: Speedup | None


class MetricJson(TypedDict):
    """The metric of every `score`: its name in files and its title for readers."""

    name: str
    title: str


def accuracy_of(
    row: TimingRow, accuracy: Mapping[str, AccuracyRow], elsewhere: Sequence[OtherAccuracy]
) -> AccuracyRow | None:
    """Return the accuracy of a row's file in the row's own provider and arithmetic; where that was not scored, the CPU provider's."""
    runs_in = row["provider"], row.get("arithmetic", "f32")
    own = (other["files"] for other in elsewhere if (other["provider"], other["arithmetic"]) == runs_in)
    return next(own, accuracy).get(row["name"])


def file_in(name: str, runs_in: Runtime) -> str:
    """Return a file's name among those of all providers: its own in the CPU provider."""
    return name if runs_in == PLAIN else f"{name} in {runs_in}"


def metric_json(metric: Metric) -> MetricJson:
    """Return a task's metric as JSON."""
    return MetricJson(name=metric.name, title=metric.title)


class BenchJson(TypedDict):
    """The whole file."""

    metric: MetricJson
    accuracy: dict[str, AccuracyRow]
    accuracy_elsewhere: NotRequired[list[OtherAccuracy]]
    timings: list[TimingRow]
    environment: dict[str, object]
    warnings: list[str]


@dataclass(frozen=True)
class Setting(Conditions):
    """The conditions under which files are compared, with the images' size; `provider` is the first that is timed."""

    image_size: Size = field(kw_only=True)

    def __str__(self) -> str:
        row = provider_named(self.provider)
        threads = {0: "all cores", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        where = f"CPU, {threads}" if row.device == "cpu" else row.title
        return f"{where}, batch {self.batch}, {said(self.image_size)} px"


class Entry(NamedTuple):
    """One file in one provider and arithmetic."""

    name: str
    runs_in: Runtime

    def key(self, setting: Setting) -> str:
        """Return a name that is unique in a setting: the file's own in the setting's first provider."""
        is_first = (self.runs_in.provider.name, self.runs_in.arithmetic) == (setting.provider, "f32")
        return self.name if is_first else f"{self.name} in {self.runs_in}"


@dataclass(frozen=True)
class Opened:
    """One file's session: a function that runs it, the provider's options, the time to open it, and nodes left to other providers."""

    run: Run
    options: dict[str, str]
    milliseconds: float | None
    left: list[str]


def is_headline(provider: str, threads: int, batch: int) -> bool:
    """Tell whether these are the headline's conditions: batch 1, and on a CPU one thread."""
    return batch == 1 and (threads == 1 or provider_named(provider).device != "cpu")


def timing_row(
    entry: Entry,
    file: Path,
    facts: ModelFile,
    setting: Setting,
    timed: Mapping[str, Timing],
    *,
    opened: Opened,
    peak_memory_mb: float | None,
) -> TimingRow:
    """Return the row of one file among those `timed` together."""
    timing, key = timed[entry.key(setting)], entry.key(setting)
    p50, p90, p99 = (timing.percentile(percent) for percent in (50, 90, 99))
    return TimingRow(
        name=entry.name,
        file=file.name,
        precision=facts.precision,
        provider=entry.runs_in.provider.name,
        arithmetic=entry.runs_in.arithmetic,
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
        provider_options=opened.options,
        open_ms=opened.milliseconds,
        left_to_others=opened.left,
        speedup=speedup_row(TEACHER, key, timed),
        speedup_vs_student_fp32=speedup_row(FP32, key, timed),
    )


def speedup_row(reference: str, name: str, timed: Mapping[str, Timing]) -> Speedup | None:
    """Return the speed-up of `name` over `reference`, or None if the reference was not timed."""
    if reference not in timed:
        return None
    found = speedup(timed[reference], timed[name])
    return Speedup(vs=reference, ratio=found.ratio, ci95=[found.low, found.high])
