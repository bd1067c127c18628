"""One run in a comparison: its deployed file's numbers, from the report or a bundle's manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from compress.report.comparison.read import FinishedRun
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
class ComparedTeacher:
    """The teacher's FP32 file, shared by the candidates `of` that have the same source stage, whose key is `key`."""

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
    teacher: ComparedTeacher
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
    timed = [
        (headline_provider(report), rows) for report in reports if (rows := _timings(report, deployed_name(report)))
    ]
    providers = {own for own, _ in timed}
    provider = providers.pop() if len(providers) == 1 else CPU
    shared = set.intersection(*(set(rows) for _, rows in timed)) if timed else set()
    size = max((size for name, size in shared if name == provider), key=area, default=None)
    return None if size is None else Common(provider, size, summary.conditions(timed[0][1][provider, size]))


def candidate(name: str, run: FinishedRun, conditions: Common | None) -> Candidate:
    """Return a run's numbers, with times under the common conditions or, without them, under its own headline's."""
    report = run.report
    where, file, arch = conditions or common_conditions([report]), deployed_name(report), summary.network(report)
    row, taught = any_row(report, file), any_row(report, TEACHER)
    timed, timed_teacher = (
        _timings(report, one).get((where.provider, where.image_size)) if where else None for one in (file, TEACHER)
    )
    stages = {metric: first_and_last(report, metric) for metric in ("score", "params_m", "macs_m", "size_mb")}
    audit = (report["audit"] or {}).get(file or "")
    pairs = list(zip(report["stages"], report["recipe"]["stages"], strict=False))
    return Candidate(
        name=name,
        link=run.link,
        arch=arch,
        target=target_of(report),
        file=file,
        recommended=report["recommendation"]["file"] if report["recommendation"] else None,
        teacher=ComparedTeacher(
            key=report["stages"][0]["key"],
            arch=arch,
            params_m=stages["params_m"][0],
            macs_m=stages["macs_m"][0],
            score=taught["score"] if taught else stages["score"][0],
            p50_ms=timed_teacher["p50_ms"] if timed_teacher else None,
        ),
        score=row["score"] if row else stages["score"][1],
        score_ci95=row.get("score_ci95", _interval(row["score"], row["images"])) if row else None,
        images=row["images"] if row else None,
        scored_in="ONNX Runtime" if row else "PyTorch" if stages["score"][1] is not None else None,
        agreement=row["agreement"] if row else None,
        params_m=stages["params_m"][1],
        macs_m=stages["macs_m"][1],
        size_mb=row["size_mb"] if row else stages["size_mb"][1],
        image_size=timed["image_size"] if timed else None,
        p50_ms=timed["p50_ms"] if timed else None,
        speedup=timed["speedup"] if timed else None,
        speedup_vs_student_fp32=timed["speedup_vs_student_fp32"] if timed else None,
        integer_layers=len(audit["integer_layers"]) if audit else None,
        float_layers=len(audit["float_layers"]) if audit else None,
        training_seconds=sum(stage["seconds"] for stage, section in pairs[1:] if "fit" in section),
        opset=run.opset,
        verdict=report["verdict"],
        failures=len(report["failures"]),
    )


def _timings(report: Report, name: str | None) -> dict[tuple[str, Size], DeployedRow]:
    """Return a file's timings at batch 1, on the CPU with one thread, by provider and image size."""
    rows = headline_rows(report, name)
    return {(row["provider"], size_of(row["image_size"])): row for row in rows if row["p50_ms"] > 0}


def _interval(score: float, images: int) -> tuple[float, float] | None:
    """Return the exact 95 % interval of a score that was counted on `images` images."""
    right = round(score * images) if 0 < images <= MAX_IMAGES and 0 <= score <= 1 else None
    if right is None or abs(score * images - right) > 0.01:  # a mean over pixels or boxes is not a count of images
        return None
    return clopper_pearson(right, images)
