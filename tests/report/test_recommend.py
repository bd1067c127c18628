from pathlib import Path
from typing import Any

import pytest
from reports import CPU, CUDA, FILES, build_audit, build_ptq, build_report, with_row

from compress.report.judge.recommend import recommend
from compress.report.page import summary
from compress.report.shape import Report

FLOATS = ("teacher_fp32", "student_fp32", "student_fp16")


def timed(report: Report, name: str, ratio: float, low: float, high: float) -> Report:
    """Plant a file's speed-up over the student's FP32."""
    return with_row(report, name, speedup_vs_student_fp32={"vs": "student_fp32", "ratio": ratio, "ci95": [low, high]})


def advice(report: Report) -> tuple[str | None, str]:
    """Return the recommended file and the sentence with plain spaces."""
    found = recommend(report)
    assert found is not None
    return found["file"], found["sentence"].replace("\u00a0", " ")


def test_int8_is_served_where_speed_and_accuracy_hold(tmp_path: Path) -> None:
    report = timed(build_report(tmp_path), "student_int8", 1.94, 1.88, 2.0)
    assert advice(report) == (
        "student_int8",
        "Serve student_int8 on cpu_avx2: 1.94× [1.88, 2.00] as fast as the same student in FP32, "
        "and loses 0.56 points against the teacher.",
    )


def test_what_is_allowed_is_said_where_the_recipe_sets_it(tmp_path: Path) -> None:
    report = timed(build_report(tmp_path, targets={"max_drop": 0.015}), "student_int8", 1.94, 1.88, 2.0)
    assert advice(report)[1].endswith("loses 0.56 points against the teacher (1.50 points allowed).")


