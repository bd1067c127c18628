"""The report as one self-contained page: inline styles and drawings, no scripts, nothing loaded."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from compress.report.judge.parity import mismatches
from compress.report.judge.verdict import deployed_name, guesses
from compress.report.numbers import UNKNOWN
from compress.report.page import drawings, summary
from compress.report.page.pictures import examples
from compress.report.page.series import layer_times, widths
from compress.report.page.table import PageSection, ReportTable
from compress.report.page.tables import sections
from compress.report.shape import Report
from export.tasks import TASKS


class Page(NamedTuple):
    """Content of a page; a cell or heading that is a key of `colours` gets a dot, one of `links` a link.

    Texts are untrusted: the template escapes all but the drawings.
    """

    kind: str
    title: str
    lead: str
    cards: Sequence[Sequence[str]]  # title, value, the value compared with, note
    warnings: Sequence[str]
    sections: Sequence[tuple[PageSection, Sequence[Markup]]]
    colours: Mapping[str, str]
    links: Mapping[str, str] = MappingProxyType({})
    verdict: tuple[str, str] = ("", "")
    serve: str = ""
    targets: Sequence[Sequence[str]] = ()
    command: str = ""
    recipe_yaml: str = ""


def render(report: Report, root: Path) -> str:
    """Return the report's HTML; curves and widths are read from the run's folder `root`."""
    recipe, judged = report["recipe"], deployed_name(report)
    # Leave out files for other targets: their times on this machine would mislead.
    drawn = [[row for row in rows if row["name"] in summary.TITLES] for rows in summary.headline_rows(report)]
    above = {
        "Stage by stage": list(drawings.waterfalls(report)),
        "Deployed files": [drawing for rows in drawn if rows for drawing in drawings.files(rows)],
    }
    wrong = [*summary.saturations(report), *mismatches(report), *report["limits"], *guesses(report).values()]
    environment = ReportTable("", ("", ""), list(_flat(report["environment"])), text=(0, 1))
    return render_page(
        Page(
            kind="compression report",
            title=summary.run_title(report),
            lead=f"{summary.network(report)} on {recipe['data']['dataset']}, from the teacher in FP32 to "
            + (f"{judged}, the file that the targets judge" if judged else "the last stage"),
            cards=summary.headline(report).rows,
            warnings=list(dict.fromkeys([*wrong, *report["warnings"]])),
            sections=[
                *((section, above.get(section.title, ())) for section in sections(report)),
                (
                    PageSection("The worst images" if TASKS[recipe["task"]].worst else "Examples", ()),
                    [drawings.draw("example", images) for images in examples(root, report)],
                ),
                (PageSection("Channel widths", widths(root, report)), ()),
                (PageSection("Where the time goes", layer_times(root, report)), ()),
                (PageSection("Training", ()), list(drawings.curves(root, report))),
                (PageSection("Environment", (environment,)), ()),
            ],
            colours={row["name"]: summary.colour(row["name"]) for row in report["deployed"]},
            verdict=(report["verdict"], summary.verdict_text(report)),
            serve=report["recommendation"]["sentence"] if report["recommendation"] else "",
            targets=summary.targets(report).rows,
            command=report["command"],
            recipe_yaml=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        )
    )


def render_page(page: Page) -> str:
    """Return a page's HTML, without empty sections."""
    shown = [(section, drawn) for section, drawn in page.sections if section.tables or drawn]
    return drawings.template("page.html.j2").render(page=page._replace(sections=shown))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested JSON as (dotted name, text)."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        yield prefix, " ".join(map(str, values)) or UNKNOWN
    else:
        yield prefix, UNKNOWN if values is None or values == {} else str(values)
