"""What page and terminal share: headline, targets, verdict, the conditions of a timing."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from compress.report.judge.parity import mismatches
from compress.report.judge.verdict import (
    METRIC_DROP,
    audited_name,
    deployed_name,
    first_and_last,
    guesses,
    headline_provider,
    headline_row,
    is_met,
    limit,
    measure,
    mostly_float,
    runs_in,
    served_elsewhere,
    show,
)
from compress.report.numbers import heading, interval, percent, points, significant, times
from compress.report.page.table import ReportTable, mark
from compress.report.shape import DeployedRow, Report
from export.images.size import area, said, size_of
from export.onnx_file.roles import FP16, FP32, PTQ, QAT, TEACHER
from export.onnx_file.targets import CPU
from export.proof.audit import in_float
from export.tasks import TASKS
from export.tasks.task import Metric

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
    "max_size_ratio": "Size, as a fraction of the teacher's",
    "max_macs_ratio": "MACs, as a fraction of the teacher's",
    "max_latency_ms": "Median latency",
}
RATIOS = (  # stage metrics in the headline; a bench leaves the last alone
    ("Parameters", "params_m", "M", "fewer"),
    ("Size", "size_mb", "MB", "smaller"),
    ("MACs", "macs_m", "M", "fewer"),
)


def metric(report: Report) -> Metric:
    """Return the metric of the report's scores."""
    return TASKS[report["recipe"]["task"]].metric


def metric_title(report: Report) -> str:
    """Return the metric's title in the case of a heading."""
    return heading(report["metric"]["title"])


def score_text(report: Report) -> Callable[[float | None], str]:
    """Return how this report's scores are written: with as many decimals as its number of validation images gives a meaning."""
    return partial(percent, decimals=decimals(report))


def counted(report: Report) -> str:
    """Return what class scores count: images, pixels or objects."""
    return report["classes"].get("counted", "images") if report["classes"] else "images"


def headline(report: Report) -> ReportTable:
    """Return the deployed file's numbers beside the teacher's; without a bench stage, the stages' metrics."""
    provider, name, rows = headline_provider(report), audited_name(report), list[tuple[str, str, str, str]]()
    teacher, student = (headline_row(report, one, provider) for one in (TEACHER, deployed_name(report)))
    elsewhere = served_elsewhere(report)
    student = elsewhere or student
    if name and report["audit"] and (layers := mostly_float(report, name)):
        share = percent(in_float(report["audit"][name]), 0)
        rows.append(("Not INT8", layers, "", f"{share} of the multiply-accumulates"))
    where, before, after = "PyTorch", *first_and_last(report, "score")
    ratios = [(title, *first_and_last(report, key), unit, better) for title, key, unit, better in RATIOS]
    if teacher and student:
        served = report["recommendation"] and report["recommendation"]["file"]
        where = "ONNX Runtime" if served in (None, student["name"]) else f"ONNX Runtime, {student['name']}"
        where += f" in {runs_in(student)}" if elsewhere else ""
        before, after = teacher["score"], student["score"]
        ratios = [("Size", teacher["size_mb"], student["size_mb"], "MB", "smaller"), ratios[-1]]
    if before is not None and after is not None:
        was, now = map(score_text(report), (before, after))
        rows.append((metric_title(report), now, f"from {was}", f"{points(after - before)}, {where}"))
    for title, old, new, unit, better in ratios:
        if old and new:
            note = f"{percent(new / old, 0)}, {old / new:.1f}× {better}"
            rows.append((title, significant(new, unit), f"from {significant(old, unit)}", note))
    if teacher and student:
        old_ms, new_ms = (significant(row["p50_ms"], "ms") for row in (teacher, student))
        rows.append(("Latency", new_ms, f"from {old_ms}", conditions(student)))
        if student["speedup"]:
            note = f"95 % interval {interval(student['speedup']['ci95'])}"
            rows.append(("Speed-up", times(student["speedup"]["ratio"]), "over the teacher", note))
    return ReportTable("", ("",) * 4, rows, text=(0, 2, 3))


def targets(report: Report) -> ReportTable:
    """Return every target that the recipe sets, with what was measured."""
    measured = measure(report)
    rows = [
        (
            mark(is_met(target, wanted, measured[target].value)),
            TARGET_TITLES.get(target) or f"Drop of {target.removeprefix(METRIC_DROP)}",
            show(target, measured[target].value),
            f"{limit(target)} {show(target, wanted)}",
            measured[target].conditions,
            target,
        )
        for target, wanted in report["targets"].items()
        if wanted is not None
    ]
    return ReportTable("Targets", ("", "Target", "Measured", "Wanted", "", ""), rows, text=(0, 1, 4, 5))


