"""Judge a run against its recipe's targets."""

from typing import NamedTuple

from compress.quant.rows import faster_in_float
from compress.recipe.stages import MOST_FLOAT
from compress.report.judge.classes import at_chance, worst_first
from compress.report.numbers import percent, significant, times
from compress.report.shape import DeployedRow, Report, Verdict
from export.images.size import area, said
from export.onnx_file.roles import FP32, PTQ, QAT, TEACHER, deployed, is_int8
from export.onnx_file.targets import CPU, TARGET_PROVIDERS, TARGETS, provider_title
from export.proof.audit import in_float
from export.runtime.providers import PLAIN, Arithmetic, Runtime, runtime_named
from export.runtime.rows import Speedup, file_in, is_headline
from export.tasks.task import Classes

METRIC_DROP = "max_metric_drop."  # a metric's name follows
TOLERANCE = 1e-9  # rounding must not fail a target that is met exactly


class Measurement(NamedTuple):
    """A measured value to compare with a target (None if not measured), and its conditions."""

    value: float | None
    conditions: str


def judge(report: Report) -> tuple[Verdict, list[str]]:
    """Return the verdict, and a sentence for each target that is missed or not measured and each limit that is exceeded.

    If there are targets, a teacher or deployed file that predicts at chance fails the run.
    """
    measured = measure(report)
    failures = list(guesses(report).values()) if has_targets(report) else []
    failures += [
        _sentence(target, wanted, measured[target])
        for target, wanted in report["targets"].items()
        if wanted is not None and not is_met(target, wanted, measured[target].value)
    ]
    failures += report["limits"]
    return ("fail" if failures else "pass"), failures


def has_targets(report: Report) -> bool:
    """Tell whether the recipe sets any target."""
    return any(wanted is not None for wanted in report["targets"].values())


def guesses(report: Report) -> dict[str, str]:
    """Return a sentence, by file name, if the teacher or else the deployed file predicts at chance."""
    classes, name = report["classes"], deployed_name(report)
    found = [at_chance(classes, [file]) for file in (TEACHER, name) if file] if classes else []
    return next(filter(None, found), {})


def judged_classes(report: Report) -> tuple[Classes, str] | None:
    """Return the classes and the deployed file's name, in the provider that serves it; None if it was not scored along with the teacher."""
    classes, name, best = report["classes"], deployed_name(report), served_elsewhere(report)
    if classes and best and (there := file_in(best["name"], runs_in(best))) in classes["files"]:
        name = there
    return (classes, name) if classes and name and {TEACHER, name} <= classes["files"].keys() else None


def is_met(target: str, wanted: float, value: float | None) -> bool:
    """Tell whether a value meets its target; one that was not measured does not."""
    if value is None:
        return False
    return value >= wanted - TOLERANCE if limit(target) == "at least" else value <= wanted + TOLERANCE


def measure(report: Report) -> dict[str, Measurement]:
    """Return the run's measurement for each target."""
    name = deployed_name(report)
    best = served_elsewhere(report)
    teacher, student = any_row(report, TEACHER), best or any_row(report, name)
    provider = TARGET_PROVIDERS.get(target_of(report), CPU)
    timed = headline_row(report, name, provider)
    where = "CPU, 1 thread, batch 1" if provider == CPU else f"{provider_title(provider)}, batch 1"
    fast, here = (best, f"{runs_in(best)}, 1 thread, batch 1") if best else (timed, where)
    return {
        "max_drop": _drop(teacher, student),
        "max_class_drop": _class_drop(judged_classes(report)),
        "min_speedup": _speedup(fast, fast and fast["speedup"], here),
        "min_int8_speedup": _speedup(
            timed, timed["speedup_vs_student_fp32"] if timed and timed["precision"] == "int8" else None, where
        ),
        "max_size_ratio": _size_ratio(teacher, student),
        "max_macs_ratio": _macs_ratio(report),
        "max_latency_ms": Measurement(fast and fast["p50_ms"], here),
    } | {
        target: _metric_drop(target.removeprefix(METRIC_DROP), teacher, student)
        for target in report["targets"]
        if target.startswith(METRIC_DROP)
    }


def target_of(report: Report) -> str:
    """Return the recipe's target; auto means the machine of the run."""
    target: str = report["recipe"]["target"]
    return report["environment"]["target"] if target == "auto" else target


def deployed_name(report: Report) -> str | None:
    """Return the file that the targets judge: the recommended INT8 file, else the one made for the target; None if not timed."""
    names = {row["name"] for row in report["deployed"]}
    served = report["recommendation"] and report["recommendation"]["file"]
    if served in (QAT, PTQ):
        return served
    return deployed(names, TARGETS[target_of(report)]) if FP32 in names else None


def audited_name(report: Report) -> str | None:
    """Return the file that the export stage's limits judge: the deployed one, or without a bench the one to be deployed."""
    audits = report["audit"]
    return deployed_name(report) or (deployed(audits, TARGETS[target_of(report)]) if audits else None)


def mostly_float(report: Report, name: str | None) -> str | None:
    """Return how many layers of an INT8 file are float, if they do more than MOST_FLOAT of its work, else None."""
    found = (report["audit"] or {}).get(name or "")
    if (
        found is None
        or not is_int8(name or "")
        or target_of(report) in TARGET_PROVIDERS
        or in_float(found) <= MOST_FLOAT
        or is_mixed(report)
    ):
        return None
    layers = len(found["float_layers"])
    return f"{layers} of {layers + len(found['integer_layers'])} layers in float"


def is_mixed(report: Report) -> bool:
    """Tell whether the target's INT8 files have layers in float because they are faster so."""
    found = report["ptq"]["targets"].get(target_of(report)) if report["ptq"] else None
    return found is not None and bool(faster_in_float(found))


