"""What decides stands on one screen of 80 columns and 40 lines, however much there is to say."""

from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from reports import CPU, CUDA, FILES, build_int8, build_report, build_student, compared, shown
from rich.console import Console
from test_report import ALL_TARGETS, VARIANTS

from compress.report.comparison.show import print_comparison
from compress.report.page.screen import show
from compress.report.page.table import ReportTable
from compress.report.page.terminal import print_verdict
from compress.report.shape import Report

LONG = "student_int8: a sentence that says at length what a reader should know of layer1.0.downsample.0 before it is served, "


def height(text: str) -> int:
    """Return how many lines of a terminal of 80 columns a text takes."""
    return sum(max(1, -(-len(line.rstrip()) // 80)) for line in text.splitlines())


@pytest.mark.parametrize("warnings", [0, 2, 30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_report_fits_one_screen(tmp_path: Path, variant: str, warnings: int) -> None:
    report = build_report(tmp_path, targets={"max_drop": 0.001, "min_speedup": 50}, **VARIANTS[variant])
    report["warnings"] += [f"{index}: {LONG}" for index in range(warnings)]
    text = shown(report)
    assert height(text) <= 40
    assert report["recipe"]["name"] in text
    assert report["verdict"].upper() in text
    assert text.splitlines()[-1] == "runs/a/report/index.html"
    hidden = warnings and warnings - text.count(LONG)
    assert (f"{hidden} more on the page" in text) == bool(hidden)


def test_the_fullest_report_shows_headline_files_every_failure_and_where_the_rest_is(tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "int8": build_int8() | {"limits": {"student_int8": [f"{LONG}{LONG}"]}},
        "providers": (CPU, CUDA),
    }
    files = (*FILES, "student_int8_tensorrt", "student_ptq_int8_cpu_arm")
    targets = {name: 100.0 if name.startswith("min_") else 0.001 for name in ALL_TARGETS}
    report = build_report(tmp_path, targets=targets, **whole, files=files, warnings=(f"first {LONG}", LONG, LONG))
    text = shown(report)
    assert height(text) <= 40
    assert all(failure in text for failure in report["failures"][: len(targets)])
    assert "4 more on the page and with -v" in text
    assert all(name in text for name in FILES)
    assert height(shown(report, verbose=True)) > 100
    assert shown(report, verbose=True).count(LONG) == 5


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_several_students_share_one_screen(tmp_path: Path, count: int) -> None:
    names = [f"student_{index}" for index in range(count)]
    reports = [
        build_student(tmp_path, name, scale=1 / (2 + index), targets={"max_drop": 0.001})
        for index, name in enumerate(names)
    ]
    for report in reports:
        report["environment"] = report["environment"] | {"cpu": report["recipe"]["name"]}
    text = together(reports)
    assert height(text) <= 40
    assert text.splitlines()[-1] == "runs/many/report/index.html"
    for report in reports:
        assert f"{report['recipe']['name']}: FAIL 1 of 1 targets missed" in text
    if count < 6:
        assert text.count(f"✗ {reports[0]['failures'][0]}") == count
    assert "Most accurate" not in text  # they are equal
    assert "Smallest" in text


def together(reports: list[Report]) -> str:
    """Return what a run of several students prints."""
    screen = Console(file=StringIO(), width=80)
    ends: list[Callable[[Console, int], None]] = [
        *(partial(print_verdict, report, name=report["recipe"]["name"]) for report in reports),
        lambda console, _: console.print("runs/many/report/index.html"),
    ]
    print_comparison(compared(*reports), screen, ends=ends)
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def test_columns_that_find_no_room_come_below_under_the_rows_names() -> None:
    table = ReportTable(
        "", ("Name", *("abcdefgh"[index] * 20 for index in range(8))), [("row", *map(str, range(8)))] * 2
    )
    screen = Console(file=StringIO(), width=40)
    show(screen, table._replace(rows=[("row", *(str(index) * 15 for index in range(8)))]))
    assert isinstance(screen.file, StringIO)
    lines = screen.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert [line.split()[0] for line in lines if line.startswith("row")] == ["row"] * 4
    assert all(str(index) * 15 in screen.file.getvalue() for index in range(8))


@pytest.mark.parametrize("width", [1, 8, 20, 30, 80])
def test_nothing_is_lost_however_narrow_the_terminal(width: int) -> None:
    cells = ("student_ptq_int8", "12.345678 ms", "1,234,567 images")
    screen = Console(file=StringIO(), width=width)
    show(screen, ReportTable("", ("File", "p50", "a long heading"), [cells]))
    assert isinstance(screen.file, StringIO)
    assert all(cell in screen.file.getvalue() for cell in cells)
