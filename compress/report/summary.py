"""What the page and the terminal both say: the headline, the targets, the conditions of a timing."""

from collections.abc import Iterable
from typing import NamedTuple

from compress.report.numbers import heading, percent, points, significant, times
from compress.report.parity import mismatches
from compress.report.shape import DeployedRow, Report
from compress.report.verdict import (
    deployed_name,
    first_and_last,
    guesses,
    headline_provider,
    headline_row,
    is_met,
    limit,
    measure,
    show,
)
from export.onnx_file.roles import FP16, FP32, PTQ, QAT, TEACHER
from export.onnx_file.targets import CPU, provider_title

TITLES = {  # in the order of the tables
    TEACHER: "Teacher FP32",
    FP32: "Student FP32",
    FP16: "Student FP16",
    PTQ: "Student INT8 (PTQ)",
    QAT: "Student INT8",
}
TARGET_TITLES = {
    "max_drop": "Drop",
    "max_class_drop": "Recall drop of the worst class",
    "min_speedup": "Speed-up over the teacher",
    "min_int8_speedup": "Speed-up of INT8 over FP32",
    "max_size_ratio": "Size, as a part of the teacher's",
    "max_macs_ratio": "MACs, as a part of the teacher's",
}


class Card(NamedTuple):
    """One number of the headline: the deployed file's, what it is compared with, and a note."""

    title: str
    value: str
    against: str
    note: str


class TargetRow(NamedTuple):
    """One target that the recipe sets."""

    name: str
    title: str
    wanted: str
    measured: str
    met: bool
    conditions: str


def headline(report: Report) -> list[Card]:
    """Return the headline's cards; a run without a bench stage shows what its stages measured."""
    name = deployed_name(report)
    provider = headline_provider(report)
    teacher, student = headline_row(report, TEACHER, provider), headline_row(report, name, provider)
    if not teacher or not student:
        return [card for card in _stage_cards(report) if card]
    cards = [
        _score_card(report, teacher["score"], student["score"], "ONNX Runtime"),
        _ratio_card("Size", teacher["size_mb"], student["size_mb"], "MB", "smaller"),
        _ratio_card("MACs", *first_and_last(report, "macs_m"), "M", "fewer"),
        _latency_card(teacher, student),
        _speedup_card(student),
    ]
    return [card for card in cards if card]


def target_rows(report: Report) -> list[TargetRow]:
    """Return every target that the recipe sets, with what was measured."""
    measured = measure(report)
    rows = []
    for target, wanted in report["targets"].items():
        if wanted is None:
            continue
        value, conditions = measured[target]
        met = is_met(target, wanted, value)
        rows.append(
            TargetRow(
                target,
                TARGET_TITLES[target],
                f"{limit(target)} {show(target, wanted)}",
                show(target, value),
                met,
                conditions,
            )
        )
    return rows


def verdict_text(report: Report) -> str:
    """Return the verdict in a few words."""
    rows, over, wrong = target_rows(report), len(report["limits"]), len(mismatches(report))
    missed = sum(not row.met for row in rows)
    parts = [f"{file} answers at chance" for file in guesses(report)]
    if parts and rows and TEACHER in guesses(report):
        parts.insert(0, "nothing to judge")
    if missed or not parts or not rows:
        targets = "all targets met" if rows else "no targets set"
        if len(report["stages"]) < len(report["recipe"]["stages"]):
            targets = f"stopped after {report['stages'][-1]['stage']}, before the targets are judged"
        parts += [f"{missed} of {len(rows)} targets missed" if missed else targets]
    parts += [f"{over} export {'limit' if over == 1 else 'limits'} exceeded"] if over else []
    parts += [f"{wrong} {'file scores' if wrong == 1 else 'files score'} otherwise than measured"] if wrong else []
    return ", ".join(parts)


def title(name: str) -> str:
    """Return a file's title; those for further targets are named after their own, such as Student INT8 (PTQ), tensorrt."""
    own = next((own for own in (PTQ, QAT) if name.startswith(f"{own}_")), None)
    return f"{TITLES[own]}, {name.removeprefix(f'{own}_')}" if own else TITLES.get(name, name)


def has_further(report: Report) -> bool:
    """Tell whether files for further targets were timed."""
    return any(row["name"] not in TITLES for row in report["deployed"])


def colour(name: str) -> str:
    """Return a file's colour as CSS; a name from elsewhere never gets into the style."""
    known = next((known for known in TITLES if name == known or name.startswith(f"{known}_")), None)
    return f"var(--{known})" if known else "var(--muted)"


def order(name: str) -> tuple[int, str]:
    """Return a file's place in the tables; those for further targets come last."""
    return (list(TITLES).index(name) if name in TITLES else len(TITLES), name)


def conditions(row: DeployedRow) -> str:
    """Return a timing's conditions, such as CPU · 1 thread · batch 1 · 224 px."""
    provider = provider_title(row["provider"])
    threads = {0: "all threads", 1: "1 thread"}.get(row["threads"], f"{row['threads']} threads")
    parts = [provider, threads if provider == "CPU" else None, f"batch {row['batch']}", f"{row['image_size']} px"]
    return " · ".join(part for part in parts if part)


def ordered(rows: Iterable[DeployedRow]) -> list[DeployedRow]:
    """Return the rows with those of equal conditions together, the files in their usual order."""
    return sorted(
        rows,
        key=lambda row: (
            row["provider"] != CPU,
            row["provider"],
            -row["image_size"],
            row["batch"],
            row["threads"] or float("inf"),
            order(row["name"]),
        ),
    )


def options_text(row: DeployedRow) -> str:
    """Return the provider's options that a row was timed with."""
    return ", ".join(f"{key}={value}" for key, value in (row["provider_options"] or {}).items())


def decimals(report: Report) -> int:
    """Return how many decimals of a percentage mean something for the number of validation images."""
    images = max((row["images"] or 0 for row in report["deployed"]), default=0)
    return 1 if 0 < images < 1000 else 2


def _stage_cards(report: Report) -> list[Card | None]:
    return [
        _score_card(report, *first_and_last(report, "score"), "PyTorch"),
        _ratio_card("Parameters", *first_and_last(report, "params_m"), "M", "fewer"),
        _ratio_card("Size", *first_and_last(report, "size_mb"), "MB", "smaller"),
        _ratio_card("MACs", *first_and_last(report, "macs_m"), "M", "fewer"),
    ]


def _score_card(report: Report, before: float | None, after: float | None, where: str) -> Card | None:
    if before is None or after is None:
        return None
    digits = decimals(report)
    return Card(
        heading(report["metric"]["title"]),
        percent(after, digits),
        f"from {percent(before, digits)}",
        f"{points(after - before)}, {where}",
    )


def _ratio_card(title: str, before: float | None, after: float | None, unit: str, better: str) -> Card | None:
    if not before or not after:
        return None
    note = f"{percent(after / before, 0)}, {before / after:.1f}× {better}"
    return Card(title, significant(after, unit), f"from {significant(before, unit)}", note)


def _latency_card(teacher: DeployedRow, student: DeployedRow) -> Card | None:
    if student["p50_ms"] is None:
        return None
    return Card(
        "Latency",
        significant(student["p50_ms"], "ms"),
        f"from {significant(teacher['p50_ms'], 'ms')}",
        conditions(student),
    )


def _speedup_card(student: DeployedRow) -> Card | None:
    if not student["speedup"]:
        return None
    low, high = student["speedup"]["ci95"]
    return Card(
        "Speed-up", times(student["speedup"]["ratio"]), "over the teacher", f"95 % interval {low:.2f}–{high:.2f}"
    )
