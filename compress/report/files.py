"""Write a finished run's files beside its stages: recipe, report, page and bundle."""

import json
import sys
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path

from compress.artifact import read_meta, students_of
from compress.errors import ArtifactError
from compress.recipe.read import write_recipe
from compress.recipe.schema import Recipe
from compress.report.shape import REPORT_VERSION, Report
from export.command.files import write_json, write_text
from export.names import BUNDLE, COMPARISON_JSON, MANIFEST, PAGE, RECIPE_YAML, REPORT_JSON


def run_root(recipe: Recipe) -> Path:
    """Return the folder of a recipe's run."""
    return Path(recipe.out) / recipe.name


def report_root(recipe: Recipe, student: str) -> Path:
    """Return the folder of a student's report and bundle; without students it is the run's own."""
    return run_root(recipe) / "students" / student if student else run_root(recipe)


def report_run(
    recipe: Recipe, artifacts: Mapping[str, Sequence[Path]], made: Set[Path], *, command: str, verbose: bool
) -> int:
    """Write the report and the bundle of every chain's `artifacts`, print the tables, and return the exit code.

    `made` are the artifacts that this run made. A run of only some stages does not replace the report of a run with more.
    """
    from compress.report.collect import collect
    from compress.report.page.screen import screen
    from compress.report.page.terminal import print_report

    chains, root = recipe.chains(), run_root(recipe)
    is_kept = any(_is_part(chains[name], paths, report_root(recipe, name)) for name, paths in artifacts.items())
    if not is_kept:  # only now: a refused run must not replace the last report's recipe
        write_recipe(recipe, root / RECIPE_YAML)
    reports = {}
    for student, chain in chains.items():
        place = report_root(recipe, student)
        report = collect(chain, artifacts[student], root=place, made=made, command=command, student=student)
        reports[student] = report
        if not is_kept:
            _write(chain, artifacts[student], report, place)
        if verbose or is_kept or len(chains) == 1:
            print_report(report, screen(), verbose=verbose, page=None if is_kept else place / PAGE)
    if is_kept:
        sys.stderr.write(f"{root}: its report and bundle come from a run with more stages and were not replaced\n")
    elif len(chains) > 1:
        _compare(recipe, reports, verbose=verbose)
    return max(1 if report["verdict"] == "fail" else 0 for report in reports.values())


def print_again(root: Path, *, verbose: bool) -> None:
    """Render the page of a finished run again from its files, and print the report."""
    from compress.report.page.screen import screen
    from compress.report.page.terminal import print_report

    print_report(render_report(root), screen(), verbose=verbose, page=root / PAGE)


def render_report(root: Path) -> Report:
    """Write a finished run's HTML page from its files, and return its report."""
    from compress.report.page.html import render

    if (root / MANIFEST).exists():
        raise ArtifactError(f"{root}: is a bundle, whose files never change; give the folder of its run")
    try:
        report: Report = json.loads((root / REPORT_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            students_of(root, REPORT_JSON) or f"{root}: has no readable report.json ({error}); run the recipe first"
        ) from error
    if report.get("schema_version") != REPORT_VERSION:
        raise ArtifactError(
            f"{root}: its report.json is of another version; run the recipe again, finished stages are reused"
        )
    write_text(root / PAGE, render(report, root))
    return report


def _is_part(chain: Recipe, artifacts: Sequence[Path], root: Path) -> bool:
    """Tell whether these are fewer stages than the chain has and than the report in `root` covers."""
    try:
        reported = len(json.loads((root / REPORT_JSON).read_text(encoding="utf-8"))["stages"])
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return len(artifacts) < min(len(chain.stages), reported)


def _write(chain: Recipe, artifacts: Sequence[Path], report: Report, root: Path) -> None:
    """Write a chain's report.json, HTML page and bundle to `root`."""
    from compress.report.bundling import contents
    from export.bundle.write import write_bundle

    root.mkdir(parents=True, exist_ok=True)
    write_json(root / REPORT_JSON, report)
    render_report(root)
    exported = [path for path in artifacts if read_meta(path).stage == "export"]
    if exported:
        # A student's bundle has a name of its own.
        name = chain.name if root == run_root(chain) else f"{chain.name}-{root.name}"[:64]
        write_bundle(root / BUNDLE, contents(chain, name, root, exported[-1], report))


def _compare(recipe: Recipe, reports: Mapping[str, Report], *, verbose: bool) -> None:
    """Write the page that compares the recipe's students, and print it with their verdicts."""
    from compress.report.comparison.show import compare_folders
    from compress.report.page.screen import say
    from compress.report.page.terminal import print_verdict

    page = run_root(recipe) / PAGE
    compare_folders(
        [report_root(recipe, student) for student in reports],
        page=page,
        document=run_root(recipe) / COMPARISON_JSON,
        verbose=verbose,
        ends=[
            *(partial(print_verdict, report, name=student) for student, report in reports.items()),
            lambda console, _: say(console, f"\n{page}"),
        ],
    )
