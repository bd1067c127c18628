"""Recommend a file to serve on the target, and why, from measurements alone; if the target was not measured, say so."""

from collections.abc import Mapping
from typing import NamedTuple

from compress.recipe.stages import MAX_DROP
from compress.report.judge.classes import at_chance, worst_first
from compress.report.judge.verdict import TOLERANCE, deployed_name, headline_row, mostly_float, runs_in, target_of
from compress.report.numbers import loss, times
from compress.report.shape import Best, DeployedRow, Recommendation, Report
from export.onnx_file.roles import FP16, FP32, PTQ, QAT, SERVED, TEACHER
from export.onnx_file.targets import CPU, TARGET_PROVIDERS, TARGETS
from export.runtime.providers import PLAIN
from export.runtime.rows import Speedup, file_in

ENGINES = {"onnxruntime": "ONNX Runtime", "neural-compressor": "neural-compressor", "compress": "this pipeline"}
SLOW_INT8 = (
    "in small networks and depthwise layers quantizing and dequantizing costs more than the integer kernels save"
)


class Bar(NamedTuple):
    """How much a file may lose: the reference's score, its name in words, the largest drop allowed, and whether that is a target.

    `unfit` are files ruled out by their scores in single classes, with the reason.
    """

    score: float | None
    reference: str
    max_drop: float
    is_target: bool
    note: str
    unfit: Mapping[str, str]


def recommend(report: Report) -> Recommendation | None:
    """Return the file to serve on the recipe's target and a sentence why; None if no student was timed.

    Speed is the headline's: one thread on a CPU, batch 1, the largest image.
    """
    name = deployed_name(report)
    if name is None:
        return None
    target = target_of(report)
    provider = TARGET_PROVIDERS.get(target, CPU)
    if not _is_measured_on(report, target, provider):
        return Recommendation(file=None, sentence=_elsewhere(report, name, target))
    rows = {file: headline_row(report, file, provider) for file in (TEACHER, FP32, FP16, PTQ, QAT)}
    if rows[FP32] is None:
        where = "CPU with one thread at batch 1" if provider == CPU else "batch 1"
        return Recommendation(file=None, sentence=f"No file is recommended: {FP32} was not timed on {where}.")
    classes = report["classes"]
    if classes and at_chance(classes, [TEACHER]):
        return Recommendation(file=None, sentence=f"No file is recommended: {TEACHER} predicts at chance.")
    bar = _bar(report, rows)
    file, reason = _choose(rows, bar, on_gpu=TARGETS[target].precision == "fp16")
    if file in bar.unfit:  # the fallback, where no other file serves
        return Recommendation(file=None, sentence=f"No file is recommended: {bar.unfit[file]}.")
    said = "".join(f"; {part}" for part in (_maker(report, file), mostly_float(report, file)) if part)
    found = Recommendation(file=file, sentence=f"Serve {file} on {target}: {reason}{said}.")
    best, more = _elsewhere_faster(report, rows[file], bar) if provider == CPU else (None, "")
    if best:
        place = runs_in(best)
        found["best"] = Best(file=best["name"], provider=place.provider.name, arithmetic=place.arithmetic)
    found["sentence"] += more
    return found


def _elsewhere_faster(report: Report, own: DeployedRow | None, bar: Bar) -> tuple[DeployedRow | None, str]:
    """Return the fastest file of the CPU's other providers if it is beyond doubt faster than `own` and accurate enough, and a sentence."""
    timed = [
        row
        for row in report["deployed"]
        if runs_in(row) != PLAIN and runs_in(row).provider.device == "cpu" and row["name"] in SERVED
    ]
    timed = [row for row in timed if row == headline_row(report, row["name"], row["provider"], runs_in(row).arithmetic)]
    if not timed or own is None:
        return None, ""
    good = [row for row in timed if not _accuracy_problem(row, bar) and _is_faster(row, own)]
    if not good:
        tried = ", ".join(dict.fromkeys(str(runs_in(row)) for row in timed))
        return None, f" No file is beyond doubt faster, and accurate enough, in {tried}."
    best = max(good, key=_speed)
    place, pays = runs_in(best), ""
    own_int8 = [row for name in (PTQ, QAT) if (row := headline_row(report, name))]
    int8 = max((row for row in [*own_int8, *timed] if row["precision"] == "int8"), key=_speed, default=best)
    if best["precision"] != "int8" and _speed(int8):
        faster = times(_speed(best) / _speed(int8))
        pays = f"; INT8 does not pay here: that is {faster} as fast as {int8['name']} in {runs_in(int8)}"
    return best, (
        f" The best on this machine is {best['name']} in {place}: {_praise(best, bar)} in the CPU provider{pays} "
        f"(pip install {place.provider.package})."
    )


