"""Compare the runs and bundles in some folders: in the terminal, and in files where they are asked for."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from compress.artifact import write_json
from compress.report.comparison.compare import compare
from compress.report.comparison.html import link_to, render_comparison
from compress.report.comparison.read import page_of, read_subjects
from compress.report.comparison.terminal import print_comparison
from compress.report.screen import screen


def compare_folders(folders: Sequence[Path], *, page: Path | None, document: Path | None) -> None:
    """Write the comparison as a page, which links to each run's own, and as JSON; then print it."""
    subjects = read_subjects(folders)
    if page:
        own = dict(zip(subjects, map(page_of, folders), strict=True))
        subjects = {
            name: replace(subject, link=link_to(target, page) if (target := own[name]) else None)
            for name, subject in subjects.items()
        }
    comparison = compare(subjects)
    if page:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render_comparison(comparison), encoding="utf-8")
    if document:
        document.parent.mkdir(parents=True, exist_ok=True)
        write_json(document, asdict(comparison))
    print_comparison(comparison, screen())
