"""Sentences on what recovery without training, and quantization-aware training, gained on the same images."""

from compress.report.judge.verdict import any_row, headline_provider, headline_row, target_of
from compress.report.numbers import duration, loss, percent, points, significant, times
from compress.report.shape import DeployedRow, Json, Report
from export.onnx_file.roles import FP32, PTQ, QAT, TEACHER
from export.runtime.rows import Speedup
from export.tasks import TASKS
from export.tasks.paired import mcnemar

SIGNIFICANT = 0.05
NEAR = 0.97  # fraction of the wanted time from which on it counts as met
DISTILLED = 0.25  # fraction of what a solve leaves lost that 4 epochs of distillation gave back: 0.7 of 2.5 points (docs/pruning.md)


def sentences(report: Report, digits: int) -> list[str]:
    """Return the sentences on gains, in the order of the stages."""
    found = (
        within_time(report),
        recovered(report, digits),
        without_training(report),
        training_gain(report, digits),
        skipped(report),
        left_in_float(report),
    )
    return [sentence for sentence in found if sentence]


def within_time(report: Report) -> str | None:
    """Return predicted and measured latency after pruning and the table's cost, if the prune stage had a latency goal."""
    metrics = stage_metrics(report, "prune") or {}
    names = ("latency_before_ms", "latency_predicted_ms", "latency_ms", "latency_table_s")
    before, predicted, after, table_s = (metrics.get(name) for name in names)
    if before is None or predicted is None or after is None or table_s is None:
        return None
    section = stage_section(report, "prune") or {}
    wanted = section.get("max_latency_ms") or (section.get("keep_latency") or 0.0) * before
    missed = ""
    if after < NEAR * wanted:
        missed = f" It is {percent(after / wanted, 1)} of the wanted {significant(wanted, 'ms')}: no choice of widths came nearer."
    return (
        f"Latency: {significant(before, 'ms')} before the cut, {significant(predicted, 'ms')} predicted, "
        f"{significant(after, 'ms')} measured after it; the table of layer times took {duration(table_s)}.{missed}"
    )


def recovered(report: Report, digits: int) -> str | None:
    """Return what pruning lost and what was recovered without training, if the prune stage measured it."""
    metrics = stage_metrics(report, "prune") or {}
    teacher, cut, after = report["stages"][0]["metrics"].get("score"), metrics.get("score_as_cut"), metrics.get("score")
    if teacher is None or cut is None or after is None:
        return None
    more = ""
    if teacher > after and stage_section(report, "distill") is None:
        more = f" A short distillation would likely give back about {loss(DISTILLED * (teacher - after))} (docs/pruning.md)."
    return (
        f"Pruning: teacher {percent(teacher, digits)}, as cut {percent(cut, digits)}, {percent(after, digits)} once recovered "
        f"without training or labels: {loss(teacher - after)} below the teacher.{more}"
    )


def without_training(report: Report) -> str | None:
    """Return what pruning and INT8 each gained and lost where nothing was trained after the source."""
    trained = [
        section for section in report["recipe"]["stages"][1:] if any(map(section.get, ("fit", "recover", "sparsity")))
    ]
    if trained:
        return None
    teacher, cut, int8 = (headline_row(report, name, headline_provider(report)) for name in (TEACHER, FP32, PTQ))
    if not teacher or not cut or not int8 or not cut["speedup"] or not int8["speedup_vs_student_fp32"]:
        return None
    parts = [f"INT8 {_step(int8, cut, int8['speedup_vs_student_fp32'])}"]
    if prune := stage_section(report, "prune"):
        solved = " and solving the weights" if prune["reconstruct"] in {"least_squares", "gradients"} else ""
        parts.insert(0, f"pruning{solved} {_step(cut, teacher, cut['speedup'])}")
    return f"Without training: {'; '.join(parts)}, all in ONNX Runtime."


def _step(row: DeployedRow, before: DeployedRow, speed: Speedup) -> str:
    """Return a file's speed, size and score against the file of the step before."""
    size = f"{percent(row['size_mb'] / before['size_mb'], 0)} of the size"
    return f"{times(speed['ratio'])} as fast as {before['name']}, {size}, {points(row['score'] - before['score'])}"