def _speed(row: DeployedRow) -> float:
    """Return a row's speed-up over the float student in the CPU provider, 0 if it was not timed beside it."""
    found = row["speedup_vs_student_fp32"]
    return found["ratio"] if found else 0.0


def _choose(rows: dict[str, DeployedRow | None], bar: Bar, *, on_gpu: bool) -> tuple[str, str]:
    """Return the file and the reason: the fastest precision with a certain speed-up and enough accuracy."""
    fp16 = rows[FP16]
    fp16_problem = _problem(fp16, bar, on_gpu=on_gpu) if fp16 else None
    fp16_serves = fp16 is not None and fp16_problem is None
    if on_gpu:
        if fp16 and fp16_serves:
            return FP16, f"{_praise(fp16, bar)}; ONNX Runtime's CUDA provider has no INT8 convolution{bar.note}"
        return FP32, f"{fp16_problem or f'{FP16} was not measured'}{bar.note}"
    int8 = [row for row in (rows[QAT], rows[PTQ]) if row]
    problems = {row["name"]: _problem(row, bar) or _no_faster(row, fp16 if fp16_serves else None) for row in int8}
    good = [row for row in int8 if not problems[row["name"]]]
    if good:
        fastest = [row for row in good if not any(_is_faster(other, row) for other in good)]
        best = max(fastest, key=lambda row: row["score"] or 0.0)  # of equal ones the first, the trained file
        passed_over = problems[int8[0]["name"]]
        return best["name"], f"{_praise(best, bar)}{f'; {passed_over}' if passed_over else ''}{bar.note}"
    why = next((str(problem) for problem in problems.values()), "no INT8 file was made")
    if fp16 and fp16_serves:
        return FP16, f"{_praise(fp16, bar)}; {why}{bar.note}"
    return FP32, f"{why}{f'; {fp16_problem}' if fp16_problem else ''}{bar.note}"


def _bar(report: Report, rows: dict[str, DeployedRow | None]) -> Bar:
    """Return how much a file may lose against the teacher, or against the float student if even that loses more."""
    wanted = report["targets"]["max_drop"]
    max_drop = MAX_DROP if wanted is None else wanted
    teacher, student = (row["score"] if row else None for row in (rows[TEACHER], rows[FP32]))
    score, reference, note = teacher, "the teacher", ""
    if teacher is None:
        score, reference = student, "the float student"
    elif student is not None and teacher - student > max_drop + TOLERANCE:
        score, reference = student, "the float student"
        lost = f"the student in FP32 loses {loss(teacher - student)}"
        note = f"; no precision brings it within {loss(max_drop)} of the teacher, {lost}"
    return Bar(score, reference, max_drop, wanted is not None, note, _unfit(report))


def _unfit(report: Report) -> dict[str, str]:
    """Return the files not to serve whatever their score: they guess, or lose more of a class than targets.max_class_drop."""
    classes, wanted = report["classes"], report["targets"]["max_class_drop"]
    if not classes:
        return {}
    found = {}
    if wanted is not None and TEACHER in classes["files"]:
        for name in classes["files"]:
            worst = worst_first(classes, name)[0]
            if worst.drop > wanted + TOLERANCE:
                lost = f'{loss(worst.drop)} of recall on class "{worst.name}"'
                found[name] = f"{name} loses {lost}, {loss(wanted)} are allowed"
    return found | {name: f"{name} predicts at chance" for name in at_chance(classes, classes["files"])}


