"""The report in the terminal: the essentials on one screen of 80 columns and 40 lines, everything with -v."""

from pathlib import Path

from rich.console import Console

from compress.report.page import summary
from compress.report.page.screen import print_screen, say, show
from compress.report.page.table import mark
from compress.report.page.tables import files, sections, stages
from compress.report.shape import Report

STYLES = {"pass": "bold green", "fail": "bold red", "partial": "bold"}


def print_report(report: Report, console: Console, *, verbose: bool = False, page: Path | None = None) -> None:
    """Print the headline, the files under its conditions (or the stages if none was timed), warnings, verdict and the page's path; every table if verbose."""

    def start(console: Console) -> None:
        subject = f"  {summary.network(report)} on {report['recipe']['data']['dataset']}\n"
        say(console, subject, "bold", f"\n{summary.run_title(report)}")
        if report["recommendation"]:
            console.print(f"{report['recommendation']['sentence']}\n", markup=False, highlight=False)
        show(console, summary.headline(report))
        if not verbose:
            timed = summary.compared_rows(report)
            show(console, files(report, timed[0]) if timed else stages(report))
            return
        for section in sections(report):
            for table in {table.title: table for table in (*section.tables, *section.folded)}.values():
                show(console, table)
            for sentence in section.after:
                console.print(f"\n{sentence}", markup=False, highlight=False)

    def end(console: Console, notes: int) -> None:
        print_verdict(report, console, notes)
        if page:
            say(console, f"\n{page}")

    warnings = [*summary.saturations(report), *report["warnings"]]
    print_screen(console, start, warnings, [end], verbose=verbose, failures=len(report["failures"]))


def print_verdict(report: Report, console: Console, notes: int, *, name: str = "") -> None:
    """Print the verdict, at most `notes` failures, and the targets that are met."""
    first = f"\n{name}{': ' if name else ''}{report['verdict'].upper()} "
    say(console, summary.verdict_text(report), STYLES[report["verdict"]], first)
    for failure in report["failures"][:notes]:
        say(console, failure, "red", "✗ ")
    for sign, _, measured, wanted, _, target in summary.targets(report).rows:
        if sign == mark(True):
            say(console, f" {target}: wanted {wanted}, measured {measured}", "green", sign)