def training_gain(report: Report, digits: int) -> str | None:
    """Return what training gained, from both INT8 files if they were scored, else as PyTorch measured it."""
    if not was_trained(report):
        return None
    ptq, qat = any_row(report, PTQ), any_row(report, QAT)
    if ptq and qat and ptq["score"] is not None and qat["score"] is not None:
        return " ".join(_gain(report, ptq, qat, ptq["score"], qat["score"], digits))
    metrics = stage_metrics(report, "qat") or {}
    before, after = metrics.get("score_calibrated"), metrics.get("score")
    if before is None or after is None:
        return None
    return (
        f"INT8 in PyTorch: calibrated alone {percent(before, digits)}, trained (QAT) {percent(after, digits)} "
        f"on the same validation images: {points(after - before)}."
    )


def skipped(report: Report) -> str | None:
    """Return why quantization-aware training was skipped, if it was."""
    if was_trained(report):
        return None
    enough = (stage_section(report, "qat") or {}).get("skip_if_ptq_drop_below")
    found = report["ptq"]["targets"].get(target_of(report)) if report["ptq"] else None
    drop = found["trials"][found["chosen"]]["drop"] if found and found["chosen"] is not None else None
    lost = "" if drop is None else f" {loss(drop)} against the float student on the tuning split,"
    limit = "" if enough is None else f" ({loss(enough)})"
    return f"Quantization-aware training was skipped: calibration alone loses{lost} less than qat.skip_if_ptq_drop_below{limit}."


def left_in_float(report: Report) -> str | None:
    """Return how many layers the qat stage left in float for accuracy, if any."""
    count = (stage_metrics(report, "qat") or {}).get("float_groups")
    if not count:
        return None
    allowed = (stage_section(report, "qat") or {}).get("max_drop")
    why = "" if allowed is None else f" to lose no more than {loss(allowed)} against the float student (qat.max_drop)"
    return f"{count:.0f} {'layer stays' if count == 1 else 'layers stay'} in float{why}."


def was_trained(report: Report) -> bool:
    """Tell whether the qat stage trained, or there is none."""
    return (stage_metrics(report, "qat") or {}).get("trained") != 0


def stage_metrics(report: Report, stage: str) -> dict[str, float | None] | None:
    """Return the metrics of the last stage of this kind."""
    return next((row["metrics"] for row in reversed(report["stages"]) if row["stage"] == stage), None)


def stage_section(report: Report, stage: str) -> Json | None:
    """Return the recipe's last section of this kind."""
    return next((section for section in reversed(report["recipe"]["stages"]) if section["stage"] == stage), None)


def _gain(report: Report, ptq: DeployedRow, qat: DeployedRow, before: float, after: float, digits: int) -> list[str]:
    shown = f"INT8 by calibration alone (PTQ) {percent(before, digits)}, by training (QAT) {percent(after, digits)}"
    images = ptq["images"]
    if not images or images != qat["images"] or not TASKS[report["recipe"]["task"]].metric.counts_images:
        return [f"{shown}: {points(after - before)}."]
    more = round(after * images) - round(before * images)
    net = f"{abs(more):,} {'more' if more > 0 else 'fewer'} right {'prediction' if abs(more) == 1 else 'predictions'}"
    sentences = [f"{shown} on the same {images:,} images: {points(after - before)}{f', {net}' if more else ''}."]
    agreements = [row["agreement"] for row in (ptq, qat) if row["agreement"] is not None]
    if len(agreements) == 2:
        # Where both agree with the float student they agree with each other, so discordant images are among the rest.
        most = min(images, sum(images - round(agreement * images) for agreement in agreements))
        both = " and ".join(percent(agreement, digits) for agreement in agreements)
        chance = f": {_chance(abs(more), most)}" if 0 < abs(more) <= most else ""
        sentences.append(
            f"They agree with the float student on {both} of them, so with each other on all but at most {most:,}{chance}."
        )
    return sentences


def _chance(difference: int, most: int) -> str:
    """Return whether chance explains a net difference, knowing only the largest possible number of discordant images."""
    largest = most - (most - difference) % 2  # same parity as the difference; more discordant images make p larger
    low, high = mcnemar(0, difference), mcnemar((largest - difference) // 2, (largest + difference) // 2)
    if low > SIGNIFICANT:
        return f"chance alone can explain this difference (exact sign test, p ≥ {significant(low, digits=2)})"
    if high <= SIGNIFICANT:
        return f"more than chance explains (exact sign test, p ≤ {significant(high, digits=2)})"
    return f"the totals do not tell whether that is more than chance (exact sign test, p between {significant(low, digits=2)} and {significant(high, digits=2)})"
