"""Class by class: what a file loses, and what makes a verdict mean nothing."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answered import answered
from reports import FILES, build_report, save_report, shown

from compress.report.comparison.read import read_runs
from compress.report.judge.classes import at_chance
from compress.report.judge.verdict import judge
from compress.report.page import summary, tables
from compress.report.page.card import card
from compress.report.page.html import render
from compress.report.shape import Report
from export.onnx_file.model_file import Value
from export.runtime.accuracy import Score
from export.tasks.paired import chance
from export.tasks.task import Classes, FileClasses

DEFECTS = ("ok", "defect")
BELTS = np.repeat([0, 1], [380, 20])


def answers(truth: np.ndarray, **predictions: np.ndarray) -> dict[str, Score]:
    """Return every file's answers; a file that is not named answers as the teacher does."""
    return {name: answered(predictions.get(name, predictions["teacher_fp32"]), truth) for name in FILES}


def report_on(
    folder: Path,
    found: Mapping[str, Score],
    classes: Sequence[str],
    targets: Mapping[str, float] | None = None,
    **bench: Any,
) -> Report:
    files = tuple(
        name for name in FILES if name != "student_ptq_int8"
    )  # else that is served where the trained one fails
    return build_report(folder, targets=targets, answers=found, classes=classes, **{"files": files} | bench)


def belts(wrong_ok: int, wrong_defect: int) -> np.ndarray:
    """Return answers to 380 times ok and 20 times defect, so many of them wrong."""
    found = BELTS.copy()
    found[:wrong_ok], found[400 - wrong_defect :] = 1, 0
    return found


