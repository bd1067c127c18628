"""The tables on INT8: calibration without training, comparison with the reference, audit of the optimized file."""

from collections.abc import Iterable, Iterator

from compress.quant.rows import PtqTarget
from compress.report.judge.gain import stage_metrics, stage_section
from compress.report.judge.parity import allowed
from compress.report.judge.recommend import ENGINES
from compress.report.judge.verdict import TOLERANCE, any_row, audited_name, target_of
from compress.report.numbers import UNKNOWN, heading, loss, percent, points, significant, times
from compress.report.page.summary import metric
from compress.report.page.table import Section, Table, bar, count, mark, strong
from compress.report.shape import Report
from export.onnx_file.roles import PTQ, QAT, is_int8
from export.proof.audit import Audit
from export.proof.rows import TensorRow, VerifyRow

SCORED_IN = {"onnxruntime": "ONNX Runtime", "pytorch": "PyTorch"}
TOP_GROUPS = 10


def sections(report: Report, digits: int) -> list[Section]:
    """Return how INT8 was made and proved; a section is empty if its stage did not run."""
    audits = sorted(
        ((name, row) for name, row in (report["audit"] or {}).items() if is_int8(name)),
        key=lambda item: _order(item[0]),
    )
    verified = sorted((report["verify"] or {}).items(), key=lambda item: _order(item[0]))
    return [
        Section("INT8 without training", [table for found in _targets(report, digits) for table in found]),
        Section(
            "Does the file predict as its network?",
            [parity(report, name, row) for name, row in verified],
            folded=[tensors(name, row) for name, row in verified if row["tensors"]],
        ),
        Section(
            "What runs in integers",
            [audit(report, audits), *(in_float(name, row) for name, row in audits[:1])] if audits else [],
            lead="The graph after ONNX Runtime's optimizer: what really runs, not what the file contains.",
            folded=[in_float(name, row) for name, row in audits[1:]],
        ),
    ]


def _targets(report: Report, digits: int) -> Iterator[list[Table]]:
    """Yield each target's tables, the recipe's own first."""
    own = target_of(report)
    found = report["ptq"]["targets"] if report["ptq"] else {}
    for target, ptq in sorted(found.items(), key=lambda item: (item[0] != own, item[0])):
        yield [methods(report, target, ptq, digits), trials(report, target, ptq, digits), *groups(target, ptq)]


def methods(report: Report, target: str, found: PtqTarget, digits: int) -> Table:
    """Return the scores of the float student, every calibration method, and the trained file."""
    assert report["ptq"] is not None
    rows: list[list[str]] = [["float student", "", "ONNX Runtime", percent(report["ptq"]["float_score"], digits)]]
    rows[0] += [""] * 3
    for row in found["methods"]:
        engine, scored_in = ENGINES.get(row["engine"], row["engine"]), SCORED_IN.get(row["scored_in"], row["scored_in"])
        scores = (percent(row["score"], digits), percent(row["agreement"], digits))
        rows.append(
            [engine, row["method"], scored_in, *scores, *map(count, (row["integer_layers"], row["float_layers"]))]
        )
    notes = [f"{row['engine']}, {row['method']}: {row['note']}" for row in found["methods"] if row["note"]]
    trained, note = _trained(report, target, digits)
    return Table(
        f"INT8 without training · {target} · {report['ptq']['images']:,} validation images",
        ("Engine", "Method", "Scored in", heading(report["metric"]["title"]), "Agree", "Int", "Float"),
        [*rows, *trained],
        text=(0, 1, 2),
        note="; ".join([*notes, *note]),
    )


