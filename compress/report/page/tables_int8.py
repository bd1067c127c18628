"""The tables on INT8: calibration without training, comparison with the reference, audit of the optimized file."""

import math
from collections.abc import Iterable, Iterator
from operator import itemgetter

from compress.quant.rows import Ptq, PtqTarget
from compress.report.judge.gain import stage_metrics, stage_section
from compress.report.judge.parity import allowed
from compress.report.judge.recommend import ENGINES
from compress.report.judge.verdict import TOLERANCE, any_row, audited_name, is_mixed, target_of
from compress.report.numbers import UNKNOWN, loss, percent, points, significant, times
from compress.report.page import summary
from compress.report.page.table import PageSection, ReportTable, bar, count, mark, strong
from compress.report.shape import Report
from export.errors import first
from export.onnx_file.roles import PTQ, QAT, is_int8
from export.proof.audit import Audit, FloatTimes
from export.proof.rows import VerifyRow

SCORED_IN = {"onnxruntime": "ONNX Runtime", "pytorch": "PyTorch"}
TOP_GROUPS = 10
LIMITS = ("max_float_layers", "max_float_fraction", "max_leftover_qdq")


def sections(report: Report) -> list[PageSection]:
    """Return how INT8 was made and proved; a section is empty if its stage did not run."""
    audits = sorted((item for item in (report["audit"] or {}).items() if is_int8(item[0])), key=_order)
    times = report.get("float_times", {})
    verified = sorted((report["verify"] or {}).items(), key=_order)
    return [
        PageSection("INT8 without training", [*calibrated(report)] if report["ptq"] else []),
        PageSection(
            "Does the file predict as its network?",
            [parity(report, name, row) for name, row in verified],
            folded=[tensors(name, row) for name, row in verified if row["tensors"]],
        ),
        PageSection(
            "What runs in integers",
            [audit(report, audits), *(in_float(name, row, times.get(name)) for name, row in audits[:1])]
            if audits
            else [],
            lead="The graph after ONNX Runtime's optimizer: what really runs, not what the file contains.",
            folded=[in_float(name, row, times.get(name)) for name, row in audits[1:]],
        ),
    ]


def calibrated(report: Report) -> Iterator[ReportTable]:
    """Yield each target's tables, the recipe's own first."""
    assert report["ptq"] is not None
    own = target_of(report)
    for target, found in sorted(report["ptq"]["targets"].items(), key=lambda item: (item[0] != own, item[0])):
        yield methods(report, report["ptq"], target)
        yield trials(report, report["ptq"], target)
        yield from groups(target, found)
        yield from speed(target, found)


def methods(report: Report, ptq: Ptq, target: str) -> ReportTable:
    """Return the scores of the float student, every calibration method, and the trained file."""
    score, found = summary.score_text(report), ptq["targets"][target]["methods"]
    rows: list[list[str]] = [["float student", "", "ONNX Runtime", score(ptq["float_score"]), "", "", ""]]
    for row in found:
        engine, scored_in = ENGINES.get(row["engine"], row["engine"]), SCORED_IN.get(row["scored_in"], row["scored_in"])
        layers = map(count, (row["integer_layers"], row["float_layers"]))
        rows.append([engine, row["method"], scored_in, score(row["score"]), score(row["agreement"]), *layers])
    notes = [f"{row['engine']}, {row['method']}: {row['note']}" for row in found if row["note"]]
    if left_out := ptq.get("outliers"):
        notes.append(f"calibrated without images of outlying values: {first(left_out)}")
    trained, note = _trained(report, ptq, target)
    return ReportTable(
        f"INT8 without training · {target} · {ptq['images']:,} validation images",
        ("Engine", "Method", "Scored in", summary.metric_title(report), "Agree", "Int", "Float"),
        [*rows, *trained],
        text=(0, 1, 2),
        note="; ".join([*notes, *note]),
    )


def _trained(report: Report, ptq: Ptq, target: str) -> tuple[list[list[str]], list[str]]:
    """Return the row of the qat stage's file, scored in ONNX Runtime or else in PyTorch, and notes; both empty without qat."""
    metrics = stage_metrics(report, "qat") or {}
    name, ends = (QAT, (f"_{target}", "")) if target == target_of(report) else (f"{QAT}_{target}", (f"_{target}",))
    row, audit = any_row(report, name), (report["audit"] or {}).get(name)
    score, trained = (
        next((metrics[f"{key}{end}"] for end in ends if f"{key}{end}" in metrics), None) for key in ("score", "trained")
    )
    score, text = row["score"] if row and metrics else score, summary.score_text(report)
    if score is None:
        return [], []
    cells = (
        "this pipeline",
        "QAT skipped" if trained == 0 else "trained (QAT)",
        "ONNX Runtime" if row or trained == 0 else "PyTorch",
        text(score),
        text(row["agreement"] if row else None),
        count(len(audit["integer_layers"]) if audit else None),
        count(len(audit["float_layers"]) if audit else None),
    )
    is_other = row and row["images"] != ptq["images"]
    return [strong(cells)], [f"{name} was scored on {row['images']:,} images"] if row and is_other else []


