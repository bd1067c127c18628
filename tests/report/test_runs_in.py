"""What the report says of files that were timed in several providers."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from reports import CPU, build_report, shown

from compress.report.judge.recommend import recommend
from compress.report.judge.verdict import any_row, judge, served_elsewhere
from compress.report.page.card import plugin
from compress.report.page.summary import compared_rows, conditions
from compress.report.page.tables import files
from compress.report.shape import Report
from export.onnx_file.targets import OPENVINO


def beside(report: Report, name: str, arithmetic: Any, ratio: float, *, score: float | None = None) -> None:
    """Add a file's rows in OpenVINO, `ratio` times as fast as the CPU provider's FP32 student."""
    for row in [row for row in report["deployed"] if row["name"] == name and row["provider"] == CPU]:
        other = deepcopy(row)
        other["provider"], other["arithmetic"] = OPENVINO, arithmetic
        other["p50_ms"] = 42.8 / ratio
        if score is not None:
            other["score"] = score
        speed, over_teacher = other["speedup_vs_student_fp32"], other["speedup"]
        assert speed is not None
        assert over_teacher is not None
        speed |= {"ratio": ratio, "ci95": [ratio * 0.98, ratio * 1.02]}
        over_teacher |= {"ratio": 2 * ratio, "ci95": [ratio * 1.96, ratio * 2.04]}
        report["deployed"].append(other)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return build_report(tmp_path, targets={"min_speedup": 7.0})


def test_a_float_file_in_bf16_is_named_where_it_is_the_fastest(report: Report) -> None:
    beside(report, "student_int8", "f32", 1.5)
    beside(report, "student_fp32", "bf16", 4.0)
    assert judge(report)[0] == "fail"  # of the CPU provider's file
    report["recommendation"] = found = recommend(report)
    assert found is not None
    assert found["file"] == "student_int8"  # for a machine without the plugin
    assert found.get("best") == {"file": "student_fp32", "provider": OPENVINO, "arithmetic": "bf16"}
    assert "The best on this machine is student_fp32 in OpenVINO bf16: 4.00× [3.92, 4.08]" in found["sentence"]
    assert "INT8 does not pay here: that is 2.07× as fast as student_int8 in CPU (pip install" in found["sentence"]
    assert judge(report) == ("pass", [])  # 8 times the teacher's
    assert "OpenVINO bf16" in " ".join(shown(report, width=200).split())


def test_a_provider_that_computes_wrongly_is_not_served(report: Report) -> None:
    beside(report, "student_int8", "f32", 9.0, score=0.1)
    found = recommend(report)
    assert found is not None
    assert "best" not in found
    assert found["sentence"].endswith("No file is beyond doubt faster, and accurate enough, in OpenVINO.")


def test_the_score_of_a_file_is_the_cpu_provider_s_wherever_its_rows_lie(report: Report) -> None:
    beside(report, "student_int8", "f32", 9.0, score=0.1)
    report["deployed"].reverse()
    row = any_row(report, "student_int8")
    assert row is not None
    assert (row["provider"], row["score"]) == (CPU, 0.97778)


def test_the_table_says_where_each_row_ran(report: Report) -> None:
    beside(report, "student_int8", "f32", 3.0)
    beside(report, "student_fp32", "bf16", 4.0)
    (rows,) = compared_rows(report)
    table = files(report, rows)
    assert table.columns[:2] == ("File", "Runs in")
    assert [row[1] for row in table.rows] == ["CPU"] * 5 + ["OpenVINO", "OpenVINO bf16"]
    assert conditions(rows[-1]).startswith("OpenVINO bf16 · 1 thread · batch 1")


def test_the_card_has_the_lines_that_open_the_fastest_file(report: Report) -> None:
    beside(report, "student_fp32", "bf16", 4.0)
    assert plugin(report) is None
    report["recommendation"] = recommend(report)
    assert served_elsewhere(report) is not None
    found = plugin(report)
    assert found is not None
    assert (found["file"], found["module"]) == ("student_fp32", "onnxruntime_ep_openvino")


def test_a_class_is_judged_where_the_recommended_file_runs(report: Report) -> None:
    there = "student_fp32 in OpenVINO bf16"
    report["targets"]["max_class_drop"] = 0.05
    kept: Any = {"correct": [95, 95], "answered": [100, 100], "mistakes": []}
    lossy: Any = {"correct": [95, 80], "answered": [115, 85], "mistakes": []}
    files: Any = dict.fromkeys(["teacher_fp32", "student_fp32", "student_ptq_int8", "student_int8", there], kept)
    report["classes"] = {"names": ["cat", "dog"], "images": [100, 100], "files": files}
    beside(report, "student_fp32", "bf16", 4.0)
    report["recommendation"] = recommend(report)
    assert judge(report) == ("pass", [])
    files[there] = lossy
    found = recommend(report)
    assert found is not None
    assert "best" not in found  # bf16 loses a class that f32 keeps
    verdict, (sentence,) = judge(report)  # of the file that an earlier verdict recommended
    assert verdict == "fail"
    assert f'class "dog": teacher_fp32 95.00\xa0%, {there} 80.00\xa0% of 100 images' in sentence
