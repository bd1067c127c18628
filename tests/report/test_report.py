import json
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reports import CPU, CUDA, FILES, build_int8, build_recipe, build_report, build_run, save_report, shown, with_row
from typer.testing import CliRunner

from compress.cli import app
from compress.data.digest import NOTES
from compress.report import numbers
from compress.report.collect import collect
from compress.report.judge.verdict import judge
from compress.report.page import charts
from compress.report.page.html import render

ALL_TARGETS = {
    "max_drop": 0.015,
    "min_speedup": 2.5,
    "min_int8_speedup": 1.6,
    "max_size_ratio": 0.25,
    "max_macs_ratio": 0.5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {"int8": build_int8()},
    "no int8 files": {},
    "further targets": {
        "int8": build_int8(),
        "files": (*FILES, "student_int8_cpu_vnni", "student_ptq_int8_tensorrt"),
    },
    "cuda": {"providers": (CPU, CUDA)},
    "only cuda": {"providers": (CUDA,)},
    "one batch": {"batches": (1,)},
    "no batch of one": {"batches": (8,)},
    "unknown values": {"nulls": True},
    "only the teacher": {"files": ("teacher_fp32",)},
    "no distill": {"stages": ("source", "prune", "ptq", "qat", "export", "bench")},
    "no qat": {"stages": ("source", "prune", "distill", "export", "bench"), "files": tuple(FILES)[:4]},
    "no bench": {"stages": ("source", "prune", "distill", "ptq", "qat", "export"), "int8": build_int8()},
    "only the source": {"stages": ("source",)},
}


class Tags(HTMLParser):
    """Check that tags close in order and gather their names and attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_a_report_has_one_row_for_each_file_provider_threads_batch_and_size(tmp_path: Path) -> None:
    rows = build_report(tmp_path, providers=(CPU, CUDA))["deployed"]
    settings = {(r["name"], r["provider"], r["threads"], r["batch"], r["image_size"]) for r in rows}
    assert len(rows) == len(settings) == 5 * (2 * 2 * 2 + 2 * 2)


def test_a_row_carries_its_own_file_s_accuracy(tmp_path: Path) -> None:
    rows = build_report(tmp_path)["deployed"]
    assert {(row["name"], row["score"]) for row in rows} == {(name, facts[1]) for name, facts in FILES.items()}


def test_a_report_says_which_stages_were_kept(tmp_path: Path) -> None:
    stages = build_report(tmp_path)["stages"]
    assert [stage["stage"] for stage in stages if stage["cached"]] == ["source", "prune"]


def test_a_row_is_what_the_bench_measured(tmp_path: Path) -> None:
    """The same fact from the clock to the page: a timing, with its file's accuracy."""
    report = json.loads(json.dumps(build_report(tmp_path), allow_nan=False))
    bench = json.loads((tmp_path / report["stages"][-1]["directory"] / "bench.json").read_text())
    assert report["deployed"] == [timing | bench["accuracy"][timing["name"]] for timing in bench["timings"]]
    assert len(report["deployed"][0]["block_ms"]) == 10


def test_a_run_without_a_bench_still_says_where_it_ran(tmp_path: Path) -> None:
    report = build_report(tmp_path, ("source", "prune"))
    assert report["deployed"] == []
    assert report["environment"]["python"] == sys.version.split()[0]


def test_the_report_imports_no_torch() -> None:
    program = (
        "import sys, compress.report.collect, compress.report.page.html, compress.report.page.terminal; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_run_that_reaches_every_target_passes(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets=ALL_TARGETS)
    assert (report["verdict"], report["failures"]) == ("pass", [])


def test_a_run_without_targets_passes(tmp_path: Path) -> None:
    assert build_report(tmp_path)["verdict"] == "pass"


@pytest.mark.parametrize(
    ("target", "exact"),
    [
        ("max_drop", 2 / 360),
        ("min_speedup", 91.2 / 22.1),
        ("min_int8_speedup", 42.8 / 22.1),
        ("max_size_ratio", 11.3 / 94.1),
        ("max_macs_ratio", 156.2 / 332.4),
    ],
)
def test_a_target_is_met_exactly_at_its_value_and_missed_just_beyond(tmp_path: Path, target: str, exact: float) -> None:
    report = with_row(
        with_row(build_report(tmp_path), "teacher_fp32", score=354 / 360), "student_int8", score=352 / 360
    )
    beyond = exact * (1 + 1e-6 if target.startswith("min_") else 1 - 1e-6)
    verdicts = [judge(report | {"targets": {target: wanted}})[0] for wanted in (exact, beyond)]
    assert verdicts == ["pass", "fail"]


def test_a_failure_names_target_wanted_measured_and_conditions(tmp_path: Path) -> None:
    failures = build_report(tmp_path, targets={"min_speedup": 5})["failures"]
    assert failures == [
        "min_speedup: wanted at least 5.00×, measured 4.13× "
        "(95 % interval 4.00 to 4.25, student_int8 against teacher_fp32, CPU, 1 thread, batch 1, 224 px)"
    ]


def test_a_speed_target_is_judged_at_the_largest_image(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"min_speedup": 2.5})
    for row in report["deployed"]:
        if row["image_size"] == 32 and row["speedup"]:
            row["speedup"]["ratio"] = 1.0
    assert judge(report)[0] == "pass"