def trials(report: Report, ptq: Ptq, target: str) -> ReportTable:
    """Return the files that tuning built, with the chosen one in bold."""
    rows, score, found = [], summary.score_text(report), ptq["targets"][target]
    for index, trial in enumerate(found["trials"]):
        chosen, engine = index == found["chosen"], trial.get("engine", "compress")
        cells = (
            trial["number_format"].upper(),
            trial["calibration"] + ("" if engine == "compress" else f" ({ENGINES.get(engine, engine)})"),
            mark(trial["met"], ("met" if trial["met"] else "missed") + (", chosen" if chosen else "")),
            significant(trial["kl"], digits=2),
            score(trial["score"]),
            loss(trial["drop"]),
            f"{len(trial['keep_float'])}",
            times(trial["latency_ratio"]),
            score(trial["agreement"]),
            ", ".join(trial["keep_float"]),
        )
        rows.append(strong(cells) if chosen else list(cells))
    columns = ("Trial", "Calibration", "Result", "KL", summary.metric_title(report), "Drop", "In float", "vs FP32")
    title = f"Tuning · {target} · by {ptq['tuning_images']:,} training images"
    beside = any(trial["calibration"] == "dynamic" for trial in found["trials"])
    note = (
        "Dynamic ranges need no images; the file lies in the ptq stage's folder and is never chosen, as nothing proves it."
        if beside
        else ""
    )
    return ReportTable(title, (*columns, "Agreement", "Layers in float"), rows, text=(0, 1, 2, 9), more=2, note=note)


def groups(target: str, found: PtqTarget) -> Iterator[ReportTable]:
    """Yield the table of the layers whose quantization alone changes predictions most, if measured."""
    ranked = sorted(found["sensitivity"], key=lambda row: -row["kl"])[:TOP_GROUPS]
    largest = max((row["kl"] for row in ranked), default=0.0) or 1.0
    rows = []
    for row in ranked:
        lost = f"{100 * row['drop']:.2f}".replace("-", "−")
        rows.append((row["group"], bar(row["kl"] / largest), significant(row["kl"], digits=2), lost))
    note = "Each layer quantized alone: how far predictions move from the float student's (KL), and the points lost."
    if rows:
        columns = ("Layer", "", "KL", "Points lost")
        yield ReportTable(f"Most sensitive layers · {target}", columns, rows, text=(0, 1), note=note)


def speed(target: str, found: PtqTarget) -> Iterator[ReportTable]:
    """Yield the table of the layers' times in float and in integers, if layers were timed; the greatest difference first."""
    timed = sorted(found.get("speed", ()), key=lambda row: row["float_ms"] - row["integer_ms"])
    rows = [
        (row["layer"], f"{row['float_ms']:.3f}", f"{row['integer_ms']:.3f}", "float" if row["in_float"] else "integers")
        for row in timed
    ]
    slower, count_ = sum(row["float_ms"] < row["integer_ms"] for row in timed), sum(row["in_float"] for row in timed)
    note = (
        f"{slower} of {len(timed)} layers are faster in float; "
        + (
            f"{count_} stay in float, chosen together with the borders between them."
            if count_
            else "no file with some of them in float was faster by more than the noise."
        )
        + " A layer's time has what follows it up to the next layers; one thread, one image."
    )
    if rows:
        yield ReportTable(
            f"Float or integers, by layer · {target}",
            ("Layer", "Float ms", "Integer ms", "Chosen"),
            rows,
            text=(0, 3),
            note=note,
        )


def parity(report: Report, name: str, row: VerifyRow) -> ReportTable:
    """Return how closely an INT8 file predicts as its reference."""
    low, high = (percent(bound) for bound in row["agreement_ci95"])
    is_network = name.startswith(QAT)
    reference = "the fake-quantized network" if is_network else "the same file without the optimizer"
    wanted = _limit(report, name, "min_agreement")
    met = None if wanted is None else row["agreement"] >= wanted - TOLERANCE
    rows = [
        (
            mark(met),
            "Agreement",
            percent(row["agreement"]),
            f"{summary.metric(report).alike}, beside {reference}: {row['images']:,} images, 95 % interval {low} to {high}"
            + ("" if wanted is None else f"; at least {percent(wanted)} wanted"),
        )
    ]
    if row["score"] is not None and row["score_reference"] is not None:
        difference, (most, words) = row["score"] - row["score_reference"], allowed(row["images"])
        where = "PyTorch" if is_network else "unoptimized"
        note = (
            f"{where} {percent(row['score_reference'])}, ONNX Runtime {percent(row['score'])}; at most {words} wanted"
        )
        title = f"{summary.metric_title(report)} against {where}"
        rows.append((mark(abs(difference) <= most + TOLERANCE), title, points(difference), note))
    compared = f"{len(row['tensors']):,} tensors compared on {row['tensor_images']:,} images, each layer on its own"
    rows.append(("", "First divergence", row["first_divergence"] or "none", compared))
    possible = len(row["saturation_possible"])
    value = "none found" if possible else "impossible on this grid"
    value = f"in {count(len(row['saturation']))}" if row["saturation"] else value
    note = f"possible in {possible} {'layer' if possible == 1 else 'layers'}" if possible else ""
    rows.append((mark(not row["saturation"]), "Saturation", value, note))
    return ReportTable(f"{name} against its reference", ("",) * 4, rows, text=(0, 1, 2, 3))


