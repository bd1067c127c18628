"""What page and terminal share: headline, targets, verdict, the conditions of a timing."""

from collections.abc import Iterable, Iterator

from compress.report.judge.parity import mismatches
from compress.report.judge.verdict import (
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
    show,
)
from compress.report.numbers import heading, percent, points, significant, times
from compress.report.page.table import Table, mark
from compress.report.shape import DeployedRow, Report
from export.images.size import area, said, size_of
from export.onnx_file.roles import FP16, FP32, PTQ, QAT, TEACHER
from export.onnx_file.targets import CPU, provider_title
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


def metric(report: Report) -> Metric:
    """Return the metric of the report's scores."""
    return TASKS[report["recipe"]["task"]].metric


def counted(report: Report) -> str:
    """Return what class scores count: images, pixels or objects."""
    return report["classes"].get("counted", "images") if report["classes"] else "images"


def headline(report: Report) -> Table:
    """Return the deployed file's numbers beside the teacher's; without a bench stage, the stages' metrics."""
    provider = headline_provider(report)
    teacher, student = (headline_row(report, name, provider) for name in (TEACHER, deployed_name(report)))
    timed = student if teacher else None
    ratios = [("MACs", "macs_m", "M", "fewer")]
    rows: list[tuple[str, str, str, str]] = []
    name = audited_name(report)
    if name and report["audit"] and (said := mostly_float(report, name)):
        share = percent(in_float(report["audit"][name]), 0)
        rows.append(("Not INT8", said, "", f"{share} of the multiply-accumulates"))
    if teacher and timed:
        served = report["recommendation"] and report["recommendation"]["file"]
        where = "ONNX Runtime" if served in (None, timed["name"]) else f"ONNX Runtime, {timed['name']}"
        rows += _score(report, teacher["score"], timed["score"], where)
        rows += _ratio("Size", teacher["size_mb"], timed["size_mb"], "MB", "smaller")
    else:
        rows += _score(report, *first_and_last(report, "score"), "PyTorch")
        ratios = [("Parameters", "params_m", "M", "fewer"), ("Size", "size_mb", "MB", "smaller"), *ratios]
    for title, metric, unit, better in ratios:
        rows += _ratio(title, *first_and_last(report, metric), unit, better)
    if teacher and timed:
        before, after = (significant(row["p50_ms"], "ms") for row in (teacher, timed))
        rows.append(("Latency", after, f"from {before}", conditions(timed)))
        if timed["speedup"]:
            note = "95 % interval {:.2f}–{:.2f}".format(*timed["speedup"]["ci95"])
            rows.append(("Speed-up", times(timed["speedup"]["ratio"]), "over the teacher", note))
    return Table("", ("",) * 4, rows, text=(0, 2, 3))


def _score(
    report: Report, before: float | None, after: float | None, where: str
) -> Iterator[tuple[str, str, str, str]]:
    if before is not None and after is not None:
        was, now = (percent(score, decimals(report)) for score in (before, after))
        yield heading(report["metric"]["title"]), now, f"from {was}", f"{points(after - before)}, {where}"


def _ratio(
    title: str, before: float | None, after: float | None, unit: str, better: str
) -> Iterator[tuple[str, str, str, str]]:
    if before and after:
        note = f"{percent(after / before, 0)}, {before / after:.1f}× {better}"
        yield title, significant(after, unit), f"from {significant(before, unit)}", note


def targets(report: Report) -> Table:
    """Return every target that the recipe sets, with what was measured."""
    measured = measure(report)
    rows = [
        (
            mark(is_met(target, wanted, measured[target].value)),
            TARGET_TITLES[target],
            show(target, measured[target].value),
            f"{limit(target)} {show(target, wanted)}",
            measured[target].conditions,
            target,
        )
        for target, wanted in report["targets"].items()
        if wanted is not None
    ]
    return Table("Targets", ("", "Target", "Measured", "Wanted", "", ""), rows, text=(0, 1, 4, 5))


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
        if worst:
            layers = ", ".join(f"{layer['layer']} (up to {layer['max_lsb']:,} LSB)" for layer in worst)
            yield (
                f"SATURATION in {name}: 16-bit sums saturate on this machine, so the file predicts wrongly here: {layers}."
            )


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
    provider = provider_title(row["provider"])
    threads = {0: "all threads", 1: "1 thread"}.get(row["threads"], f"{row['threads']} threads")
    parts = [provider, threads if provider == "CPU" else None, f"batch {row['batch']}", f"{said(row['image_size'])} px"]
    return " · ".join(part for part in parts if part)


def ordered(rows: Iterable[DeployedRow]) -> list[DeployedRow]:
    """Return the rows grouped by conditions, with files in their usual order."""
    return sorted(
        rows,
        key=lambda row: (
            row["provider"] != CPU,
            row["provider"],
            -area(row["image_size"]),
            size_of(row["image_size"]),
            row["batch"],
            row["threads"] or float("inf"),
            order(row["name"]),
        ),
    )


def headline_rows(report: Report) -> list[list[DeployedRow]]:
    """Return the files' rows under each provider's headline conditions, the headline's own provider first."""
    own = headline_provider(report)
    providers = sorted(
        {row["provider"] for row in report["deployed"]}, key=lambda provider: (provider != own, provider)
    )
    names = sorted({row["name"] for row in report["deployed"]}, key=order)
    rows = [[row for name in names if (row := headline_row(report, name, provider))] for provider in providers]
    return [group for group in rows if group]


def decimals(report: Report) -> int:
    """Return how many decimals of a percentage are meaningful for the number of validation images."""
    images = max((row["images"] for row in report["deployed"]), default=0)
    return 1 if 0 < images < 1000 else 2
