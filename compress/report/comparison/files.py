"""Compare the runs and bundles in some folders: in the terminal, and optionally as a page and as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from compress.report.comparison.compare import compare
from compress.report.comparison.read import page_of, read_subjects
from compress.report.comparison.show import link_to, print_comparison, render_comparison
from compress.report.page.screen import screen
from export.command.files import write_json, write_text


def compare_folders(
    folders: Sequence[Path],
    *,
    page: Path | None,
    document: Path | None,
    verbose: bool,
    ends: Sequence[Callable[[Console, int], None]] = (),
) -> None:
    """Write the comparison as a page, which links to each run's own, and as JSON; print it, and call `ends`."""
    subjects = read_subjects(folders)
    if page:
        for (name, subject), folder in zip(list(subjects.items()), folders, strict=True):
            if own := page_of(folder):
                subjects[name] = replace(subject, link=link_to(own, page))
    comparison = compare(subjects)
    if page:
        write_text(page, render_comparison(comparison))
    if document:
        document.parent.mkdir(parents=True, exist_ok=True)
        write_json(document, asdict(comparison))
    print_comparison(comparison, screen(), verbose=verbose, ends=ends)