def _trained(report: Report, target: str, digits: int) -> tuple[list[list[str]], list[str]]:
    """Return the row of the qat stage's file, scored in ONNX Runtime or else in PyTorch, and notes; both empty without qat."""
    metrics = stage_metrics(report, "qat")
    if metrics is None or report["ptq"] is None:
        return [], []
    is_own = target == target_of(report)
    name = QAT if is_own else f"{QAT}_{target}"
    row, audit = any_row(report, name), (report["audit"] or {}).get(name)
    was_trained = metrics.get(f"trained_{target}", metrics.get("trained") if is_own else None) != 0
    score = row["score"] if row else metrics.get(f"score_{target}", metrics.get("score") if is_own else None)
    if score is None:
        return [], []
    cells = (
        "this pipeline",
        "trained (QAT)" if was_trained else "QAT skipped",
        "ONNX Runtime" if row or not was_trained else "PyTorch",
        percent(score, digits),
        percent(row["agreement"] if row else None, digits),
        count(len(audit["integer_layers"]) if audit else None),
        count(len(audit["float_layers"]) if audit else None),
    )
    is_other = row and row["images"] != report["ptq"]["images"]
    return [strong(cells)], [f"{name} was scored on {row['images']:,} images"] if row and is_other else []


def trials(report: Report, target: str, found: PtqTarget, digits: int) -> Table:
    """Return the files that tuning built, with the chosen one in bold."""
    assert report["ptq"] is not None
    rows = []
    for index, trial in enumerate(found["trials"]):
        chosen = index == found["chosen"]
        engine = trial.get("engine", "compress")
        cells = (
            trial["number_format"].upper(),
            trial["calibration"] + ("" if engine == "compress" else f" ({ENGINES.get(engine, engine)})"),
            mark(trial["met"], ("met" if trial["met"] else "missed") + (", chosen" if chosen else "")),
            significant(trial["kl"], digits=2),
            percent(trial["score"], digits),
            loss(trial["drop"]),
            f"{len(trial['keep_float'])}",
            times(trial["latency_ratio"]),
            percent(trial["agreement"], digits),
            ", ".join(trial["keep_float"]),
        )
        rows.append(strong(cells) if chosen else list(cells))
    metric = heading(report["metric"]["title"])
    columns = (
        "Trial",
        "Calibration",
        "Result",
        "KL",
        metric,
        "Drop",
        "In float",
        "vs FP32",
        "Agreement",
        "Layers in float",
    )
    title = f"Tuning · {target} · by {report['ptq']['tuning_images']:,} training images"
    return Table(title, columns, rows, text=(0, 1, 2, 9), more=2)


def groups(target: str, found: PtqTarget) -> Iterator[Table]:
    """Yield the table of the layers whose quantization alone changes predictions most, if measured."""
    ranked = sorted(found["sensitivity"], key=lambda row: -row["kl"])[:TOP_GROUPS]
    largest = max((row["kl"] for row in ranked), default=0.0) or 1.0
    rows = [
        (
            row["group"],
            bar(row["kl"] / largest),
            significant(row["kl"], digits=2),
            f"{100 * row['drop']:.2f}".replace("-", "−"),
        )
        for row in ranked
    ]
    note = "Each layer quantized alone: how far predictions move from the float student's (KL), and the points lost."
    if rows:
        yield Table(
            f"Most sensitive layers · {target}", ("Layer", "", "KL", "Points lost"), rows, text=(0, 1), note=note
        )


def parity(report: Report, name: str, row: VerifyRow) -> Table:
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
            f"{metric(report).alike}, beside {reference}: {row['images']:,} images, 95 % interval {low} to {high}"
            + ("" if wanted is None else f"; at least {percent(wanted)} wanted"),
        )
    ]
    if row["score"] is not None and row["score_reference"] is not None:
        difference, (most, words) = row["score"] - row["score_reference"], allowed(row["images"])
        where = "PyTorch" if is_network else "unoptimized"
        note = (
            f"{where} {percent(row['score_reference'])}, ONNX Runtime {percent(row['score'])}; at most {words} wanted"
        )
        title = f"{heading(report['metric']['title'])} against {where}"
        rows.append((mark(abs(difference) <= most + TOLERANCE), title, points(difference), note))
    compared = f"{len(row['tensors']):,} tensors compared on {row['tensor_images']:,} images, each layer on its own"
    rows.append(("", "First divergence", row["first_divergence"] or "none", compared))
    possible = len(row["saturation_possible"])
    value = (
        "in " + count(len(row["saturation"]))
        if row["saturation"]
        else "none found"
        if possible
        else "impossible on this grid"
    )
    note = f"possible in {possible} {'layer' if possible == 1 else 'layers'}" if possible else ""
    rows.append((mark(not row["saturation"]), "Saturation", value, note))
    return Table(f"{name} against its reference", ("",) * 4, rows, text=(0, 1, 2, 3))


