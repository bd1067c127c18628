"""The INT8 tables of the terminal: without training, against its reference, as the optimizer left it."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from compress.report import int8, proof, summary
from compress.report.numbers import heading
from compress.report.shape import Report

BAR_WIDTH = 16
FEW_GROUPS = 5
MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}


def without_training(report: Report, *, gap: int, verbose: bool) -> Iterator[Table | Text]:
    """Yield each target's methods, trials and most sensitive layers."""
    metric = heading(report["metric"]["title"])
    for section in int8.sections(report, summary.decimals(report)):
        where = f"{section.target} · {section.images:,} images"
        yield _methods(section, metric, where, gap)
        for line in section.methods:
            if line.note:
                yield Text(f"  {line.engine}, {line.method}: {line.note}", style="dim")
        if section.trials:
            yield _trials(section, metric, gap)
        if section.groups:
            yield _groups(section, gap, section.groups if verbose else section.groups[:FEW_GROUPS])


def proofs(report: Report, *, gap: int, verbose: bool) -> Iterator[Table | Text]:
    """Yield each file's parity and audit; saturation is loud, what is in float is named for the first file, or all of them."""
    for parity in proof.parities(report):
        yield _facts(f"{parity.name} against its reference", parity.facts, gap)
        if parity.alarm:
            yield Text.assemble(("SATURATION ", "bold red"), parity.alarm)
    graphs = proof.graphs(report)
    if graphs:
        yield _graphs(graphs, gap)
    for graph in graphs if verbose else graphs[:1]:
        for fact in graph.facts:
            if fact.met is not None:
                yield Text.assemble(MARKS[fact.met], f" {graph.name}: {fact.title} {fact.value}, {fact.note}")
        for named in graph.lists:
            names = ", ".join(f"{name} ({reason})" if reason else name for name, reason in named.names)
            yield Text(f"  {graph.name}: {named.title[0].lower()}{named.title[1:]}: {names}", style="dim")


def _methods(section: int8.Section, metric: str, where: str, gap: int) -> Table:
    columns = ("Engine", "Method", "Scored in", metric, "Agree", "Int", "Float")
    table = _table(f"INT8 without training · {where}", columns, gap=gap, left=3)
    for line in section.methods:
        cells = (line.engine, line.method, line.scored_in, line.score, line.agreement)
        table.add_row(
            *map(Text, (*cells, line.integer_layers, line.float_layers)), style="bold" if line.is_trained else ""
        )
    return table


def _trials(section: int8.Section, metric: str, gap: int) -> Table:
    columns = ("Trial", "Calibration", "Result", "KL", metric, "Drop", "In float", "vs FP32")
    table = _table(f"Tuning · {section.target} · by {section.judged}", columns, gap=gap, left=3)
    for trial in section.trials:
        result = ("met" if trial.met else "missed") + (", chosen" if trial.chosen else "")
        floats = f"{len(trial.keep_float)}"
        cells = (
            trial.number_format,
            trial.calibration,
            result,
            trial.kl,
            trial.score,
            trial.drop,
            floats,
            trial.speedup,
        )
        table.add_row(*map(Text, cells), style="bold" if trial.chosen else "")
    return table


def _groups(section: int8.Section, gap: int, groups: list[int8.GroupBar]) -> Table:
    table = _table(f"Most sensitive layers · {section.target}", ("Layer", "", "KL", "Points lost"), gap=gap, left=2)
    for group in groups:
        bar = "█" * max(1, round(group.share / 100 * BAR_WIDTH))
        table.add_row(*map(Text, (group.group, bar, group.kl, group.lost)))
    return table


def _graphs(graphs: list[proof.Graph], gap: int) -> Table:
    columns = ("Once optimized", "Int", "Float", "MACs", "Q/DQ", "Biases", "FP32", "Copies")
    table = _table(f"What runs in integers · {graphs[0].provider}", columns, gap=gap, left=1)
    for graph in graphs:
        table.add_row(*map(Text, (graph.name, *(fact.value for fact in graph.facts))))
    return table


def _facts(title: str, facts: list[proof.Fact], gap: int) -> Table:
    table = _table(title, ("", "", "", ""), gap=gap, left=4)
    table.show_header = False
    for fact in facts:
        table.add_row(
            Text(*MARKS[fact.met]), Text(fact.title), Text(fact.value, style="bold"), Text(fact.note, style="dim")
        )
    return table


def _table(title: str, columns: tuple[str, ...], *, gap: int, left: int) -> Table:
    """Return an empty table; the first `left` columns are text and fold where they are long."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    table.title, table.title_justify, table.title_style = Text(f"\n{title}", "bold"), "left", ""
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table
