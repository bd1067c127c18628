"""`make results`: every row has a recipe and a place, and a finished run's tables take the old ones' place."""

import json
from pathlib import Path

import pytest
import results
from reports import build_report, save_report

from compress.recipe.read import read_recipe
from compress.report.shape import Report

PAGE = "before\n<!-- table: make results, quickstart -->\nold\n<!-- end of table -->\nafter\n<!-- end of table -->\n"
README = f"{results.MAIN_TABLE}\n|---|\n| [detection_int8](x) | 1 |\n| [quickstart](x) | old |\n\nend\n"


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("TABLES", PAGE), ("MAIN", README)):
        monkeypatch.setattr(results, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(results, "RUNS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", results.ROWS)
def test_a_row_has_a_recipe_and_a_place_for_its_table(name: str) -> None:
    row = results.ROWS[name]
    read_recipe(results.ROOT / "recipes" / f"{row.recipe}.yaml", row.settings, data="images" if row.data else None)
    assert row.teacher in ("", *results.ROWS)
    text = results.TABLES.read_text()
    assert results.replaced(text, name, "NEW").count("NEW") == 1
    assert results.replaced(text, name, "NEW").count("<!--") == text.count("<!--")


def test_a_finished_run_takes_the_old_tables_place(pages: Path, tmp_path: Path) -> None:
    save_report(build_report(tmp_path / "built"), results.folder_of("quickstart"))
    results.write("quickstart")
    written = (pages / "TABLES").read_text()
    assert written.startswith("before\n<!-- table: make results, quickstart -->\n")
    assert written.endswith("<!-- end of table -->\nafter\n<!-- end of table -->\n")
    assert "old" not in written
    assert "224 px:" in written
    assert "prune as cut 11.1 %, 61.1 %, " in written
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| `student_int8`")]
    assert {row[0] for row in rows} == {"`student_int8`, the one served"}
    assert len(rows) == written.count(" px:") == 2
    assert {len(row) for row in rows} == {7}
    assert rows[0][4].startswith("22.1, ")
    lines = (pages / "MAIN").read_text().splitlines()
    assert [line.split("(")[0] for line in lines[2:4]] == ["| [detection_int8]", "| [quickstart]"]
    assert "old" not in lines[3]
    results.write("quickstart")
    assert (pages / "TABLES").read_text() == written


def test_students_stand_in_one_table(pages: Path, tmp_path: Path) -> None:
    for name in ("half", "fifth"):
        report: Report = json.loads(json.dumps(build_report(tmp_path / name))) | {"student": name}
        report["recipe"]["data"]["image_size"] = 224
        save_report(report, results.folder_of("quickstart") / "students" / name)
    results.write("quickstart")
    written = (pages / "TABLES").read_text()
    assert written.count("`teacher_fp32`") == 1
    assert written.count("`half` `student_int8`") == written.count("`fifth` `student_int8`") == 1


def test_an_unfinished_run_leaves_the_pages(pages: Path) -> None:
    results.write("quickstart")
    assert (pages / "TABLES").read_text() == PAGE