def tensors(name: str, row: VerifyRow) -> Table:
    """Return every tensor's distance from the reference, worst first."""

    def worst_first(tensor: TensorRow) -> tuple[float, int]:
        unknown = 0.0 if tensor["differing"] else float("inf")  # identical, unless the reference is all zeros
        return (unknown if tensor["snr_db"] is None else tensor["snr_db"], -tensor["max_lsb"])

    rows = [
        (
            tensor["name"],
            f"{tensor['snr_db']:.1f} dB"
            if tensor["snr_db"] is not None
            else UNKNOWN
            if tensor["differing"]
            else "identical",
            count(tensor["max_lsb"]),
            significant(tensor["mean_lsb"], digits=2),
            percent(tensor["differing"]),
            count(tensor["local"]["max_lsb"]),
        )
        for tensor in sorted(row["tensors"], key=worst_first)
    ]
    columns = ("Tensor", "SNR", "Max LSB", "Mean LSB", "Differing", "Own max LSB")
    return Table(f"{name}: tensor by tensor, worst first", columns, rows)


def audit(report: Report, audits: Iterable[tuple[str, Audit]]) -> Table:
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
    limits = [
        f"{key} {wanted:g}" for key in LIMITS if (wanted := _limit(report, audited_name(report), key)) is not None
    ]
    columns = ("Once optimized", "Int", "Float", "MACs in float", "Q/DQ", "Float biases", "FP32", "Copies")
    return Table(
        "Layers and what is left in float", columns, rows, note=f"Limits: {', '.join(limits)}." if limits else ""
    )


LIMITS = ("max_float_layers", "max_float_fraction", "max_leftover_qdq")


def in_float(name: str, row: Audit) -> Table:
    """Return a file's float layers and operators by name with reasons, and the number of operators of each kind."""
    reasons = row["reasons"]
    operators = sorted(row["operators"].items(), key=lambda item: (-item[1], item[0]))
    found = [
        *(("layer in float", layer, reasons.get(layer, "")) for layer in row["float_layers"]),
        *(
            ("operator in float", module, " · ".join(filter(None, (operator, reasons.get(module)))))
            for module, operator in row["float_operators"].items()
        ),
        *(("leftover Q/DQ", node, reasons.get(node, "")) for node in row["leftover_qdq"]),
        *(("float bias", layer, "") for layer in row["float_biases"]),
        *(("copy", node, "") for node in row["copies"]),
        ("all operators", ", ".join(f"{number} {operator}" for operator, number in operators), ""),
        (f"{len(row['integer_layers']):,} layers in integers", ", ".join(row["integer_layers"]), ""),
    ]
    return Table(f"{name} · {row['provider'].upper()}", ("What", "Name", "Why"), found, text=(0, 1, 2))


def _judged(report: Report, name: str, key: str, value: float | None, shown: str) -> str:
    wanted = _limit(report, name, key)
    return mark(None if wanted is None else value is not None and value <= wanted + TOLERANCE, shown)


def _limit(report: Report, name: str | None, key: str) -> float | None:
    """Return one of the export stage's limits; None unless the file is the deployed one."""
    section = stage_section(report, "export")
    if section is None or name is None or name != audited_name(report):
        return None
    limit: float | None = section["limits"][key]
    return limit


def _order(name: str) -> tuple[int, str]:
    return ((QAT, PTQ).index(name) if name in (QAT, PTQ) else 2, name)
