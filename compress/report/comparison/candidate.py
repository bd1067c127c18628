"""One run in a comparison: its deployed file's numbers, from the report or a bundle's manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from compress.report.judge.verdict import (
    any_row,
    deployed_name,
    first_and_last,
    headline_provider,
    headline_rows,
    target_of,
)
from compress.report.page import summary
from compress.report.shape import DeployedRow, Report, Verdict
from export.images.size import Size, area, size_of
from export.onnx_file.roles import TEACHER
from export.onnx_file.targets import CPU
from export.runtime.intervals import clopper_pearson
from export.runtime.rows import Speedup

MAX_IMAGES = 10_000_000  # more would be a damaged file, and computing the interval would fill the memory


@dataclass(frozen=True)
class Subject:
    """A report to compare, the deployed file's opset if a bundle has it, and the page to link to."""

    report: Report
    opset: int | None = None
    link: str | None = None


@dataclass(frozen=True)
class Teacher:
    """The teacher's FP32 file, shared by the candidates `of` that have the same source stage."""

    key: str
    arch: str
    params_m: float | None
    macs_m: float | None
    score: float | None
    p50_ms: float | None
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One run by its deployed file; unknown values are None.

    `recommended` is the file that the report recommends, which may be another. `training_seconds` is the time of the training stages
    without the source. `agreement` is with its own float student. `is_efficient` tells whether no other candidate is at least as
    accurate and as fast, and better in one.
    """

    name: str
    link: str | None
    arch: str
    target: str
    file: str | None
    recommended: str | None
    teacher: Teacher
    score: float | None
    score_ci95: tuple[float, float] | None
    images: int | None
    scored_in: str | None
    agreement: float | None
    params_m: float | None
    macs_m: float | None
    size_mb: float | None
    image_size: int | list[int] | None
    p50_ms: float | None
    speedup: Speedup | None
    speedup_vs_student_fp32: Speedup | None
    integer_layers: int | None
    float_layers: int | None
    training_seconds: float
    opset: int | None
    verdict: Verdict
    failures: int
    is_efficient: bool | None = None


class Common(NamedTuple):
    """Conditions under which all runs were timed: batch 1, and one thread on a CPU."""

    provider: str
    image_size: Size
    text: str


def common_conditions(reports: Sequence[Report]) -> Common | None:
    """Return the conditions that all timed runs share: the headline's provider if all have the same, and the largest image."""
    timed = [report for report in reports if _settings(report)]
    if not timed:
        return None
    shared = set.intersection(*(set(_settings(report)) for report in timed))
    providers = {headline_provider(report) for report in timed}
    provider = providers.pop() if len(providers) == 1 else CPU
    sizes = [size for name, size in shared if name == provider]
    if not sizes:
        return None
    size = max(sizes, key=area)
    return Common(provider, size, summary.conditions(_settings(timed[0])[provider, size]))


def candidate(name: str, subject: Subject, conditions: Common | None) -> Candidate:
    """Return a run's numbers, with times under the common conditions or, without them, under its own headline's."""
    report = subject.report
    file, where = deployed_name(report), conditions or common_conditions([report])
    row, timed = any_row(report, file), _timing(report, file, where)
    score = row["score"] if row else first_and_last(report, "score")[1]
    audit = (report["audit"] or {}).get(file or "")
    return Candidate(
        name=name,
        link=subject.link,
        arch=summary.network(report),
        target=target_of(report),
        file=file,
        recommended=report["recommendation"]["file"] if report["recommendation"] else None,
        teacher=_teacher(report, where),
        score=score,
        score_ci95=row.get("score_ci95", _interval(row["score"], row["images"])) if row else None,
        images=row["images"] if row else None,
        scored_in=None if score is None else "ONNX Runtime" if row else "PyTorch",
        agreement=row["agreement"] if row else None,
        params_m=first_and_last(report, "params_m")[1],
        macs_m=first_and_last(report, "macs_m")[1],
        size_mb=row["size_mb"] if row else first_and_last(report, "size_mb")[1],
        image_size=timed["image_size"] if timed else None,
        p50_ms=timed["p50_ms"] if timed else None,
        speedup=timed["speedup"] if timed else None,
        speedup_vs_student_fp32=timed["speedup_vs_student_fp32"] if timed else None,
        integer_layers=len(audit["integer_layers"]) if audit else None,
        float_layers=len(audit["float_layers"]) if audit else None,
        training_seconds=_training_seconds(report),
        opset=subject.opset,
        verdict=report["verdict"],
        failures=len(report["failures"]),
    )


def _settings(report: Report) -> dict[tuple[str, Size], DeployedRow]:
    """Return the deployed file's timings at batch 1, on the CPU with one thread, by provider and image size."""
    found = [row for row in headline_rows(report, deployed_name(report)) if row["p50_ms"] > 0]
    return {(row["provider"], size_of(row["image_size"])): row for row in found}


def _timing(report: Report, name: str | None, where: Common | None) -> DeployedRow | None:
    """Return a file's row under these conditions."""
    wanted = where and where[:2]
    rows = headline_rows(report, name)
    return next((row for row in rows if (row["provider"], size_of(row["image_size"])) == wanted), None)


def _teacher(report: Report, where: Common | None) -> Teacher:
    """Return the teacher's numbers as deployed, or else as its stage measured them; its key is the source stage's."""
    row, timed = any_row(report, TEACHER), _timing(report, TEACHER, where)
    params_m, macs_m, score = (first_and_last(report, metric)[0] for metric in ("params_m", "macs_m", "score"))
    arch = summary.network(report)
    score = row["score"] if row else score
    return Teacher(report["stages"][0]["key"], arch, params_m, macs_m, score, timed["p50_ms"] if timed else None)


def _training_seconds(report: Report) -> float:
    """Return the seconds of the training stages after the source."""
    pairs = list(zip(report["stages"], report["recipe"]["stages"], strict=False))
    return sum(stage["seconds"] for stage, section in pairs[1:] if "fit" in section)


def _interval(score: float, images: int) -> tuple[float, float] | None:
    """Return the exact 95 % interval of a score that was counted on `images` images."""
    right = round(score * images) if 0 < images <= MAX_IMAGES and 0 <= score <= 1 else None
    if right is None or abs(score * images - right) > 0.01:  # a mean over pixels or boxes is not a count of images
        return None
    return clopper_pearson(right, images)