def tensors(name: str, row: VerifyRow) -> ReportTable:
    """Return every tensor's distance from the reference, worst first."""
    rows = []
    for tensor in row["tensors"]:
        unknown, shown = (0.0, UNKNOWN) if tensor["differing"] else (math.inf, "identical")  # unknown if all zeros
        snr = unknown if tensor["snr_db"] is None else tensor["snr_db"]
        cells = (
            tensor["name"],
            shown if tensor["snr_db"] is None else f"{snr:.1f} dB",
            count(tensor["max_lsb"]),
            significant(tensor["mean_lsb"], digits=2),
            percent(tensor["differing"]),
            count(tensor["local"]["max_lsb"]),
        )
        rows.append(((snr, -tensor["max_lsb"]), cells))
    columns = ("Tensor", "SNR", "Max LSB", "Mean LSB", "Differing", "Own max LSB")
    worst_first = [cells for _, cells in sorted(rows, key=itemgetter(0))]
    return ReportTable(f"{name}: tensor by tensor, worst first", columns, worst_first)


def audit(report: Report, audits: Iterable[tuple[str, Audit]]) -> ReportTable:
    """Return the audit of each INT8 file, and whether it keeps the export stage's limits."""
    rows = []
    for name, row in audits:
        floats, left, fraction = len(row["float_layers"]), len(row["leftover_qdq"]), row["float_fraction"]
        rows.append(
            (
                name,
                count(len(row["integer_layers"])),
                _judged(report, name, "max_float_layers", floats, count(floats)),
                _judged(report, name, "max_float_fraction", fraction, percent(fraction)),
                _judged(report, name, "max_leftover_qdq", left, count(left)),
                count(len(row["float_biases"])),
                significant(row["float_initializer_mb"], "MB"),
                count(len(row["copies"])),
            )
        )
    wanted = {key: _limit(report, audited_name(report), key) for key in LIMITS}
    limits = ", ".join(f"{key} {most:g}" for key, most in wanted.items() if most is not None)
    columns = ("Once optimized", "Int", "Float", "MACs in float", "Q/DQ", "Float biases", "FP32", "Copies")
    note = f"Limits: {limits}." if limits else ""
    return ReportTable("Layers and what is left in float", columns, rows, note=note)


def in_float(name: str, row: Audit, times: FloatTimes | None) -> ReportTable:
    """Return a file's float layers and operators by name with reasons and times, and the number of operators of each kind."""
    cost = {} if times is None else {module: f"{ms:.3f}" for module, ms in times["modules"].items()}
    reasons = row["reasons"]
    operators = sorted(row["operators"].items(), key=lambda item: (-item[1], item[0]))
    found = [
        *(("layer in float", layer, cost.get(layer, ""), reasons.get(layer, "")) for layer in row["float_layers"]),
        *(
            (
                "operator in float",
                module,
                cost.get(module, ""),
                " · ".join(filter(None, (operator, reasons.get(module)))),
            )
            for module, operator in row["float_operators"].items()
        ),
        *(("leftover Q/DQ", node, "", reasons.get(node, "")) for node in row["leftover_qdq"]),
        *(("float bias", layer, "", "") for layer in row["float_biases"]),
        *(("copy", node, "", "") for node in row["copies"]),
        ("all operators", ", ".join(f"{number} {operator}" for operator, number in operators), "", ""),
        (f"{len(row['integer_layers']):,} layers in integers", ", ".join(row["integer_layers"]), "", ""),
    ]
    note = (
        f"What runs in float takes {sum(times['modules'].values()):.3f} of {times['whole']:.3f} ms by ONNX Runtime's profile: "
        "one image, one thread."
        if times
        else ""
    )
    title = f"{name} · {row['provider'].upper()}"
    return ReportTable(title, ("What", "Name", "ms", "Why"), found, text=(0, 1, 3), note=note)


def _judged(report: Report, name: str, key: str, value: float | None, shown: str) -> str:
    wanted = _limit(report, name, key)
    return mark(None if wanted is None else value is not None and value <= wanted + TOLERANCE, shown)


def _limit(report: Report, name: str | None, key: str) -> float | None:
    """Return one of the export stage's limits; None unless the file is the deployed one."""
    section = stage_section(report, "export")
    if section is None or name is None or name != audited_name(report):
        return None
    if key in LIMITS and is_mixed(report):
        return None
    limit: float | None = section["limits"][key]
    return limit


def _order(item: tuple[str, object]) -> tuple[int, str]:
    """Return the sort key of a file's (name, row): the trained INT8 first, then the calibrated, then other targets'."""
    name = item[0]
    return ((QAT, PTQ).index(name) if name in (QAT, PTQ) else 2, name)
