"""Judge a bundle against its baseline: first the checks that never flake, then accuracy, then speed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.gate.accuracy import accuracy_checks
from export.gate.baseline import Baseline, check_own, runtime_of
from export.gate.checks import Check, Limits, Measured, Verdict
from export.gate.facts import same_work
from export.gate.hard import hard_checks
from export.gate.latency import NEW, OTHER, Plan, compare, judge, opener, self_test
from export.gate.predictions import predict_all
from export.gate.subject import BrokenBundleError, Subject, open_subject
from export.runtime.environment import environment, fingerprint
from export.runtime.latency import Timing, median_ratio
from export.runtime.own import OwnMetric

Environment = dict[str, Any]


@dataclass(frozen=True)
class Terms:
    """On what a bundle is judged; `data` are labelled images, by default those that the baseline names."""

    data: Path | None
    limits: Limits
    plan: Plan
    own: OwnMetric | None = None
    file: str | None = None  # by default the one that the bundle serves
    progress: Callable[[str], None] = lambda _: None


def gate(path: Path, was: Baseline, terms: Terms, *, old: Subject | None = None) -> Verdict:
    """Judge the bundle in `path` against `was`, and its speed against the bundle `old` if given.

    A broken bundle gets a verdict; BundleError is raised for any other problem.
    """
    limits, plan = terms.limits, terms.plan
    try:
        terms.progress("reading the bundle")
        subject = open_subject(path, plan.runs_in, terms.file)
    except BrokenBundleError as error:
        return Verdict(str(path), (Check("bundle", "broken", detail=str(error)),), environment=environment())
    check_own(was, subject.now)
    here = subject.now.environment
    is_here = was.fingerprint == fingerprint(here)
    same_graph = is_here and was.runtime == runtime_of(here)
    checks = [*subject.checks, *hard_checks(was, subject.now, limits, same_graph=same_graph)]
    metrics, notes = size_metrics(subject), [] if is_here else [machine_note(was, here)]
    if was.served in subject.bundle.files:
        if limits.min_score_ratio is not None:
            terms.progress("scoring images")
            found, said, measured = judge_accuracy(subject, was, terms.data, limits.min_score_ratio, terms.own)
            checks, notes, metrics = [*checks, *found], [*notes, *said], [*metrics, *measured]
        if limits.max_latency_ratio is not None:
            terms.progress("timing")
            why = faster_because(was, subject, here, same_graph=same_graph, old=old)
            if old is not None:
                found, measured = judge_beside(subject, old, was.served, limits.max_latency_ratio, plan, why)
            else:
                found, measured = judge_ratio(subject, was, limits.max_latency_ratio, plan, why, same_graph=same_graph)
            checks, metrics = [*checks, *found], [*metrics, *measured]
    return Verdict(f"{subject.bundle.name}, {was.served}", tuple(checks), tuple(metrics), tuple(notes), here)


def judge_accuracy(
    subject: Subject, was: Baseline, data: Path | None, limit: float, own: OwnMetric | None
) -> tuple[list[Check], list[str], list[Measured]]:
    """Score the images and compare; return checks, notes and metrics."""
    place = data or (Path(was.data) if was.data else None)
    if was.predictions is None or place is None or (data is None and not place.exists()):
        reason = (
            "the baseline has no predictions" if was.predictions is None else f"its images are not here ({was.data})"
        )
        title = subject.bundle.task.metric.title
        return [Check(title, "inconclusive", detail=f"{reason}: give --data, or leave accuracy out")], [], []
    predictions = predict_all(subject.bundle, was.served, place, own, runs_in=was.runs_in)
    same_file = was.files[was.served].sha256 == subject.now.files[was.served].sha256
    checks, notes = accuracy_checks(was.predictions, predictions, limit, same_file=same_file)
    return (
        checks,
        [*predictions.notes, *notes],
        [Measured(f"{predictions.task.metric.title} error", "%", 100 * (1 - predictions.score))],
    )


def judge_beside(
    subject: Subject, old: Subject, served: str, limit: float, plan: Plan, why: str | None
) -> tuple[list[Check], list[Measured]]:
    """Time the new file and the old one interleaved."""
    new = opener(subject.bundle.files[served], subject.bundle.preprocess, plan)
    fit = self_test(new, plan, limit)
    if fit.status != "pass":
        return [fit], []
    found, timed = compare(new, opener(old.bundle.files[served], old.bundle.preprocess, plan), plan, limit)
    was, now = (f"{timed[name].percentile(50):.3f} ms" for name in (OTHER, NEW))
    return [fit, judge(found, limit, was=was, now=now, explained=why)], [latency_metric(timed[NEW])]


def judge_ratio(
    subject: Subject, was: Baseline, limit: float, plan: Plan, why: str | None, *, same_graph: bool
) -> tuple[list[Check], list[Measured]]:
    """Time the file and its float file, and compare their ratio with the baseline's; times of different days are not comparable."""

    def unjudged(detail: str) -> tuple[list[Check], list[Measured]]:
        return [Check("latency", "inconclusive", detail=detail)], []

    then = was.latency
    if then is None:
        return unjudged("the baseline has no times: give --against, or leave latency out")
    if then.reference not in subject.now.files or not same_work(
        was.files[then.reference], subject.now.files[then.reference], operators=same_graph
    ):
        return unjudged(
            f"{then.reference}, the reference for times, does other work than the baseline's: give --against OLD_BUNDLE"
        )
    plan = replace(plan, threads=then.threads, batch=then.batch)
    new, float_file = (
        opener(subject.bundle.files[name], subject.bundle.preprocess, plan) for name in (was.served, then.reference)
    )
    earlier = median_ratio(np.array(then.ratios), confidence=plan.confidence)
    if np.isinf(earlier.high):
        return unjudged(
            f"the baseline's {len(then.ratios)} ratios are too few for looks = {plan.looks}: lower it, or record again with --update-baseline"
        )
    fit = self_test(new, plan, limit)
    if fit.status != "pass":
        return [fit], []
    found, timed = compare(new, float_file, plan, limit, then=earlier)
    ratio = found.ratio * earlier.ratio
    shown = f"{earlier.ratio:.3f} of {then.reference}", f"{ratio:.3f}"
    metrics = [latency_metric(timed[NEW]), Measured(f"latency over {then.reference}", "ratio", ratio)]
    return [fit, judge(found, limit, was=shown[0], now=shown[1], explained=why)], metrics