def test_gpu_timings_alone_do_not_reach_a_speed_target(tmp_path: Path) -> None:
    assert build_report(tmp_path, targets={"min_speedup": 0.1}, providers=(CUDA,))["verdict"] == "fail"


@pytest.mark.parametrize(
    ("count", "judged"), [(5, "student_int8"), (4, "student_ptq_int8"), (3, "student_fp32"), (2, "student_fp32")]
)
def test_the_best_trained_int8_file_is_judged(tmp_path: Path, count: int, judged: str) -> None:
    report = build_report(tmp_path, targets={"max_size_ratio": 0.001}, files=tuple(FILES)[:count])
    assert judged in report["failures"][0]


def test_an_fp32_student_has_no_int8_speedup(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"min_int8_speedup": 0.5}, files=("teacher_fp32", "student_fp32"))
    assert "not measured" in report["failures"][0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_is_well_formed_self_contained_and_small(tmp_path: Path, variant: str) -> None:
    wanted = {name: value for name, value in ALL_TARGETS.items() if (name, variant) != ("min_int8_speedup", "no qat")}
    page = render(build_report(tmp_path, targets=wanted, **VARIANTS[variant]), tmp_path)
    tags = parse(page)
    assert (tags.open, tags.links) == ([], [])
    assert not tags.seen & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in page
    assert "@import" not in page
    assert len(page.encode()) < 1_000_000


def test_the_page_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    evil = "</style><script>alert('x')</script>"
    report = build_report(tmp_path, warnings=(evil,))
    report["command"] = report["recipe"]["data"]["path"] = report["environment"]["cpu"] = evil
    assert "<script" not in render(report, tmp_path)


def test_the_page_draws_what_each_stage_changed(tmp_path: Path) -> None:
    page = render(build_report(tmp_path, targets=ALL_TARGETS), tmp_path)
    for text in (
        "−37.22\u00a0points",
        "−53\u00a0%",
        "layer3.0.downsample.0",
        "1,024",
        "epoch 12",
        "all targets met",
    ):
        assert text in page


@pytest.mark.parametrize(("score", "change"), [(0.99, "good"), (0.98, "bad"), (0.98333, ""), (0.983331, "")])
def test_a_stage_that_changes_nothing_is_neither_good_nor_bad(tmp_path: Path, score: float, change: str) -> None:
    report = build_report(tmp_path, ("source", "prune"))
    report["stages"][1]["metrics"]["score"] = score
    before, found = (part.partition('">')[0] for part in render(report, tmp_path).split('<span class="change ')[1:3])
    assert (before, found) == ("", change)


def test_a_students_page_has_a_title_of_its_own(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    assert "<title>resnet50_int8 · compression report</title>" in render(report, tmp_path)
    report["student"] = "half"
    assert "<title>resnet50_int8 · half · compression report</title>" in render(report, tmp_path)
    assert "\nresnet50_int8 · half  torchvision:resnet50" in shown(report)


def test_the_page_says_which_target_was_missed(tmp_path: Path) -> None:
    page = render(build_report(tmp_path, targets={"min_speedup": 5, "max_drop": 0.01}), tmp_path)
    assert "1 of 2 targets missed" in page
    assert "wanted at least 5.00×" in page


def test_a_training_with_a_lost_loss_is_drawn_with_a_gap() -> None:
    axis = charts.ChartAxis(0, 10, 0, 10, ())
    assert charts.polylines([1, 2, 3, 4], [1, None, 3, 4], axis, axis) == ["1.0,1.0", "3.0,3.0 4.0,4.0"]


def test_labels_of_close_points_meet_neither_each_other_nor_a_point() -> None:
    points = [(f"file{i}", "Student INT8 (PTQ)", 150 + 5.0 * i, 100 + 4.0 * i) for i in range(5)]
    placed = charts.place_labels(points, charts.Box(0, 0, 440, 240))
    boxes = []
    for point in placed:
        width = charts.CHARACTER_WIDTH * len(point.label)
        left = point.label_x - {"start": 0, "middle": width / 2, "end": width}[point.anchor]
        boxes.append(charts.Box(left, point.label_y - 11, left + width, point.label_y + 3))
    assert not any(a.overlaps(b) for a, b in pairwise(sorted(boxes, key=lambda box: box.top)))


@pytest.mark.parametrize("values", [(0.5,), (97.2, 98.3), (0.0, 0.0), (1e-6, 2e-6), (6.7e-11,), (-3, 5000)])
def test_a_linear_axis_covers_its_values_with_few_round_ticks(values: tuple[float, ...]) -> None:
    axis = charts.linear_axis(values, 0, 100)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 6


@pytest.mark.parametrize("values", [(1.0,), (17.9, 91.2), (0.05, 4000.0), (1.2, 1.3)])
def test_a_logarithmic_axis_covers_its_values_with_few_ticks(values: tuple[float, ...]) -> None:
    axis = charts.log_axis(values, 0, 100)
    assert axis.low < min(values) <= max(values) < axis.high
    assert 1 <= len(axis.ticks) <= 7


@pytest.mark.parametrize(("values", "places"), [([200, 50], [100, 25]), ([0, 0], [0, 0])])
def test_a_waterfall_starts_at_zero(values: list[float], places: list[float]) -> None:
    track = charts.track(values, from_zero=True)
    assert list(map(track.at, values)) == places


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.00025, "0.00025"),
        (0.4118, "0.412"),
        (17.94, "17.9"),
        (91.2, "91.2"),
        (1204.3, "1,204"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert numbers.significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.84, "0.8 s"), (42.2, "42 s"), (59.7, "1 min 00 s"), (11100, "3 h 05 min")]
)
def test_durations_read_as_spoken(seconds: float | None, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_terminal_s_tables_fit_80_columns(tmp_path: Path, variant: str) -> None:
    text = shown(build_report(tmp_path, **VARIANTS[variant]), verbose=True)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_the_terminal_shows_batch_1_and_one_thread_unless_verbose(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    assert "batch 8" not in shown(report)
    assert "all threads" not in shown(report)
    assert "CPU · all threads · batch 8 · 224 px" in shown(report, verbose=True)


def test_report_prints_a_finished_run_again_and_draws_its_page(tmp_path: Path) -> None:
    report = build_report(tmp_path, int8=build_int8())
    save_report(report, tmp_path)
    found = [CliRunner().invoke(app, ["report", str(tmp_path), *more], catch_exceptions=False) for more in ([], ["-v"])]
    assert [result.exit_code for result in found] == [0, 0]
    assert found[0].output.splitlines()[-1] == f"{tmp_path}/report/index.html"
    assert report["recommendation"]
    assert " ".join(report["recommendation"]["sentence"].split()) in " ".join(found[0].output.split())
    assert ["Tuning" in result.output for result in found] == [False, True]
    assert (tmp_path / "report" / "index.html").read_text() == render(report, tmp_path)


def test_the_terminal_ends_with_verdict_failures_and_the_page(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"min_speedup": 5, "max_drop": 0.01})
    *_, verdict, missed, met, _, page = shown(report).splitlines()
    assert (verdict, page) == ("FAIL 1 of 2 targets missed", "runs/a/report/index.html")
    assert missed == f"✗ {report['failures'][0]}"
    assert met == "✓ max_drop: wanted at most 1.00 points, measured 0.56 points"


def test_what_the_recipe_did_not_say_of_a_training_is_a_warning(tmp_path: Path) -> None:
    artifacts = build_run(tmp_path)
    events = ["stopped after epoch 5 of 8, whose network is kept: score 0.98 has reached 0.98"]
    (artifacts[2] / "training-distill.json").write_text(json.dumps({"phase": "distill", "events": events}))
    report = collect(build_recipe(), artifacts, root=tmp_path, made=set(artifacts), command="")
    assert f"distill: {events[0]}" in " ".join(shown(report, 200).split())
    assert events[0] in render(report, tmp_path)


def test_what_the_data_set_s_notes_say_is_a_warning(tmp_path: Path) -> None:
    artifacts, note = build_run(tmp_path), "3 of 9 validation images are training images too"
    (artifacts[0] / NOTES).write_text(json.dumps([note]))
    report = collect(build_recipe(), artifacts, root=tmp_path, made=set(artifacts), command="")
    assert report["warnings"][0] == note


def test_a_file_shows_no_escape_codes_and_brackets_as_they_are(tmp_path: Path) -> None:
    text = shown(build_report(tmp_path, warnings=("class [red]x[/red]",)))
    assert "class [red]x[/red]" in text
    assert "\x1b" not in text
