"""What the page and the terminal say about INT8 without training: every method, tuning's trials, the sensitive layers."""

from typing import NamedTuple

from compress.report.gain import stage_metrics
from compress.report.numbers import UNKNOWN, loss, percent, significant, times
from compress.report.shape import GroupRow, MethodRow, PtqTarget, Report, TrialRow
from compress.report.verdict import any_row, target_of
from export.onnx_file.roles import QAT

ENGINES = {"onnxruntime": "ONNX Runtime", "neural-compressor": "neural-compressor", "compress": "this pipeline"}
SCORED_IN = {"onnxruntime": "ONNX Runtime", "pytorch": "PyTorch"}
TOP_GROUPS = 10


class MethodLine(NamedTuple):
    """One way to INT8, in words; `is_trained` marks the qat stage's file beside the methods."""

    engine: str
    method: str
    scored_in: str
    score: str
    agreement: str
    integer_layers: str
    float_layers: str
    note: str
    is_trained: bool


class TrialLine(NamedTuple):
    """One trial of the tuning, in words."""

    number_format: str
    calibration: str
    keep_float: tuple[str, ...]
    score: str
    drop: str
    agreement: str
    kl: str
    speedup: str
    met: bool
    chosen: bool


class GroupBar(NamedTuple):
    """One group's sensitivity: `share` is its KL as a part of the largest, in percent; `lost` are points of top-1."""

    group: str
    share: float
    kl: str
    lost: str


class Section(NamedTuple):
    """INT8 without training on one target; `judged` says by what images the trials were."""

    target: str
    images: int
    judged: str
    methods: list[MethodLine]
    trials: list[TrialLine]
    groups: list[GroupBar]


def sections(report: Report, digits: int) -> list[Section]:
    """Return each target's section, the recipe's own first; none without a ptq stage."""
    ptq = report["ptq"]
    if ptq is None:
        return []
    own = target_of(report)
    return [
        Section(
            target,
            ptq["images"],
            f"{ptq['tuning_images']:,} training images" if "tuning_images" in ptq else "the validation images",
            _methods(report, target, found, digits),
            [_trial(trial, index == found["chosen"], digits) for index, trial in enumerate(found["trials"])],
            _groups(found["sensitivity"]),
        )
        for target, found in sorted(ptq["targets"].items(), key=lambda item: (item[0] != own, item[0]))
    ]


def _methods(report: Report, target: str, found: PtqTarget, digits: int) -> list[MethodLine]:
    """Return the float student, every method, and the trained file."""
    assert report["ptq"] is not None
    score = percent(report["ptq"]["float_score"], digits)
    trained = _trained(report, target, digits)
    return [
        MethodLine("float student", "", "ONNX Runtime", score, "", "", "", "", False),
        *(_method(row, digits) for row in found["methods"]),
        *([trained] if trained else []),
    ]


def _method(row: MethodRow, digits: int) -> MethodLine:
    return MethodLine(
        ENGINES.get(row["engine"], row["engine"]),
        row["method"],
        SCORED_IN.get(row["scored_in"], row["scored_in"]),
        percent(row["score"], digits),
        percent(row["agreement"], digits),
        _count(row["integer_layers"]),
        _count(row["float_layers"]),
        row["note"] or "",
        False,
    )


def _trained(report: Report, target: str, digits: int) -> MethodLine | None:
    """Return the qat stage's file beside the methods: as ONNX Runtime scored it, else as PyTorch did; or the calibrated one that made it needless."""
    metrics = stage_metrics(report, "qat")
    if metrics is None or report["ptq"] is None:
        return None
    is_own = target == target_of(report)
    name = QAT if is_own else f"{QAT}_{target}"
    row, audit = any_row(report, name), (report["audit"] or {}).get(name)
    was_trained = metrics.get(f"trained_{target}", metrics.get("trained") if is_own else None) != 0
    method = "trained (QAT)" if was_trained else "QAT skipped"
    layers = [_count(len(audit[kind])) if audit else UNKNOWN for kind in ("integer_layers", "float_layers")]
    if row and row["score"] is not None:
        images = row["images"]
        note = f"scored on {images:,} images" if images and images != report["ptq"]["images"] else ""
        scores = (percent(row["score"], digits), percent(row["agreement"], digits))
        return MethodLine("this pipeline", method, "ONNX Runtime", *scores, layers[0], layers[1], note, True)
    score = metrics.get(f"score_{target}", metrics.get("score") if is_own else None)
    if score is None:
        return None
    scored_in = "PyTorch" if was_trained else "ONNX Runtime"
    return MethodLine(
        "this pipeline", method, scored_in, percent(score, digits), UNKNOWN, layers[0], layers[1], "", True
    )


def _trial(trial: TrialRow, chosen: bool, digits: int) -> TrialLine:
    return TrialLine(
        trial["number_format"].upper(),
        trial["calibration"],
        tuple(trial["keep_float"]),
        percent(trial["score"], digits),
        loss(trial["drop"]),
        percent(trial["agreement"], digits),
        significant(trial["kl"], digits=2) if "kl" in trial else UNKNOWN,
        times(trial["latency_ratio"]),
        trial["met"],
        chosen,
    )


def _groups(rows: list[GroupRow]) -> list[GroupBar]:
    ranked = sorted(rows, key=lambda row: -row["kl"])[:TOP_GROUPS]
    largest = max((row["kl"] for row in ranked), default=0.0)
    return [
        GroupBar(
            row["group"],
            round(100 * max(row["kl"], 0.0) / largest, 1) if largest > 0 else 0.0,
            significant(row["kl"], digits=2),
            f"{100 * row['drop']:.2f}".replace("-", "−"),
        )
        for row in ranked
    ]


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"