def faster_because(
    was: Baseline, subject: Subject, here: Environment, *, same_graph: bool, old: Subject | None
) -> str | None:
    """Return a possible reason why the served file is faster than before, or None."""
    before, now = was.files[was.served], subject.now.files[was.served]
    if not same_work(before, now, operators=same_graph):
        return "the file does other work"
    if old is not None or same_graph:
        return None
    return f"this is another machine, or ONNX Runtime {runtime_of(here)} after {was.runtime}"


def machine_note(was: Baseline, here: Environment) -> str:
    """Return a note that the baseline is from another machine."""
    return (
        f"the baseline is from another machine ({was.environment['cpu']}; here {here['cpu']}): only the ratio to the float file is "
        "compared; record one here with --update-baseline"
    )


def size_metrics(subject: Subject) -> list[Measured]:
    """Return the served file's size and MACs."""
    facts = subject.now.files[subject.now.served]
    work = [] if facts.macs is None else [Measured("multiply-accumulates", "M", facts.macs / 1e6)]
    return [Measured("size", "MB", facts.bytes / 1e6), *work]


def latency_metric(timing: Timing) -> Measured:
    """Return the median of all runs, with the spread of the blocks' medians."""
    low, high = np.percentile(timing.block_ms, [5, 95])
    return Measured("latency", "ms", timing.percentile(50), f"± {(high - low) / 2:.3f}")
