"""Judge a bundle, or accept it: shared by the command line and the pytest plugin."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from export.errors import BundleError
from export.gate.baseline import Baseline, find_baseline, name_of, read_baseline, require_baseline, write_baseline
from export.gate.checks import Verdict
from export.gate.latency import Plan, opener, record, self_test
from export.gate.predictions import predict_all
from export.gate.run import Terms, gate
from export.gate.subject import BrokenBundleError, Subject, open_subject
from export.onnx_file.roles import FP32, TEACHER
from export.runtime.environment import environment, fingerprint

BASELINES = Path("baselines")


def judge(bundle: Path, baseline: Path | None, terms: Terms, *, against: Path | None = None) -> Verdict:
    """Judge the bundle against a baseline (a file, or a folder of them) or an old bundle; with both, speed is judged against the latter.

    Raises BundleError for any problem that is not the bundle's.
    """
    old = None if against is None else open_old(against, terms.plan, terms.file)
    if baseline is not None:
        was = read_baseline(find_baseline(baseline, fingerprint(environment()), terms.plan.runs_in))
    elif old is not None:
        was = accept(old, replace(terms, limits=replace(terms.limits, max_latency_ratio=None)))
    else:
        raise BundleError("nothing to judge against: give a baseline or an old bundle")
    if old is not None and old.now.files.get(was.served) != was.files[was.served]:
        raise BundleError(
            f"{against}: its {was.served} is not the baseline's: give the bundle that was recorded, or no baseline"
        )
    return gate(bundle, was, terms, old=old)


def open_old(path: Path, plan: Plan, file: str | None) -> Subject:
    """Open the old bundle; if it is broken, that is not the new bundle's verdict."""
    try:
        return open_subject(path, plan.runs_in, file)
    except BrokenBundleError as error:
        raise BundleError(f"{path}: is not a sound bundle to judge against ({error})") from error


def update(
    bundle: Path, baseline: Path, terms: Terms, *, notice: Callable[[str], None] = lambda _: None
) -> tuple[Path, tuple[str, ...]]:
    """Record the bundle as this machine's baseline; return the path, in a folder named by machine and provider, and notes on the images.

    Raises BrokenBundleError for a broken bundle, BundleError for a machine unfit for timing and for data that do not fit.
    """
    limits, plan = terms.limits, terms.plan
    if terms.data is None and limits.min_score_ratio is not None:
        raise BundleError("no images to record predictions on: give --data, or leave accuracy out (--no-accuracy)")
    in_folder = baseline / name_of(fingerprint(environment()), plan.runs_in)
    path = baseline if baseline.suffix == ".json" else in_folder
    require_baseline(path)
    if limits.max_latency_ratio is not None:
        seconds = 4 * plan.looks * plan.seconds  # two files in each look, for the machine's fitness and for the record
        notice(f"timing takes {seconds:.0f} s and an idle machine: on a busy one, leave it out with --no-latency")
    accepted = accept(open_subject(bundle, plan.runs_in, terms.file), terms)
    write_baseline(path, accepted)
    return path, accepted.predictions.notes if accepted.predictions else ()


def reference_of(subject: Subject) -> str | None:
    """Return the float file whose time divides the served file's, or None if the bundle has none."""
    return next((name for name in (FP32, TEACHER) if name in subject.now.files and name != subject.now.served), None)


def accept(subject: Subject, terms: Terms) -> Baseline:
    """Return the bundle as this machine's baseline, with predictions if there are data, and times if latency has a limit.

    Raises BundleError for a machine unfit for timing, and for a bundle without a float file to compare times with.
    """
    data, plan, latency = terms.data, terms.plan, None
    if terms.limits.max_latency_ratio is not None:
        reference = reference_of(subject)
        if reference is None:
            raise BundleError(
                f"{subject.bundle.path}: has no float file to compare times with: record it with --no-latency and judge it "
                "with --against"
            )
        served = opener(subject.served, subject.bundle.preprocess, plan)
        terms.progress("timing the file against itself")
        fit = self_test(served, plan, terms.limits.max_latency_ratio)
        if fit.status != "pass":
            raise BundleError(f"machine: {fit.detail} (--no-latency); no baseline was written")
        terms.progress(f"timing {subject.now.served} beside {reference}")
        other = opener(subject.bundle.files[reference], subject.bundle.preprocess, plan)
        latency = record(served, other, plan, name=reference)
    predictions = None
    if data is not None:
        predictions = predict_all(subject.bundle, subject.now.served, data, terms.own, runs_in=plan.runs_in)
    place = None if data is None else data.resolve().as_posix()
    return replace(subject.now, data=place, predictions=predictions, latency=latency)