def verdict_text(report: Report) -> str:
    """Return the verdict in a few words."""
    rows, over, wrong = targets(report).rows, len(report["limits"]), len(mismatches(report))
    missed = sum(row[0] == mark(False) for row in rows)
    parts = [f"{file} predicts at chance" for file in guesses(report)]
    if parts and rows and TEACHER in guesses(report):
        parts.insert(0, "nothing to judge")
    if missed or not parts or not rows:
        judged = "all targets met" if rows else "no targets set"
        if len(report["stages"]) < len(report["recipe"]["stages"]):
            judged = f"stopped after {report['stages'][-1]['stage']}, so the targets were not judged"
        parts += [f"{missed} of {len(rows)} targets missed" if missed else judged]
    parts += [f"{over} export {'limit' if over == 1 else 'limits'} exceeded"] if over else []
    parts += [f"{wrong} {'file does' if wrong == 1 else 'files do'} not score as measured"] if wrong else []
    return ", ".join(parts)


def saturations(report: Report) -> Iterator[str]:
    """Yield a sentence for each file in which layers saturate on the machine that verified it."""
    for name, row in (report["verify"] or {}).items():
        worst = sorted(row["saturation"], key=lambda layer: -layer["max_lsb"])
        layers = ", ".join(f"{layer['layer']} (up to {layer['max_lsb']:,} LSB)" for layer in worst)
        if worst:
            yield f"SATURATION in {name}: 16-bit sums saturate on this machine, so the file predicts wrongly here: {layers}."


def run_title(report: Report) -> str:
    """Return the run's name, and its student's where there are several."""
    return " · ".join(filter(None, (report["recipe"]["name"], report.get("student"))))


def network(report: Report) -> str:
    """Return the network that was compressed, or else its teachers."""
    recipe = report["recipe"]
    arch: str = recipe["model"]["arch"] if recipe["model"] else ", ".join(one["network"] for one in recipe["teacher"])
    return arch


def title(name: str) -> str:
    """Return a file's title; for a further target that is, for example, Student INT8 (PTQ), tensorrt."""
    own = next((own for own in (PTQ, QAT) if name.startswith(f"{own}_")), None)
    return f"{TITLES[own]}, {name.removeprefix(f'{own}_')}" if own else TITLES.get(name, name)


def colour(name: str) -> str:
    """Return a file's colour as CSS; an unknown name never gets into the style."""
    known = next((known for known in TITLES if name == known or name.startswith(f"{known}_")), None)
    return f"var(--{known})" if known else "var(--muted)"


def order(name: str) -> tuple[int, str]:
    """Return a file's sort key in tables; files for further targets come last."""
    return (list(TITLES).index(name) if name in TITLES else len(TITLES), name)


def conditions(row: DeployedRow) -> str:
    """Return a timing's conditions, such as CPU · 1 thread · batch 1 · 224 px."""
    place = runs_in(row)
    threads = {0: "all threads", 1: "1 thread"}.get(row["threads"], f"{row['threads']} threads")
    parts = [
        str(place),
        threads if place.provider.device == "cpu" else None,
        f"batch {row['batch']}",
        f"{said(row['image_size'])} px",
    ]
    return " · ".join(part for part in parts if part)


def ordered(rows: Iterable[DeployedRow]) -> list[DeployedRow]:
    """Return the rows grouped by conditions, with files in their usual order."""

    def place(row: DeployedRow) -> tuple[Any, ...]:
        size, threads = row["image_size"], row["threads"] or math.inf
        provider, arithmetic = row["provider"], runs_in(row).arithmetic
        where = (provider != CPU, provider, arithmetic != "f32")
        return (*where, -area(size), size_of(size), row["batch"], threads, order(row["name"]))

    return sorted(rows, key=place)


def headline_rows(report: Report) -> list[list[DeployedRow]]:
    """Return the files' rows under each provider's and arithmetic's headline conditions, the headline's own provider first."""
    own, timed = headline_provider(report), report["deployed"]
    names = sorted({row["name"] for row in timed}, key=order)
    places = sorted(
        {(row["provider"], runs_in(row).arithmetic) for row in timed},
        key=lambda place: (place[0] != own, place[0], place[1] != "f32"),
    )
    rows = [[row for name in names if (row := headline_row(report, name, *place))] for place in places]
    return [group for group in rows if group]


def compared_rows(report: Report) -> list[list[DeployedRow]]:
    """Return `headline_rows` with those of all providers on one device together: they were timed in turns."""
    found: dict[str, list[DeployedRow]] = {}
    for rows in headline_rows(report):
        found.setdefault(runs_in(rows[0]).provider.device, []).extend(rows)
    return list(found.values())


def decimals(report: Report) -> int:
    """Return how many decimals of a percentage are meaningful for the number of validation images."""
    images = max((row["images"] for row in report["deployed"]), default=0)
    return 1 if 0 < images < 1000 else 2
