"""A file that scores otherwise than its stage measured fails the run, whatever the targets say."""

from pathlib import Path
from typing import Any

import pytest
from reports import METRICS, build_bench, build_int8, build_report, shown

from compress.report.judge.parity import mismatches
from compress.report.page import summary
from compress.report.page.html import render
from compress.report.shape import Report

STAGE = {"teacher_fp32": "source", "student_fp32": "ptq", "student_ptq_int8": "ptq", "student_int8": "qat"}
METRIC = {"student_ptq_int8": 0.97222, "student_int8": 0.97778}


def scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, off: float, *, images: int = 10_000) -> Report:
    """Return the report of a run in which one file scores otherwise by `off`, and every target is met."""

    def planted(**bench: Any) -> dict[str, Any]:
        found = build_bench(**bench)
        for file in found["accuracy"].values():
            file["images"] = images
        found["accuracy"][name]["score"] += off
        return found

    monkeypatch.setattr("reports.build_bench", planted)
    monkeypatch.setitem(METRICS, "qat", {**METRICS["qat"], "score_cpu_avx2": 0.97778})
    int8 = build_int8()
    int8["ptq"]["images"] = images
    return build_report(tmp_path, int8=int8, targets={"min_speedup": 1.0})


@pytest.mark.parametrize("name", STAGE)
def test_a_file_may_not_score_otherwise_than_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    report = scoring(tmp_path, monkeypatch, name, -0.0021)
    (sentence,) = report["failures"]
    assert report["verdict"] == "fail"
    assert sentence.startswith(f"{name}: score is ")
    assert f"its stage ({STAGE[name]}) measured" in sentence
    assert "on the same 10,000 images (at most 0.2 points apart is allowed)" in sentence
    assert summary.verdict_text(report) == "all targets met, 1 file does not score as measured"
    assert sentence in shown(report, 400).replace("\n", " ")
    assert f"{name}: score is" in render(report, tmp_path)


@pytest.mark.parametrize("name", STAGE)
@pytest.mark.parametrize("off", [0.0019, -0.0019])
def test_a_fifth_of_a_point_is_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, off: float) -> None:
    assert scoring(tmp_path, monkeypatch, name, off)["verdict"] == "pass"


@pytest.mark.parametrize(("images", "found"), [(1, []), (2, ["teacher_fp32"])])
def test_of_few_images_one_is_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, found: list[str]
) -> None:
    report = scoring(tmp_path, monkeypatch, "teacher_fp32", -images / 360, images=360)
    assert [sentence.partition(":")[0] for sentence in mismatches(report)] == found


def test_a_file_for_another_machine_is_not_judged_by_this_one_s_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AVX2 the full weight range saturates: what such a file scores here says nothing of it."""
    report = scoring(tmp_path, monkeypatch, "student_int8", -0.1)
    assert len(mismatches(report)) == 1
    report["recipe"]["target"] = "cpu_vnni"
    assert report["ptq"] is not None
    report["ptq"]["targets"] = {"cpu_vnni": report["ptq"]["targets"]["cpu_avx2"]}
    assert mismatches(report) == []


def test_a_file_that_ptq_scored_on_fewer_images_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = scoring(tmp_path, monkeypatch, "student_ptq_int8", -0.1)
    assert report["ptq"] is not None
    report["ptq"]["images"] = 1000
    assert mismatches(report) == []
