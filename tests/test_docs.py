"""The documentation says what each page is, fits a reader's screen, and names what is there."""

import re
from pathlib import Path

import pytest
import test_layers

ROOT = test_layers.ROOT
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
KINDS = ("Tutorial", "How-to", "Reference", "Explanation")
WIDTH, COLUMNS = 100, 7
ROUGH = ("decisions.md",)
ANCHOR = re.compile(r"[^\w\- ]")
WAY = re.compile(r"((?:compress|export)/[\w/]+\.py) +(\w[\w., ]*)$")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_lines(path: Path) -> list[str]:
    """Return a page's lines without its blocks of code."""
    return "".join(path.read_text(encoding="utf-8").split("```")[::2]).splitlines()


def anchors(path: Path) -> set[str]:
    """Return what GitHub makes of a page's headings."""
    titles = (line.lstrip("#").strip().lower() for line in text_lines(path) if line.startswith("#"))
    return {ANCHOR.sub("", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_a_page_says_what_kind_it_is(path: Path) -> None:
    first = text_lines(path)[2]
    assert first.startswith(tuple(f"{kind}{end}" for kind in KINDS for end in (":", ","))), first


@pytest.mark.parametrize("path", [page for page in PAGES if page.name not in ROUGH], ids=named)
def test_prose_is_at_most_a_hundred_characters_wide(path: Path) -> None:
    written = "\n".join(text_lines(path)).partition("\n### Recipe\n")[0]  # what follows is generated
    prose = [line for line in written.splitlines() if not line.startswith(("|", "    ", "![", "#"))]
    assert [line for line in prose if len(line) > WIDTH] == []


@pytest.mark.parametrize("path", [*PAGES, ROOT / "recipes/README.md"], ids=named)
def test_tables_have_at_most_seven_columns(path: Path) -> None:
    rows = [line.replace(r"\|", "") for line in text_lines(path) if line.startswith("|")]
    assert [row for row in rows if row.count("|") - 1 > COLUMNS] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", "\n".join(text_lines(path)))
    assert [file for file, _ in targets if not (path.parent / file).exists()] == []
    pages = [((path.parent / file if file else path), anchor) for file, anchor in targets if anchor]
    assert [(named(page), anchor) for page, anchor in pages if anchor not in anchors(page)] == []


def test_the_rows_of_design_are_those_that_hold() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", text, re.MULTILINE)
    written = {
        int(row): {room.removeprefix("compress.") for room in re.findall(r"`(\w+)`", rooms)} for row, rooms in rows
    }
    assert written == {
        row: {room.removeprefix("compress.") for room in rooms} for row, rooms in enumerate(test_layers.ROWS)
    }


def test_the_drawing_of_the_rooms_holds_each_in_its_row() -> None:
    drawing = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("```")[1]
    drawn = {int(line[1]): line for line in drawing.splitlines() if re.match(r" \d ", line) and "export/" not in line}
    missing = [
        (row, room)
        for row, rooms in enumerate(test_layers.ROWS)
        for room in rooms
        if room != "export" and not re.search(rf"\b{room.removeprefix('compress.')}\b", drawn[row])
    ]
    assert missing == []


def test_the_files_and_functions_of_a_weights_way_are_there() -> None:
    lines = (ROOT / "docs/design.md").read_text(encoding="utf-8").splitlines()
    steps = [(file, name) for line in lines for file, names in WAY.findall(line) for name in names.split(", ")]
    assert len(steps) > 20
    gone = [
        (file, name)
        for file, name in steps
        if not re.search(
            rf"^\s*(def |class )?{name.rpartition('.')[2]}\b[(:= ]", (ROOT / file).read_text(), re.MULTILINE
        )
    ]
    assert gone == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_the_files_that_a_page_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    files = re.findall(r"`((?:compress|docs|export|recipes|tests|tools)/[\w/]+\.\w+)`", text)
    files += [
        f"{module.replace('.', '/')}.py" for module in re.findall(r"^from (export[\w.]+) import", text, re.MULTILINE)
    ]
    assert [file for file in files if not (ROOT / file).exists()] == []