def guesses(classes: int = 5, images: int = 400, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and answers that know nothing of them."""
    return np.arange(images) % classes, np.random.default_rng(seed).integers(0, classes, images)


def texts(report: Report) -> str:
    return " ".join((*report["failures"], *report["warnings"]))


def test_where_the_trained_file_fails_the_calibrated_one_is_served_and_judged(tmp_path: Path) -> None:
    found = answers(BELTS, teacher_fp32=belts(2, 1), student_int8=belts(0, 20))
    report = report_on(tmp_path, found, DEFECTS, {"max_drop": 0.05}, files=tuple(FILES))
    assert (report["verdict"], report["failures"]) == ("pass", [])
    assert report["recommendation"] is not None
    assert report["recommendation"]["file"] == "student_ptq_int8"
    assert summary.headline(report).rows[0][1].replace("\u00a0", " ") == "99.2 %"


# Chance


@pytest.mark.parametrize("seed", range(3))
def test_a_teacher_at_chance_is_nothing_to_judge(tmp_path: Path, seed: int) -> None:
    """Of five classes, with targets that every student of it meets."""
    truth, taught = guesses(seed=seed)
    report = report_on(tmp_path, answers(truth, teacher_fp32=taught), "abcde", {"max_drop": 0.02})
    assert report["verdict"] == "fail"
    assert report["failures"][0].startswith("teacher_fp32 predicts at chance: ")
    assert "FAIL nothing to judge, teacher_fp32 predicts at chance\n" in shown(report)
    assert "nothing to judge, teacher_fp32 predicts at chance" in render(report, tmp_path)
    assert report["failures"][0] in render(report, tmp_path)
    assert report["recommendation"] == {
        "file": None,
        "sentence": "No file is recommended: teacher_fp32 predicts at chance.",
    }


def test_without_targets_a_teacher_at_chance_is_a_warning_that_the_headline_carries(tmp_path: Path) -> None:
    truth, taught = guesses()
    report = report_on(tmp_path, answers(truth, teacher_fp32=taught), "abcde")
    assert (report["verdict"], report["failures"]) == ("pass", [])
    assert any(warning.startswith("teacher_fp32 predicts at chance: ") for warning in report["warnings"])
    assert "PASS teacher_fp32 predicts at chance, no targets set\n" in shown(report)


def test_a_teacher_that_always_gives_the_largest_class_is_at_chance_whatever_its_top1(tmp_path: Path) -> None:
    report = report_on(tmp_path, answers(BELTS, teacher_fp32=belts(0, 20)), DEFECTS, {"max_drop": 0.02})
    assert report["verdict"] == "fail"
    assert "380 of 400 validation images are right, 380 would be by guessing (p = 1.0)" in report["failures"][0]


def test_a_detector_that_finds_more_than_there_is_is_not_at_chance() -> None:
    """As on photographs of blood: 1,586 boxes for 1,137 cells, nearly all in one class; by classes alone it would be at chance."""
    found: FileClasses = {"correct": [42, 873, 87], "answered": [59, 1439, 88], "mistakes": None}
    classes: Classes = {
        "names": ["platelet", "red", "white"],
        "images": [83, 967, 87],
        "files": {"teacher_fp32": found},
    }
    assert at_chance(classes, ["teacher_fp32"])
    assert at_chance({**classes, "counted": "objects", "any_number": True}, ["teacher_fp32"]) == {}


def test_a_teacher_at_the_largest_class_s_share_that_still_knows_the_classes_is_a_warning(tmp_path: Path) -> None:
    found = answers(BELTS, teacher_fp32=belts(12, 8))  # 380 right, as always answering ok would be
    report = report_on(tmp_path, found, DEFECTS, {"max_drop": 0.02})
    assert report["verdict"] == "pass"
    (warning,) = report["warnings"]
    assert warning.replace("\u00a0", " ") == (
        'teacher_fp32 is right on 95.00 % of 400 validation images, always predicting "ok" on 95.00 %: '
        "the score says little here, see balanced accuracy and set targets.max_class_drop"
    )


def test_a_good_teacher_and_student_raise_no_doubt(tmp_path: Path) -> None:
    found = answers(BELTS, teacher_fp32=belts(3, 2), student_int8=belts(4, 3))
    report = report_on(tmp_path, found, DEFECTS, {"max_drop": 0.02, "max_class_drop": 0.05})
    assert (report["verdict"], report["failures"], report["warnings"]) == ("pass", [], [])


def test_chance_is_the_mean_and_variance_over_all_orders_of_the_answers() -> None:
    truth, given = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 0]
    matches = [sum(map(int.__eq__, truth, order)) for order in itertools.permutations(given)]
    mean, deviation, right = np.mean(matches), np.std(matches), sum(map(int.__eq__, truth, given))
    found = FileClasses(correct=[2, 1, 1], answered=[given.count(label) for label in range(3)], mistakes=None)
    expected, probability = chance([truth.count(label) for label in range(3)], found)
    assert right == sum(found["correct"])
    assert expected == pytest.approx(mean)
    assert probability == pytest.approx(0.5 * math.erfc((right - mean) / deviation / math.sqrt(2)))


# Classes that collapse


def test_a_file_that_never_says_defect_fails_and_is_not_recommended(tmp_path: Path) -> None:
    """It loses 4.25 points of top-1 and all of the class that matters."""
    found = answers(BELTS, teacher_fp32=belts(2, 1), student_int8=belts(0, 20))
    report = report_on(tmp_path, found, DEFECTS, {"max_drop": 0.05})
    assert report["verdict"] == "fail"
    assert "FAIL student_int8 predicts at chance\n" in shown(report)
    assert 'student_int8 predicts "ok" for all 400 validation images' in report["warnings"]
    lost = 'student_int8 never predicts 1 class right that the teacher does: "defect" (0 of 20, the teacher 19)'
    assert lost in report["warnings"]
    assert report["recommendation"] is not None
    assert report["recommendation"]["file"] != "student_int8"
    assert f"<li>{lost.replace(chr(34), '&#34;')}</li>" in render(report, tmp_path)


def test_a_class_is_lost_only_where_missing_all_of_it_is_more_than_bad_luck(tmp_path: Path) -> None:
    """One image of twenty that the teacher knows and the student does not proves nothing."""
    found = answers(BELTS, teacher_fp32=belts(0, 19), student_int8=np.where(np.arange(400) == 3, 1, 0))
    assert "never predicts" not in texts(report_on(tmp_path, found, DEFECTS))


@pytest.mark.parametrize("wanted", [0.4, 0.4 - 1e-6])
def test_the_worst_class_is_held_to_its_target_by_name(tmp_path: Path, wanted: float) -> None:
    found = answers(BELTS, teacher_fp32=belts(2, 1), student_int8=belts(1, 9))
    report = report_on(tmp_path, found, DEFECTS, {"max_class_drop": wanted})
    if wanted == 0.4:
        assert (report["verdict"], report["failures"]) == ("pass", [])
        return
    assert [failure.replace("\u00a0", " ") for failure in report["failures"]] == [
        "max_class_drop: wanted at most 40.00 points, measured 40.00 points "
        '(class "defect": teacher_fp32 95.00 %, student_int8 55.00 % of 20 images)'
    ]
    advice = json.dumps(report["recommendation"], ensure_ascii=False)
    assert "student_int8 loses 40.00\u00a0points of recall" in advice


def test_no_file_is_recommended_where_even_the_float_student_loses_a_class(tmp_path: Path) -> None:
    """INT8 by calibration answers as the float student does, so the class was lost before."""
    lossy = {name: belts(0, 15) for name in FILES if name != "teacher_fp32"}
    report = report_on(tmp_path, answers(BELTS, teacher_fp32=belts(2, 1), **lossy), DEFECTS, {"max_class_drop": 0.1})
    assert report["recommendation"] is not None
    assert report["recommendation"]["file"] is None
    assert 'student_fp32 loses 70.00\u00a0points of recall on class "defect"' in report["recommendation"]["sentence"]


def test_a_report_without_classes_does_not_reach_a_target_on_them(tmp_path: Path) -> None:
    report = build_report(tmp_path, targets={"max_class_drop": 0.5})
    assert "max_class_drop: wanted at most 50.00 points, not measured" in report["failures"][0]


# Too few images


def test_a_class_without_an_image_is_named_and_stands_last(tmp_path: Path) -> None:
    found = answers(BELTS, teacher_fp32=belts(2, 1))
    report = report_on(tmp_path, found, (*DEFECTS, "scratch"))
    assert 'without a validation image, so without a score: "scratch"' in texts(report)
    assert tables.recalls(report)[0].rows[-1] == ("scratch", "0", "–", "–", "–")


@pytest.mark.parametrize(("wanted", "warned"), [(0.0025, False), (0.0024, True)])
def test_one_image_that_outweighs_the_target_is_said(tmp_path: Path, wanted: float, warned: bool) -> None:
    report = report_on(tmp_path, answers(BELTS, teacher_fp32=belts(2, 1)), DEFECTS, {"max_drop": wanted})
    assert ("one of the 400 validation images is worth 0.25\u00a0points" in texts(report)) == warned


def test_one_image_of_the_smallest_class_that_outweighs_the_target_is_said(tmp_path: Path) -> None:
    report = report_on(tmp_path, answers(BELTS, teacher_fp32=belts(2, 1)), DEFECTS, {"max_class_drop": 0.04})
    assert 'one of the 20 validation images of class "defect" is worth 5.00\u00a0points' in texts(report)


# Tables


def test_the_class_that_loses_most_comes_first(tmp_path: Path) -> None:
    found = answers(BELTS, teacher_fp32=belts(2, 1), student_int8=belts(1, 9))
    (table,) = tables.recalls(report_on(tmp_path, found, DEFECTS))
    assert [tuple(cell.replace("\u00a0", " ") for cell in row) for row in table.rows] == [
        ("defect", "20", "95.0 %", "55.0 %", "−40.00 points"),
        ("ok", "380", "99.5 %", "99.7 %", "+0.26 points"),
    ]


def test_the_confusion_matrix_counts_every_image_once(tmp_path: Path) -> None:
    found = answers(BELTS, teacher_fp32=belts(2, 1), student_int8=belts(1, 9))
    (table,) = tables.confusion(report_on(tmp_path, found, DEFECTS))
    assert table.columns == ("", "ok", "defect")
    assert table.rows == [("ok", "379", "1"), ("defect", "9", "11")]


def test_of_many_classes_the_most_confused_pairs_are_shown(tmp_path: Path) -> None:
    truth = np.arange(600) % 30
    student = truth.copy()
    student[truth == 7] = 8
    student[:3] = 29
    found = answers(truth, teacher_fp32=np.where(np.arange(600) == 7, 8, truth), student_int8=student)
    (table,) = tables.confusion(report_on(tmp_path, found, [f"c{label}" for label in range(30)]))
    assert table.rows[0] == ("c7", "c8", "20", "1", "20")
    assert len(table.rows) == 4


@pytest.mark.parametrize("classes", [2, 12, 300])
def test_page_terminal_and_card_show_the_classes(tmp_path: Path, classes: int) -> None:
    """Names come from strangers: long, with markup and with what ends a cell."""
    truth = np.arange(990) % classes
    student = np.where(np.arange(990) % 7 == 0, 0, truth)
    names = [f"<b>{index}</b> [red]|" + "long name " * 5 for index in range(classes)]
    report = report_on(tmp_path, answers(truth, teacher_fp32=truth, student_int8=student), names)
    page, screen = render(report, tmp_path), shown(report, verbose=True)
    assert "<b>1</b>" not in page
    assert "Recall of each class, worst loss first" in page
    assert "Recall of each class, worst loss first" in screen
    assert ("Confusion matrix" in page) == (classes <= 20)
    assert max(len(line) for line in screen.splitlines() if "Recall" in line or "%" in line) <= 80
    tensors = {"input": Value("input", (None, 3, 8, 8), "float32"), "outputs": (Value("logits", (None, 3), "float32"),)}
    text = card(report, name="net", served="student_int8", classes=classes, golden=2, tensors=tensors)
    rows = text.split("## Classes")[1].split("## Use")[0].strip().splitlines()[2:]
    assert len(rows) == 2 + min(classes, 10)
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}
    assert "<b>" not in text


def test_top5_and_balanced_accuracy_stand_beside_top1(tmp_path: Path) -> None:
    truth = np.arange(120) % 12
    given = np.where(np.arange(120) < 60, truth, 0)
    found = {name: answered(given, truth, np.arange(120) < 90) for name in FILES}
    report = report_on(tmp_path, found, [str(label) for label in range(12)])
    for row in report["deployed"]:
        row["score_ci95"] = (0.4488, 0.6328)
    (table,) = tables.accuracy(report)
    assert table.columns[1:3] == ("Top-1", "95 %")
    assert table.rows[0] == ("teacher_fp32", "54.2\u00a0%", "44.9–63.3", "75.0\u00a0%", "54.2\u00a0%")


def test_a_task_without_classes_has_no_section_on_them(tmp_path: Path) -> None:
    report = build_report(tmp_path / "a")
    report["recipe"]["name"] = "other"
    assert report["classes"] is None
    assert list(
        read_runs([save_report(build_report(tmp_path / "b"), tmp_path / "b"), save_report(report, tmp_path / "a")])
    )
    assert "Class by class" not in render(report, tmp_path / "a")
    assert judge(report)[0] == "pass"
