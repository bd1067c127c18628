"""Judge a run against its recipe's targets."""

from typing import NamedTuple

from compress.report.numbers import percent, times
from compress.report.shape import DeployedRow, Report, Speedup, Verdict

TOLERANCE = 1e-9  # a target that is met exactly is met, whatever the last bit says
DEPLOYED_FIRST = ("student_int8", "student_ptq_int8", "student_fp32")
CPU = "CPUExecutionProvider"


class Measurement(NamedTuple):
    """What a target is compared with, and under which conditions it was measured; None where it was not."""

    value: float | None
    conditions: str


def judge(report: Report) -> tuple[Verdict, list[str]]:
    """Return the verdict, and a sentence for each target that is missed or was not measured."""
    measured = measure(report)
    failures = [
        _sentence(target, wanted, measured[target])
        for target, wanted in report["targets"].items()
        if wanted is not None and not is_met(target, wanted, measured[target].value)
    ]
    return ("fail" if failures else "pass"), failures


def is_met(target: str, wanted: float, value: float | None) -> bool:
    """Tell whether a value reaches its target; one that was not measured does not."""
    if value is None:
        return False
    return value >= wanted - TOLERANCE if limit(target) == "at least" else value <= wanted + TOLERANCE


def measure(report: Report) -> dict[str, Measurement]:
    """Return for each target what the run measured."""
    deployed = deployed_name(report)
    teacher, student = _any_row(report, "teacher_fp32"), _any_row(report, deployed)
    timed = headline_row(report, deployed)
    return {
        "max_top1_drop": _top1_drop(teacher, student),
        "min_speedup": _speedup(timed, timed and timed["speedup"]),
        "min_int8_speedup": _speedup(
            timed, timed["speedup_vs_student_fp32"] if timed and timed["precision"] == "int8" else None
        ),
        "max_size_ratio": _size_ratio(teacher, student),
        "max_macs_ratio": _macs_ratio(report),
    }


def deployed_name(report: Report) -> str | None:
    """Return the file that the targets are about: trained INT8, else calibrated INT8, else FP32; None without a bench."""
    names = {row["name"] for row in report["deployed"]}
    return next((name for name in DEPLOYED_FIRST if name in names), None)


def headline_row(report: Report, name: str | None, provider: str = CPU) -> DeployedRow | None:
    """Return a file's row at batch 1 and the largest image size; on the CPU with one thread."""
    rows = [
        row
        for row in report["deployed"]
        if (row["name"], row["provider"], row["batch"]) == (name, provider, 1)
        and (row["threads"] == 1 or provider != CPU)
    ]
    return max(rows, key=lambda row: row["image_size"], default=None)


def first_and_last(report: Report, metric: str) -> tuple[float | None, float | None]:
    """Return a stage metric of the teacher, and of the last stage that measured it."""
    values = [stage["metrics"].get(metric) for stage in report["stages"]]
    measured = [value for value in values if value is not None]
    return (values[0], measured[-1]) if measured else (None, None)


def _any_row(report: Report, name: str | None) -> DeployedRow | None:
    return next((row for row in report["deployed"] if row["name"] == name), None)


def _top1_drop(teacher: DeployedRow | None, student: DeployedRow | None) -> Measurement:
    if not teacher or not student or teacher["top1"] is None or student["top1"] is None:
        return Measurement(None, "top-1 in ONNX Runtime")
    images = "" if student["images"] is None else f", {student['images']:,} images"
    before, after = percent(teacher["top1"]), percent(student["top1"])
    return Measurement(
        teacher["top1"] - student["top1"], f"teacher_fp32 {before}, {student['name']} {after} in ONNX Runtime{images}"
    )


def _speedup(timed: DeployedRow | None, speedup: Speedup | None) -> Measurement:
    if not timed or not speedup:
        return Measurement(None, "CPU, 1 thread, batch 1")
    low, high = speedup["ci95"]
    return Measurement(
        speedup["ratio"],
        f"95 % interval {low:.2f} to {high:.2f}, {timed['name']} against {speedup['vs']}, "
        f"CPU, 1 thread, batch 1, {timed['image_size']} px",
    )


def _size_ratio(teacher: DeployedRow | None, student: DeployedRow | None) -> Measurement:
    if not teacher or not student or not teacher["size_mb"] or student["size_mb"] is None:
        return Measurement(None, "size of the files")
    return Measurement(
        student["size_mb"] / teacher["size_mb"],
        f"{student['name']} {student['size_mb']:.2f} MB, teacher_fp32 {teacher['size_mb']:.2f} MB",
    )


def _macs_ratio(report: Report) -> Measurement:
    """Compare the last stage that counted MACs with the source."""
    before, after = first_and_last(report, "macs_m")
    if not before or after is None:
        return Measurement(None, "multiply-accumulates of one image")
    return Measurement(after / before, f"teacher {before:,.1f} M, student {after:,.1f} M MACs")


def show(target: str, value: float | None) -> str:
    """Return a target's value in its unit: points of top-1, times faster, or a fraction."""
    if value is None:
        return "not measured"
    if target == "max_top1_drop":
        return f"{100 * value:.2f} points".replace("-", "−")
    return times(value) if target.endswith("speedup") else f"{value:.3f}"


def limit(target: str) -> str:
    """Return the direction of a target in words."""
    return "at least" if target.startswith("min_") else "at most"


def _sentence(target: str, wanted: float, measurement: Measurement) -> str:
    measured = show(target, measurement.value)
    verb = "" if measurement.value is None else "measured "
    return f"{target}: wanted {limit(target)} {show(target, wanted)}, {verb}{measured} ({measurement.conditions})"
