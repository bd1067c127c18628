"""The report as tables in the terminal, readable at 80 columns."""

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.report import gain, numbers, summary, tables, terminal_int8
from compress.report.screen import show
from compress.report.shape import DeployedRow, Report
from export.onnx_file.targets import CPU

FEW_CLASSES = 5


def print_report(report: Report, console: Console, *, verbose: bool = False, page: Path | None = None) -> None:
    """Print headline, stages, deployed files and verdict, and where the page is; every timing where verbose.

    Otherwise the files are shown at batch 1 and, on the CPU, with one thread.
    """
    gap = 2 if console.width >= 100 else 1
    recipe, metric = report["recipe"], numbers.heading(report["metric"]["title"])
    _say(console, f"\n{recipe['name']}", f"  {recipe['model']['arch']} on {recipe['data']['dataset']}\n", style="bold")
    if report["recommendation"]:
        console.print(Text(f"{report['recommendation']['sentence']}\n"))
    show(console, _headline(report))
    show(console, _stages(report, gap=gap))
    shown = [row for row in summary.ordered(report["deployed"]) if verbose or _is_telling(row)]
    for title, rows in groupby(shown, summary.conditions):
        show(console, _files(title, metric, list(rows), digits=summary.decimals(report), gap=gap))
    for drawn in tables.accuracy(report):
        show(console, _drawn(drawn, None, gap=gap))
    for drawn in tables.recalls(report):
        show(console, _drawn(drawn, None if verbose else FEW_CLASSES, gap=gap))
    for renderable in (
        *terminal_int8.without_training(report, gap=gap, verbose=verbose),
        *terminal_int8.proofs(report, gap=gap, verbose=verbose),
    ):
        show(console, renderable)
    for sentence in gain.sentences(report, summary.decimals(report)):
        console.print(Text(f"\n{sentence}"))
    for warning in report["warnings"]:
        _say(console, "\nwarning ", warning, style="yellow")
    _say(console, f"\n{report['verdict'].upper()} ", summary.verdict_text(report), style=_verdict_style(report))
    for failure in report["failures"]:
        _say(console, "✗ ", failure, style="red")
    for target in summary.target_rows(report):
        if target.met:
            _say(console, "✓ ", f"{target.name}: wanted {target.wanted}, measured {target.measured}", style="green")
    if page:
        _say(console, f"\n{page}")


def _headline(report: Report) -> Table:
    table = _grid(gap=2)
    for style, justify in (("", "left"), ("bold", "right"), ("dim", "left"), ("dim", "left")):
        table.add_column(style=style, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for card in summary.headline(report):
        table.add_row(*map(Text, card))
    return table


def _stages(report: Report, *, gap: int) -> Table:
    digits = summary.decimals(report)
    table = _table(
        "Stages",
        "Stage",
        (numbers.heading(report["metric"]["title"]), "Parameters", "MACs", "Size", "Time", ""),
        gap=gap,
    )
    for stage in report["stages"]:
        metrics = stage["metrics"]
        table.add_row(
            Text(stage["stage"]),
            numbers.percent(metrics.get("score"), digits),
            numbers.significant(metrics.get("params_m"), "M"),
            numbers.significant(metrics.get("macs_m"), "M"),
            numbers.significant(metrics.get("size_mb"), "MB"),
            numbers.duration(stage["seconds"]),
            "cached" if stage["cached"] else "",
        )
    return table


def _files(title: str, metric: str, rows: list[DeployedRow], *, digits: int, gap: int) -> Table:
    columns = (metric, "Agree", "MB", "p50 ms", "p99 ms", "vs teacher", "95 %", "vs FP32")
    table = _table(title, "File", columns, gap=gap)
    for row in rows:
        teacher, student = row["speedup"], row["speedup_vs_student_fp32"]
        table.add_row(
            Text(row["name"]),
            numbers.percent(row["score"], digits),
            numbers.percent(row["agreement"], digits),
            numbers.significant(row["size_mb"]),
            numbers.significant(row["p50_ms"]),
            numbers.significant(row["p99_ms"]),
            numbers.times(teacher and teacher["ratio"]),
            "{:.2f}–{:.2f}".format(*teacher["ci95"]) if teacher else "",
            numbers.times(student and student["ratio"]),
        )
    return table


def _drawn(table: tables.Table, few: int | None, *, gap: int) -> Table:
    """Return a table of the report, or only its first few rows."""
    title = f"{table.title} · {few} of {len(table.rows):,}" if few and few < len(table.rows) else table.title
    drawn = _table(title, table.columns[0], table.columns[1:], gap=gap)
    for row in table.rows[:few]:
        drawn.add_row(*map(Text, row))
    return drawn


def _is_telling(row: DeployedRow) -> bool:
    return row["batch"] == 1 and (row["threads"] == 1 or row["provider"] != CPU)


def _verdict_style(report: Report) -> str:
    return {"pass": "bold green", "fail": "bold red", "partial": "bold"}[report["verdict"]]


def _table(title: str, first: str, others: tuple[str, ...], *, gap: int) -> Table:
    table = _grid(gap=gap)
    table.title, table.title_justify, table.title_style, table.show_header = f"\n{title}", "left", "bold", True
    table.header_style = "dim"
    table.add_column(first, overflow="fold", min_width=16)  # long names break, numbers never
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _grid(*, gap: int) -> Table:
    return Table(box=None, show_header=False, padding=(0, gap, 0, 0), pad_edge=False)


def _say(console: Console, first: str, rest: str = "", *, style: str = "") -> None:
    """Print a line whose first words are styled; brackets in it are text, never markup."""
    console.print(Text.assemble((first, style), rest), soft_wrap=True)