def _problem(row: DeployedRow, bar: Bar, *, on_gpu: bool = False) -> str | None:
    """Return what speaks against a file: its accuracy, or a speed-up over FP32 that is not certain.

    On a GPU half the memory at equal speed is reason enough to serve FP16: only a certain loss of speed speaks against it.
    """
    speed, name = row["speedup_vs_student_fp32"], row["name"]
    if problem := _accuracy_problem(row, bar):
        return problem
    if speed is None:
        return None if on_gpu else f"{name} was not timed beside {FP32}"
    if (speed["ci95"][1] >= 1) if on_gpu else (speed["ci95"][0] > 1):
        return None
    why = f": {SLOW_INT8}" if row["precision"] == "int8" else ""
    return f"{row['precision'].upper()} is {_interval(speed)} of FP32 here{why}"


def _accuracy_problem(row: DeployedRow, bar: Bar) -> str | None:
    if row["score"] is None or bar.score is None:
        return f"the accuracy of {row['name']} was not measured"
    if problem := bar.unfit.get(file_in(row["name"], runs_in(row))):
        return problem
    drop = bar.score - row["score"]
    if drop <= bar.max_drop + TOLERANCE:
        return None
    return f"{row['name']} loses {loss(drop)} against {bar.reference}, {loss(bar.max_drop)} are allowed"


def _no_faster(row: DeployedRow, fp16: DeployedRow | None) -> str | None:
    """Return a sentence if INT8 is not certainly faster than an FP16 file that serves."""
    own, other = row["speedup_vs_student_fp32"], fp16 and fp16["speedup_vs_student_fp32"]
    if not own or not other or fp16 is None or _is_faster(row, fp16):
        return None
    return f"INT8 ({_interval(own)} of FP32) is not beyond doubt faster than FP16 ({_interval(other)})"


def _is_faster(row: DeployedRow, other: DeployedRow) -> bool:
    """Tell whether the intervals of two files' speed-ups over FP32 are disjoint, and the first is faster."""
    own, others = row["speedup_vs_student_fp32"], other["speedup_vs_student_fp32"]
    return bool(own and others and own["ci95"][0] > others["ci95"][1])


def _maker(report: Report, file: str) -> str | None:
    """Return whose quantizer made the calibrated file, None if this project's."""
    found = report["ptq"]["targets"].get(target_of(report)) if file == PTQ and report["ptq"] else None
    engine = found["trials"][found.get("kept", found["chosen"])].get("engine", "compress") if found else "compress"
    return None if engine == "compress" else f"made by {ENGINES[engine]}'s quantizer"


def _praise(row: DeployedRow, bar: Bar) -> str:
    speed = row["speedup_vs_student_fp32"]
    fast = f"{_interval(speed)} as fast as the same student in FP32" if speed else "half the size of FP32"
    assert row["score"] is not None
    assert bar.score is not None
    drop = bar.score - row["score"]
    lost = f"loses {loss(drop)} against" if drop > 0 else "loses nothing against"
    allowed = f" ({loss(bar.max_drop)} allowed)" if bar.is_target else ""
    return f"{fast}, and {lost} {bar.reference}{allowed}"


def _elsewhere(report: Report, name: str, target: str) -> str:
    """Return the sentence for times that were not measured on the target."""
    host = report["environment"]["target"]
    here = "no such provider was timed here" if target in TARGET_PROVIDERS else f"this machine is {host}"
    row, student = headline_row(report, name), headline_row(report, FP32)
    speed = row and row["speedup_vs_student_fp32"]
    known = f" Here {name} is {_interval(speed)} of FP32 on the CPU." if speed and row != student else ""
    return (
        f"No file is recommended yet: speed was not measured on the target {target} ({here}). The file made for it is {name}.{known} "
        "Time the bundle there: python -m export.bench BUNDLE."
    )


def _is_measured_on(report: Report, target: str, provider: str) -> bool:
    if provider == CPU and target != report["environment"]["target"]:
        return False
    return any(row["provider"] == provider for row in report["deployed"])


def _interval(speed: Speedup) -> str:
    """Return 1.94× [1.88, 2.00]."""
    low, high = speed["ci95"]
    return f"{times(speed['ratio'])} [{low:.2f}, {high:.2f}]"