def headline_provider(report: Report) -> str:
    """Return the provider of the headline's times: the target's, or the CPU if that was not timed."""
    wanted = TARGET_PROVIDERS.get(target_of(report), CPU)
    return wanted if any(row["provider"] == wanted for row in report["deployed"]) else CPU


def served_elsewhere(report: Report) -> DeployedRow | None:
    """Return the headline row of the file that another provider of this machine serves faster, if the recommendation names one."""
    best = report["recommendation"] and report["recommendation"].get("best")
    return headline_row(report, best["file"], best["provider"], best["arithmetic"]) if best else None


def runs_in(row: DeployedRow) -> Runtime:
    """Return the provider and the arithmetic that a row was timed in."""
    return runtime_named(row["provider"], row.get("arithmetic", "f32"))


def headline_rows(report: Report, name: str | None, arithmetic: Arithmetic = "f32") -> list[DeployedRow]:
    """Return a file's rows under the headline's conditions, at all providers and image sizes."""
    rows = (row for row in report["deployed"] if (row["name"], row.get("arithmetic", "f32")) == (name, arithmetic))
    return [row for row in rows if is_headline(row["provider"], row["threads"], row["batch"])]


def headline_row(
    report: Report, name: str | None, provider: str = CPU, arithmetic: Arithmetic = "f32"
) -> DeployedRow | None:
    """Return a file's row under the headline's conditions at the largest image size."""
    rows = [row for row in headline_rows(report, name, arithmetic) if row["provider"] == provider]
    return max(rows, key=lambda row: area(row["image_size"]), default=None)


def first_and_last(report: Report, metric: str) -> tuple[float | None, float | None]:
    """Return a stage metric of the first stage, and of the last stage that measured it."""
    values = [stage["metrics"].get(metric) for stage in report["stages"]]
    measured = [value for value in values if value is not None]
    return (values[0], measured[-1]) if measured else (None, None)


def any_row(report: Report, name: str | None) -> DeployedRow | None:
    """Return any row of a file, of the CPU provider if it was timed there; its size and accuracy are the same in all of these."""
    rows = [row for row in report["deployed"] if row["name"] == name]
    return min(rows, key=lambda row: runs_in(row) != PLAIN, default=None)


def _drop(teacher: DeployedRow | None, student: DeployedRow | None) -> Measurement:
    if not teacher or not student:
        return Measurement(None, "score in ONNX Runtime")
    scores = f"{TEACHER} {percent(teacher['score'])}, {student['name']} {percent(student['score'])}"
    return Measurement(teacher["score"] - student["score"], f"{scores} in ONNX Runtime, {student['images']:,} images")


def _metric_drop(name: str, teacher: DeployedRow | None, student: DeployedRow | None) -> Measurement:
    before, after = (row and (row["further"] | row.get("measures", {})).get(name) for row in (teacher, student))
    if before is None or after is None or student is None:
        return Measurement(None, f"{name} in ONNX Runtime")
    values = f"{TEACHER} {significant(before, digits=4)}, {student['name']} {significant(after, digits=4)}"
    return Measurement(before - after, f"{values}, {student['images']:,} images")


def _class_drop(judged: tuple[Classes, str] | None) -> Measurement:
    if judged is None:
        return Measurement(None, "recall of each class in ONNX Runtime")
    classes, name = judged
    worst = worst_first(classes, name)[0]
    before, after = percent(worst.teacher / worst.images), percent(worst.student / worst.images)
    return Measurement(
        worst.drop,
        f'class "{worst.name}": teacher_fp32 {before}, {name} {after} of {worst.images:,} {classes.get("counted", "images")}',
    )


def _speedup(timed: DeployedRow | None, speedup: Speedup | None, where: str) -> Measurement:
    if not timed or not speedup:
        return Measurement(None, where)
    low, high = speedup["ci95"]
    return Measurement(
        speedup["ratio"],
        f"95 % interval {low:.2f} to {high:.2f}, {timed['name']} against {speedup['vs']}, "
        f"{where}, {said(timed['image_size'])} px",
    )


def _size_ratio(teacher: DeployedRow | None, student: DeployedRow | None) -> Measurement:
    if not teacher or not student or not teacher["size_mb"]:
        return Measurement(None, "size of the files")
    sizes = f"{student['name']} {student['size_mb']:.2f} MB, {TEACHER} {teacher['size_mb']:.2f} MB"
    return Measurement(student["size_mb"] / teacher["size_mb"], sizes)


def _macs_ratio(report: Report) -> Measurement:
    """Return the MACs of the last stage that counted them over the source's."""
    before, after = first_and_last(report, "macs_m")
    if not before or after is None:
        return Measurement(None, "multiply-accumulates of one image")
    return Measurement(after / before, f"teacher {before:,.1f} M, student {after:,.1f} M MACs")


def show(target: str, value: float | None) -> str:
    """Return a target's value in its unit: points, times faster, milliseconds, or a fraction."""
    if value is None:
        return "not measured"
    if target.startswith(METRIC_DROP):
        return significant(value, digits=3).replace("-", "−")
    if target.endswith("_drop"):
        return f"{100 * value:.2f} points".replace("-", "−")
    if target.endswith("_ms"):
        return significant(value, "ms")
    return times(value) if target.endswith("speedup") else f"{value:.3f}"


def limit(target: str) -> str:
    """Return the direction of a target in words."""
    return "at least" if target.startswith("min_") else "at most"


def _sentence(target: str, wanted: float, measurement: Measurement) -> str:
    measured = show(target, measurement.value)
    verb = "" if measurement.value is None else "measured "
    return f"{target}: wanted {limit(target)} {show(target, wanted)}, {verb}{measured} ({measurement.conditions})"
