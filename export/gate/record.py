"""Accept a bundle: write down what it is, what it answers and how fast it is on this machine."""

from collections.abc import Callable
from pathlib import Path

from export.errors import BundleError
from export.gate.answers import ask
from export.gate.baseline import Baseline
from export.gate.checks import Limits
from export.gate.latency import Plan, opener, record, self_test
from export.gate.subject import Subject
from export.runtime.environment import environment
from export.runtime.rows import STUDENT, TEACHER


def reference_of(subject: Subject) -> str | None:
    """Return the float file that the served file's time is divided by, None where there is none beside it."""
    names = [name for name in (STUDENT, TEACHER) if name in subject.bundle.files and name != subject.now.served]
    return names[0] if names else None


def accept(
    subject: Subject, data: Path | None, limits: Limits, plan: Plan, progress: Callable[[str], None] = lambda _: None
) -> Baseline:
    """Return the bundle as the baseline of this machine; without `data`, or a limit on latency, without answers or times.

    Raises BundleError for a machine that is unfit for timing, and for a bundle without a float file to divide times by.
    """
    latency = None
    if limits.max_latency_ratio is not None:
        reference = reference_of(subject)
        if reference is None:
            raise BundleError(
                f"{subject.bundle.path}: holds no float file to divide times by: record it with --no-latency and judge it "
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
        answers=None if data is None else ask(subject.bundle, subject.now.served, data),
        latency=latency,
    )
