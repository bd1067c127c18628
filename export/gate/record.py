"""Accept a bundle: record its facts, its predictions and its speed on this machine."""

from collections.abc import Callable
from pathlib import Path

from export.errors import BundleError
from export.gate.baseline import Baseline
from export.gate.checks import Limits
from export.gate.latency import Plan, opener, record, self_test
from export.gate.predictions import predict_all
from export.gate.subject import Subject
from export.onnx_file.roles import FP32, TEACHER
from export.runtime.environment import environment


def reference_of(subject: Subject) -> str | None:
    """Return the float file whose time divides the served file's, or None if the bundle has none."""
    names = [name for name in (FP32, TEACHER) if name in subject.bundle.files and name != subject.now.served]
    return names[0] if names else None


def accept(
    subject: Subject, data: Path | None, limits: Limits, plan: Plan, progress: Callable[[str], None] = lambda _: None
) -> Baseline:
    """Return the bundle as this machine's baseline, with predictions if there are `data`, and times if latency has a limit.

    Raises BundleError for a machine unfit for timing, and for a bundle without a float file to compare times with.
    """
    latency = None
    if limits.max_latency_ratio is not None:
        reference = reference_of(subject)
        if reference is None:
            raise BundleError(
                f"{subject.bundle.path}: has no float file to compare times with: record it with --no-latency and judge it "
                "with --against"
            )
        served = opener(subject.served, subject.bundle.preprocess, plan)
        progress("timing the file against itself")
        fit = self_test(served, plan, limits.max_latency_ratio)
        if fit.status != "pass":
            raise BundleError(f"machine: {fit.detail}; no baseline was written")
        progress(f"timing {subject.now.served} beside {reference}")
        other = opener(subject.bundle.files[reference], subject.bundle.preprocess, plan)
        latency = record(served, other, plan, name=reference)
    return Baseline(
        bundle=subject.bundle.name,
        task=subject.bundle.task.name,
        served=subject.now.served,
        classes=subject.now.classes,
        preprocess=dict(subject.now.preprocess),
        files=dict(subject.now.files),
        environment=environment(),
        data=None if data is None else data.resolve().as_posix(),
        predictions=None if data is None else predict_all(subject.bundle, subject.now.served, data),
        latency=latency,
    )