def test_the_report_carries_the_recommendation(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    assert report["recommendation"] == recommend(report)


def test_slow_int8_is_not_served_and_the_sentence_says_why(tmp_path: Path) -> None:
    report = timed(timed(build_report(tmp_path), "student_int8", 0.9, 0.85, 0.95), "student_ptq_int8", 0.9, 0.8, 0.99)
    file, sentence = advice(report)
    assert file == "student_fp32"
    assert sentence.startswith(
        "Serve student_fp32 on cpu_avx2: INT8 is 0.90× [0.85, 0.95] of FP32 here: in small networks"
    )
    assert "FP16 is 0.88×" in sentence
    report["recommendation"] = {"file": file, "sentence": sentence}
    assert summary.headline(report).rows[0][3].endswith("points, ONNX Runtime, student_int8")
    assert summary.headline(build_report(tmp_path / "served")).rows[0][3].endswith("points, ONNX Runtime")


def test_a_speed_up_whose_interval_reaches_one_is_none(tmp_path: Path) -> None:
    report = timed(build_report(tmp_path, files=(*FLOATS, "student_int8")), "student_int8", 1.05, 1.0, 1.1)
    assert advice(report)[0] == "student_fp32"


@pytest.mark.parametrize(("high", "file"), [(1.49, "student_int8"), (1.51, "student_fp16")])
def test_int8_must_beat_fp16_beyond_doubt(tmp_path: Path, high: float, file: str) -> None:
    report = timed(build_report(tmp_path, files=(*FLOATS, "student_int8")), "student_int8", 1.6, 1.5, 1.7)
    assert advice(timed(report, "student_fp16", 1.45, 1.4, high))[0] == file


def test_fp16_that_loses_accuracy_does_not_stand_in_the_way_of_int8(tmp_path: Path) -> None:
    report = timed(build_report(tmp_path), "student_fp16", 3.0, 2.9, 3.1)
    assert advice(with_row(report, "student_fp16", score=0.5))[0] == "student_int8"


@pytest.mark.parametrize(("wanted", "file"), [(0.006, "student_int8"), (0.005, "student_fp32")])
def test_accuracy_is_held_against_the_recipe_s_target(tmp_path: Path, wanted: float, file: str) -> None:
    report = build_report(tmp_path, targets={"max_drop": wanted})  # INT8 loses 0.555 points, FP32 0.277
    assert advice(report)[0] == file


def test_without_a_target_one_point_is_allowed(tmp_path: Path) -> None:
    report = with_row(build_report(tmp_path), "student_int8", score=0.98333 - 0.0101)
    file, sentence = advice(with_row(report, "student_ptq_int8", score=0.5))
    assert file == "student_fp32"
    assert "student_int8 loses 1.01 points against the teacher, 1.00 points are allowed" in sentence


def test_calibrated_int8_is_served_where_training_failed(tmp_path: Path) -> None:
    report = with_row(with_row(build_report(tmp_path), "student_int8", score=0.9), "student_ptq_int8", score=0.98)
    file, sentence = advice(report)
    assert file == "student_ptq_int8"
    assert "; student_int8 loses 8.33 points" in sentence


def test_of_two_int8_files_that_hold_the_more_accurate_is_served(tmp_path: Path) -> None:
    assert advice(with_row(build_report(tmp_path), "student_ptq_int8", score=0.979))[0] == "student_ptq_int8"


@pytest.mark.parametrize(("low", "file"), [(2.01, "student_ptq_int8"), (1.99, "student_int8")])
def test_of_two_int8_files_that_hold_the_one_that_is_faster_beyond_doubt_is_served(
    tmp_path: Path, low: float, file: str
) -> None:
    report = with_row(build_report(tmp_path), "student_ptq_int8", score=0.976)
    report = timed(timed(report, "student_int8", 1.94, 1.88, 2.0), "student_ptq_int8", 2.1, low, 2.2)
    assert advice(report)[0] == file


def test_the_sentence_names_another_quantizer_whose_file_is_served(tmp_path: Path) -> None:
    planted = build_ptq()
    planted["targets"]["cpu_avx2"]["trials"][1]["engine"] = "onnxruntime"
    report = with_row(build_report(tmp_path, int8={"ptq": planted}), "student_int8", score=0.9)
    report = with_row(report, "student_ptq_int8", score=0.98)
    assert advice(report)[1].endswith("are allowed; made by ONNX Runtime's quantizer.")


def test_the_maker_is_that_of_the_int8_file_where_tuning_chose_fp16(tmp_path: Path) -> None:
    planted = build_ptq()
    found = planted["targets"]["cpu_avx2"]
    found["trials"][0]["engine"] = "onnxruntime"
    found["trials"][1] |= {"engine": "compress", "number_format": "fp16", "calibration": "none"}
    found |= {"chosen": 1, "kept": 0}
    report = with_row(build_report(tmp_path, int8={"ptq": planted}), "student_int8", score=0.9)
    report = with_row(report, "student_ptq_int8", score=0.98)
    assert advice(report)[1].endswith("made by ONNX Runtime's quantizer.")


@pytest.mark.parametrize(("fraction", "mixed"), [(0.21, True), (0.2, False)])
def test_a_file_with_over_a_fifth_of_its_work_in_float_is_not_called_int8(
    tmp_path: Path, fraction: float, mixed: bool
) -> None:
    audit = build_audit(float_fraction=fraction, float_layers=["fc", "conv1"])
    report = build_report(tmp_path, int8={"audit": {"student_int8": audit}})
    headline = summary.headline(report).rows[0]
    assert (headline[:2] == ("Not INT8", "2 of 55 layers in float")) is mixed
    assert advice(report)[1].endswith("; 2 of 55 layers in float.") is mixed


def test_of_two_equal_int8_files_the_trained_is_served(tmp_path: Path) -> None:
    assert advice(with_row(build_report(tmp_path), "student_ptq_int8", score=0.97778))[0] == "student_int8"


def test_where_pruning_lost_too_much_int8_is_held_against_the_float_student(tmp_path: Path) -> None:
    report = with_row(build_report(tmp_path), "teacher_fp32", score=0.999)
    file, sentence = advice(report)
    assert file == "student_int8"
    assert "loses 0.28 points against the float student" in sentence
    assert "no precision brings it within 1.00 points of the teacher, the student in FP32 loses 1.84 points" in sentence


def test_a_run_without_int8_serves_fp32(tmp_path: Path) -> None:
    report = build_report(tmp_path, ("source", "distill", "export", "bench"), files=FLOATS[:2])
    assert advice(report) == ("student_fp32", "Serve student_fp32 on cpu_avx2: no INT8 file was made.")


def test_fp16_is_served_on_a_cpu_that_runs_it_faster(tmp_path: Path) -> None:
    report = build_report(tmp_path, ("source", "distill", "export", "bench"), files=FLOATS)
    assert advice(timed(report, "student_fp16", 1.6, 1.5, 1.7))[0] == "student_fp16"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"score": None}, "the accuracy of student_int8 was not measured"),
        ({"speedup_vs_student_fp32": None}, "student_int8 was not timed beside student_fp32"),
    ],
)
def test_what_was_not_measured_is_not_served(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    report = with_row(build_report(tmp_path, files=(*FLOATS, "student_int8")), "student_int8", **changes)
    assert advice(report)[0] == "student_fp32"
    assert problem in advice(report)[1]


@pytest.mark.parametrize("target", ["cpu_vnni", "cpu_arm", "tensorrt"])
def test_on_another_machine_nothing_is_recommended(tmp_path: Path, target: str) -> None:
    file, sentence = advice(build_report(tmp_path, target=target))
    assert file is None
    assert f"speed was not measured on the target {target}" in sentence
    assert "Here student_int8 is 1.94×" in sentence


FLOAT_STAGES = ("source", "prune", "distill", "export", "bench")


def test_on_cuda_fp16_is_served(tmp_path: Path) -> None:
    report = build_report(tmp_path, FLOAT_STAGES, target="cuda", files=FLOATS, providers=(CPU, CUDA))
    file, sentence = advice(report)
    assert file == "student_fp16"
    assert sentence.startswith("Serve student_fp16 on cuda: 1.41× [1.36, 1.45] as fast as the same student in FP32")


@pytest.mark.parametrize(("high", "file"), [(1.01, "student_fp16"), (0.99, "student_fp32")])
def test_on_cuda_fp16_is_served_unless_it_is_slower(tmp_path: Path, high: float, file: str) -> None:
    report = build_report(tmp_path, FLOAT_STAGES, target="cuda", files=FLOATS, providers=(CUDA,))
    assert advice(timed(report, "student_fp16", 0.97, 0.95, high))[0] == file


def test_on_cuda_fp16_that_loses_accuracy_is_not_served(tmp_path: Path) -> None:
    report = build_report(tmp_path, FLOAT_STAGES, target="cuda", files=FLOATS, providers=(CUDA,))
    assert advice(with_row(report, "student_fp16", score=0.5))[0] == "student_fp32"


def test_without_a_gpu_nothing_is_recommended_for_cuda(tmp_path: Path) -> None:
    file, sentence = advice(build_report(tmp_path, FLOAT_STAGES, target="cuda", files=FLOATS))
    assert (file, "no such provider was timed here" in sentence) == (None, True)


def test_times_at_other_conditions_recommend_nothing(tmp_path: Path) -> None:
    file, sentence = advice(build_report(tmp_path, batches=(8,)))
    assert (file, "student_fp32 was not timed on CPU with one thread at batch 1" in sentence) == (None, True)


@pytest.mark.parametrize("files", [(), ("teacher_fp32",)])
def test_without_a_timed_student_there_is_no_recommendation(tmp_path: Path, files: tuple[str, ...]) -> None:
    assert recommend(build_report(tmp_path, files=files)) is None


def test_files_for_further_targets_are_never_recommended(tmp_path: Path) -> None:
    files = (*FILES, "student_int8_cpu_vnni")
    report = timed(build_report(tmp_path, files=files), "student_int8_cpu_vnni", 9.0, 8.9, 9.1)
    assert advice(with_row(report, "student_int8_cpu_vnni", score=1.0))[0] == "student_int8"
