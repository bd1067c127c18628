import json
import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from reports import (
    CPU,
    CUDA,
    FILES,
    build_audit,
    build_int8,
    build_ptq,
    build_report,
    build_verify,
    facts_of,
    shown,
    trial,
    with_row,
)

from compress.report.judge import gain
from compress.report.judge.verdict import judge
from compress.report.page import summary, tables_int8
from compress.report.page.html import render
from compress.report.page.table import ReportTable, Strong
from compress.report.shape import Report
from export.tasks.paired import mcnemar

LIMITS = {"max_float_layers": 1, "max_float_fraction": 0.0001, "max_leftover_qdq": 0, "min_agreement": 0.99}


def page_of(report: Report, root: Path) -> str:
    """Return the page with plain spaces."""
    return render(report, root).replace("\u00a0", " ")


def text_of(report: Report, *, verbose: bool = False) -> str:
    """Return what a wide terminal shows, with plain spaces."""
    return shown(report, 400, verbose=verbose).replace("\u00a0", " ")


def with_metrics(report: Report, stage: str, **metrics: float | None) -> Report:
    """Change a stage's metrics."""
    for row in report["stages"]:
        if row["stage"] == stage:
            row["metrics"].update(metrics)
    return report


def test_a_report_carries_the_stages_files(tmp_path: Path) -> None:
    planted = build_int8()
    report = build_report(tmp_path, int8=planted)
    assert {key: report[key] for key in ("ptq", "audit", "verify")} == planted


@pytest.mark.parametrize(
    ("missing", "heading"),
    [("ptq", "INT8 without training"), ("audit", "What runs in integers"), ("verify", "predict as its network")],
)
def test_a_missing_file_leaves_out_its_section_alone(tmp_path: Path, missing: str, heading: str) -> None:
    whole = page_of(build_report(tmp_path / "a", int8=build_int8()), tmp_path / "a")
    rest = {name: found for name, found in build_int8().items() if name != missing}
    part = page_of(build_report(tmp_path / "b", int8=rest), tmp_path / "b")
    assert (heading in whole, heading in part) == (True, False)
    assert whole.count("<h2>") - part.count("<h2>") == 1


def plain(cells: Iterable[str]) -> tuple[str, ...]:
    """Return cells with plain spaces."""
    return tuple(cell.replace("\u00a0", " ") for cell in cells)


def tables_of(report: Report, title: str) -> list[ReportTable]:
    """Return the tables on INT8, folded ones too, whose title begins so."""
    sections = tables_int8.sections(report)
    return [table for one in sections for table in (*one.tables, *one.folded) if table.title.startswith(title)]


def methods_of(report: Report) -> list[ReportTable]:
    return tables_of(report, "INT8 without training")


def test_the_methods_stand_between_the_float_student_and_the_trained_file(tmp_path: Path) -> None:
    (table,) = methods_of(build_report(tmp_path, int8=build_int8()))
    assert [plain((row[0], row[1], row[3])) for row in table.rows] == [
        ("float student", "", "98.1 %"),
        ("ONNX Runtime", "minmax", "96.1 %"),
        ("ONNX Runtime", "entropy", "96.9 %"),
        ("neural-compressor", "static", "95.0 %"),
        ("this pipeline", "percentile", "97.2 %"),
        ("this pipeline", "trained (QAT)", "97.8 %"),
    ]
    trained = table.rows[-1]
    assert (trained[2], *trained[-2:]) == ("ONNX Runtime", "53", "1")
    assert [isinstance(row[0], Strong) for row in table.rows] == [False] * 5 + [True]
    assert table.note == "neural-compressor, static: 31 of 53 convolutions fuse in ONNX Runtime"


def test_the_trained_file_s_row_says_when_it_was_scored_on_other_images(tmp_path: Path) -> None:
    (table,) = methods_of(build_report(tmp_path, int8={"ptq": build_ptq(images=100)}))
    assert table.note.endswith("student_int8 was scored on 360 images")


def test_without_a_bench_the_trained_row_is_pytorch_s(tmp_path: Path) -> None:
    report = build_report(tmp_path, ("source", "prune", "distill", "ptq", "qat"), target="cpu_avx2", int8=build_int8())
    (table,) = methods_of(report)
    assert plain(table.rows[-1][2:4]) == ("PyTorch", "97.78 %")


def test_a_further_target_has_its_own_section_and_trained_row(tmp_path: Path) -> None:
    planted = build_int8()
    planted["ptq"]["targets"] = {"cpu_arm": build_ptq()["targets"]["cpu_avx2"], **planted["ptq"]["targets"]}
    report = with_row(
        build_report(tmp_path, int8=planted, files=(*FILES, "student_int8_cpu_arm")), "student_int8", score=0.5
    )
    own, arm = methods_of(report)
    assert ("cpu_avx2" in own.title, *plain(own.rows[-1][3:4])) == (True, "50.0 %")
    assert ("cpu_arm" in arm.title, *plain(arm.rows[-1][3:4])) == (True, "97.8 %")


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_further_target_whose_training_was_skipped_is_shown_as_calibrated(tmp_path: Path, own: float) -> None:
    planted = build_int8()
    planted["ptq"]["targets"] |= {"cpu_arm": build_ptq()["targets"]["cpu_avx2"]}
    report = build_report(tmp_path, int8=planted)
    skipped = {"score_cpu_arm": 0.97222, "trained_cpu_arm": 0.0, "trained_cpu_avx2": own, "trained": own}
    _, arm = methods_of(with_metrics(report, "qat", **skipped))
    assert plain(arm.rows[-1][1:4]) == ("QAT skipped", "ONNX Runtime", "97.2 %")


def test_unknown_counts_and_ratios_are_dashes(tmp_path: Path) -> None:
    planted = build_int8()
    planted["ptq"]["targets"]["cpu_avx2"]["trials"] = [trial("minmax", [], 0.9, None, met=False)]
    planted["ptq"]["targets"]["cpu_avx2"]["chosen"] = 0
    report = build_report(tmp_path, int8=planted)
    assert methods_of(report)[0].rows[3][5] == "–"
    assert tables_of(report, "Tuning")[0].rows[0][7] == "–"


def test_trials_say_that_training_images_chose_and_methods_that_validation_images_report(tmp_path: Path) -> None:
    report = build_report(tmp_path, int8=build_int8())
    for text in (page_of(report, tmp_path), text_of(report, verbose=True)):
        assert re.search(r"Tuning.* by 1,437 training images", text)
        assert "360 " in text


def test_the_trials_show_what_is_in_float_met_and_chosen(tmp_path: Path) -> None:
    planted = build_int8()
    found = planted["ptq"]["targets"]["cpu_avx2"]
    found["trials"] = [
        trial("minmax", [], 0.95, 1.9, met=False),
        trial("entropy", ["layer1.0.conv2"], 0.978, 1.7, met=True),
    ]
    (table,) = tables_of(build_report(tmp_path, int8=planted), "Tuning")
    facts = [plain((row[1], row[2], row[5], row[6], row[7], row[9])) for row in table.rows]
    assert facts == [
        ("minmax", "✗ missed", "3.06 points", "0", "1.90×", ""),
        ("entropy", "✓ met, chosen", "0.26 points", "1", "1.70×", "layer1.0.conv2"),
    ]


def test_a_trial_says_whose_quantizer_built_it(tmp_path: Path) -> None:
    planted = build_int8()
    found = planted["ptq"]["targets"]["cpu_avx2"]
    found["trials"].append(trial("minmax", [], 0.98, 2.1, met=True) | {"engine": "onnxruntime"})
    (table,) = tables_of(build_report(tmp_path, int8=planted), "Tuning")
    assert [row[1] for row in table.rows] == ["minmax", "percentile", "minmax (ONNX Runtime)"]


def test_the_ten_most_sensitive_layers_are_drawn_in_proportion(tmp_path: Path) -> None:
    (table,) = tables_of(build_report(tmp_path, int8=build_int8()), "Most sensitive")
    assert [row[0] for row in table.rows[:2]] == ["layer1.0.conv2", "layer1.1.conv2"]
    assert len(table.rows) == 10
    assert [len(row[1]) for row in table.rows[:3]] == [16, 10, 6]


@pytest.mark.parametrize("kls", [[], [0.0, 0.0], [-1e-9, 0.0]])
def test_layers_without_any_sensitivity_have_no_bars(tmp_path: Path, kls: list[float]) -> None:
    planted = build_int8()
    groups = [{"group": f"conv{index}", "kl": kl, "drop": -0.001} for index, kl in enumerate(kls)]
    planted["ptq"]["targets"]["cpu_avx2"]["sensitivity"] = groups
    report = build_report(tmp_path, int8=planted)
    assert {row[1] for table in tables_of(report, "Most sensitive") for row in table.rows} <= {""}
    assert ("Most sensitive layers" in page_of(report, tmp_path)) == bool(kls)


def test_the_gain_of_training_is_told_in_images_and_against_chance(tmp_path: Path) -> None:
    text = gain.training_gain(build_report(tmp_path), 2)
    assert text is not None
    assert text.replace("\u00a0", " ") == (
        "INT8 by calibration alone (PTQ) 97.22 %, by training (QAT) 97.78 % on the same 360 images: +0.56 points, "
        "2 more right predictions. They agree with the float student on 98.33 % and 99.44 % of them, "
        "so with each other on all but at most 8: chance alone can explain this difference (exact sign test, p ≥ 0.50)."
    )


@pytest.mark.parametrize(
    ("ptq", "qat", "ptq_agreement", "qat_agreement", "said"),
    [
        (0.90, 0.98, 0.90, 1.0, "more than chance explains (exact sign test, p ≤ 4.2e-07)"),
        (0.95, 0.98, 0.80, 0.90, "the totals do not tell"),
        (0.98, 0.95, 0.95, 1.0, "11 fewer right predictions"),
        (0.97778, 0.97778, 0.95, 1.0, "±0.00"),
        (0.97778, 0.98056, 1.0, 1.0, "on all but at most 0."),
    ],
)
def test_a_gain_is_judged_by_what_the_totals_allow(
    tmp_path: Path, ptq: float, qat: float, ptq_agreement: float, qat_agreement: float, said: str
) -> None:
    report = with_row(build_report(tmp_path), "student_ptq_int8", score=ptq, agreement=ptq_agreement)
    text = gain.training_gain(with_row(report, "student_int8", score=qat, agreement=qat_agreement), 2)
    assert said in (text or "")


def test_files_scored_on_different_images_are_not_paired(tmp_path: Path) -> None:
    text = gain.training_gain(with_row(build_report(tmp_path), "student_int8", images=100), 2)
    assert "same" not in (text or "")
    assert "sign test" not in (text or "")


def test_without_onnx_scores_the_gain_is_pytorch_s(tmp_path: Path) -> None:
    text = gain.training_gain(build_report(tmp_path, ("source", "distill", "ptq", "qat", "export")), 2)
    assert "INT8 in PyTorch: calibrated alone 96.94" in (text or "")


@pytest.mark.parametrize(("difference", "discordant"), [(1, 1), (1, 7), (2, 8), (3, 3), (5, 11), (0, 4)])
def test_the_sign_test_counts_every_outcome(difference: int, discordant: int) -> None:
    outcomes = [abs(sum(steps)) >= difference for steps in product((-1, 1), repeat=discordant)]
    lost = (discordant - difference) // 2
    assert mcnemar(lost, discordant - lost) == pytest.approx(float(Fraction(sum(outcomes), len(outcomes))))


def test_the_sign_test_survives_thousands_of_images() -> None:
    assert 0 < mcnemar(2250, 2750) < 1e-11


def test_what_the_cut_lost_and_what_came_back_without_training_is_told(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    expected = (
        "Pruning: teacher 98.33\u00a0%, as cut 11.11\u00a0%, 61.11\u00a0% once recovered without training or labels: "
        "37.22\u00a0points below the teacher."
    )
    assert gain.recovered(report, 2) == expected
    assert gain.sentences(report, summary.decimals(report))[0] in render(report, tmp_path)
    alone = build_report(tmp_path / "alone", ("source", "prune", "ptq", "export", "bench"))
    assert gain.recovered(alone, 2) == (
        f"{expected} A short distillation would likely give back about 9.31\u00a0points (docs/pruning.md)."
    )
    assert gain.recovered(build_report(tmp_path / "unpruned", ("source", "distill", "ptq", "qat", "export")), 2) is None


UNTRAINED = ("source", "prune", "ptq", "export", "bench")


def test_a_run_without_training_says_what_pruning_and_int8_each_gained(tmp_path: Path) -> None:
    report = build_report(tmp_path / "a", UNTRAINED, files=tuple(FILES)[:4])
    report = with_row(report, "student_fp32", speedup={"vs": "teacher_fp32", "ratio": 2.13, "ci95": [2.1, 2.2]})
    speed = {"vs": "student_fp32", "ratio": 1.91, "ci95": [1.9, 2.0]}
    report = with_row(report, "student_ptq_int8", speedup_vs_student_fp32=speed)
    said = gain.without_training(report)
    assert said is not None
    assert said.replace("\u00a0", " ") == (
        "Without training: pruning and solving the weights 2.13× as fast as teacher_fp32, 46 % of the size, −0.28 points; "
        "INT8 1.91× as fast as student_fp32, 26 % of the size, −0.83 points, all in ONNX Runtime."
    )
    assert said in gain.sentences(report, 2)
    assert gain.without_training(build_report(tmp_path / "b")) is None


def test_a_cut_to_a_latency_tells_predicted_measured_and_where_the_time_goes(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    (prune,) = (stage for stage in report["stages"] if stage["stage"] == "prune")
    layers = [{"name": "conv1", "before_ms": 1.0, "after_ms": 0.25}, {"name": "", "before_ms": 4.0, "after_ms": 2.0}]
    (tmp_path / prune["directory"] / "latency.json").write_text(json.dumps({"layers": layers}))
    report = with_metrics(
        report, "prune", latency_before_ms=5.0, latency_predicted_ms=2.2, latency_ms=2.25, latency_table_s=90.0
    )
    page = page_of(report, tmp_path)
    said = (
        "Latency: 5.00 ms before the cut, 2.20 ms predicted, 2.25 ms measured after it; "
        "the table of layer times took 1 min 30 s."
    )
    assert said in page
    assert re.search(r"all else[^█]+4\.00[^█]+█{16}[^█]+2\.00[^█]+█{8}[^█]+conv1[^█]+1\.00[^█]+█{4}[^█]+0\.250", page)
    assert "Where the time goes" in page
    assert "Where the time goes" not in page_of(build_report(tmp_path / "by-macs"), tmp_path / "by-macs")


def test_a_cut_that_misses_the_wanted_time_says_by_how_much(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    (section,) = (section for section in report["recipe"]["stages"] if section["stage"] == "prune")
    section["keep_latency"] = 0.5
    times = {"latency_before_ms": 5.0, "latency_predicted_ms": 2.2, "latency_table_s": 90.0}
    missed = gain.within_time(with_metrics(report, "prune", latency_ms=2.0, **times))
    assert str(missed).endswith(" It is 80.0\u00a0% of the wanted 2.50\u00a0ms: no choice of widths came nearer.")
    assert "wanted" not in str(gain.within_time(with_metrics(report, "prune", latency_ms=2.45, **times)))


def test_skipped_training_is_told_with_its_reason(tmp_path: Path) -> None:
    report = build_report(tmp_path, sections={"qat": {"skip_if_ptq_drop_below": 0.01}}, int8=build_int8())
    report = with_metrics(report, "qat", trained=0.0)
    said = (
        "Quantization-aware training was skipped: calibration alone loses 0.83 points against the float student "
        "on the tuning split, less than qat.skip_if_ptq_drop_below (1.00 points)."
    )
    for text in (page_of(report, tmp_path), text_of(report, verbose=True)):
        assert said in text
        assert "by training" not in text
        assert "QAT skipped" in text


def test_layers_put_back_to_float_are_counted(tmp_path: Path) -> None:
    report = build_report(tmp_path, sections={"qat": {"max_drop": 0.005}})
    report = with_metrics(report, "qat", float_groups=2.0)
    said = "2 layers stay in float to lose no more than 0.50 points against the float student (qat.max_drop)."
    assert said in page_of(report, tmp_path)
    assert said in text_of(report, verbose=True)


class Fact(NamedTuple):
    """One row of a file's parity."""

    met: bool | None
    value: str
    note: str


def facts(report: Report) -> dict[str, Fact]:
    """Return the first file's parity by title."""
    table = next(table for table in tables_int8.sections(report)[1].tables)
    return {
        title: Fact({"✓": True, "✗": False, "": None}[sign], value, note) for sign, title, value, note in table.rows
    }


def test_parity_shows_agreement_with_its_interval(tmp_path: Path) -> None:
    fact = facts(build_report(tmp_path, int8=build_int8()))["Agreement"]
    assert (fact.met, fact.value) == (None, "99.72\u00a0%")
    assert fact.note.replace("\u00a0", " ") == (
        "images for which both predict the same class, beside the fake-quantized network: 360 images, 95 % interval 98.46 % to 99.99 %"
    )


@pytest.mark.parametrize(("agreement", "met"), [(0.99, True), (0.9899, False)])
def test_agreement_is_judged_by_the_recipe_s_limit(tmp_path: Path, agreement: float, met: bool) -> None:
    planted = build_int8() | {"verify": {"student_int8": build_verify(agreement=agreement)}}
    report = build_report(tmp_path, int8=planted, sections={"export": {"limits": LIMITS}})
    assert facts(report)["Agreement"].met is met


@pytest.mark.parametrize(("score", "met"), [(0.97778 - 0.002, True), (0.97778 - 0.0021, False), (0.98, False)])
def test_accuracy_may_differ_by_a_fifth_of_a_point(tmp_path: Path, score: float, met: bool) -> None:
    planted = {"verify": {"student_int8": build_verify(score=score, images=10_000)}}
    assert facts(build_report(tmp_path, int8=planted))["Top-1 against PyTorch"].met is met


@pytest.mark.parametrize(("more", "met"), [(1, True), (-1, True), (2, False)])
def test_of_few_images_one_may_differ(tmp_path: Path, more: int, met: bool) -> None:
    planted = {"verify": {"student_int8": build_verify(score_reference=352 / 360, score=(352 + more) / 360)}}
    fact = facts(build_report(tmp_path, int8=planted))["Top-1 against PyTorch"]
    assert (fact.met, fact.note.endswith("at most one image wanted")) == (met, True)


def test_without_labels_no_accuracy_is_compared(tmp_path: Path) -> None:
    planted = {"verify": {"student_int8": build_verify(score_reference=None, score=None, first_divergence=None)}}
    found = facts(build_report(tmp_path, int8=planted))
    assert list(found) == ["Agreement", "First divergence", "Saturation"]
    assert found["First divergence"].value == "none"


def test_a_calibrated_file_is_held_against_itself(tmp_path: Path) -> None:
    found = facts(build_report(tmp_path, int8={"verify": {"student_ptq_int8": build_verify()}}))
    assert "Top-1 against unoptimized" in found
    assert "beside the same file without the optimizer" in found["Agreement"].note


def test_an_exceeded_limit_fails_the_run(tmp_path: Path) -> None:
    over = ["student_int8: max_float_layers: at most 0 may run in float, got 1: fc"]
    report = build_report(
        tmp_path, targets={"min_speedup": 2.5}, int8={"limits": {"student_int8": over, "student_ptq_int8": ["another"]}}
    )
    assert (report["verdict"], report["failures"]) == ("fail", over)
    assert summary.verdict_text(report) == "all targets met, 1 export limit exceeded"


def test_the_worst_tensor_comes_first_and_identical_ones_last(tmp_path: Path) -> None:
    (table,) = tables_of(build_report(tmp_path, int8=build_int8()), "student_int8: tensor by tensor")
    assert [tuple(row[:2]) for row in (table.rows[0], table.rows[-1])] == [
        ("layer4.0.conv3", "47.0 dB"),
        ("conv1", "identical"),
    ]


@pytest.mark.parametrize(
    ("possible", "said"), [([], ("impossible on this grid", "")), (["a", "b"], ("none found", "possible in 2 layers"))]
)
def test_no_saturation_is_one_line(tmp_path: Path, possible: list[str], said: tuple[str, str]) -> None:
    planted = {"verify": {"student_int8": build_verify(saturation_possible=possible)}}
    fact = facts(build_report(tmp_path, int8=planted))["Saturation"]
    assert (fact.value, fact.note) == said


def test_saturation_is_loud_and_names_the_layers_worst_first(tmp_path: Path) -> None:
    layers = [
        {"layer": "layer2.0.conv1", "max_lsb": 7, "weight_sum": 20000, "values": 0.01},
        {"layer": "conv1", "max_lsb": 61, "weight_sum": 30000, "values": 0.2},
    ]
    planted = {"verify": {"student_int8": build_verify(saturation=layers)}}
    report = build_report(tmp_path, int8=planted)
    named = "conv1 (up to 61 LSB), layer2.0.conv1 (up to 7 LSB)."
    said = (
        f"SATURATION in student_int8: 16-bit sums saturate on this machine, so the file predicts wrongly here: {named}"
    )
    assert said in text_of(report)
    assert said in page_of(report, tmp_path)


def test_the_audit_shows_the_int8_files_alone_the_trained_first(tmp_path: Path) -> None:
    planted = build_int8()
    planted["audit"] = {"student_int8_cpu_arm": build_audit(), "student_fp16": build_audit(), **planted["audit"]}
    (table,) = tables_of(build_report(tmp_path, int8=planted), "Layers")
    assert [row[0] for row in table.rows] == ["student_int8", "student_ptq_int8", "student_int8_cpu_arm"]


@pytest.mark.parametrize(
    ("changes", "title", "met"),
    [
        ({}, "Float", True),
        ({"float_layers": ["fc", "conv1"]}, "Float", False),
        ({"float_fraction": 0.0001}, "MACs in float", True),
        ({"float_fraction": 0.00011}, "MACs in float", False),
        ({"float_fraction": None}, "MACs in float", False),
        ({}, "Q/DQ", True),
        ({"leftover_qdq": ["relu/QuantizeLinear"]}, "Q/DQ", False),
        ({}, "Int", None),
    ],
)
def test_the_recipe_s_limits_are_shown_as_met_or_missed(
    tmp_path: Path, changes: dict[str, Any], title: str, met: bool | None
) -> None:
    audits = {"student_int8": build_audit(**changes), "student_ptq_int8": build_audit(**changes)}
    report = build_report(tmp_path, int8={"audit": audits}, sections={"export": {"limits": LIMITS}})
    (table,) = tables_of(report, "Layers")
    deployed, other = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert {"✓": True, "✗": False}.get(deployed[title][0]) is met
    assert other[title][0] not in "✓✗"  # the limits speak of the deployed file


def test_what_runs_in_float_is_named_with_its_reason(tmp_path: Path) -> None:
    report = build_report(tmp_path, int8=build_int8())
    for text in (page_of(report, tmp_path), text_of(report, verbose=True)):
        assert "its weights are float in the file: it was not quantized" in text
        assert "Softmax" in text
    assert "53 layers in integers" in page_of(report, tmp_path)
    report["float_times"] = {"student_int8": {"whole": 2.5, "modules": {"fc": 0.125}}}
    (table,) = tables_of(report, "student_int8 ·")
    assert [row[2] for row in table.rows if row[:2] == ("layer in float", "fc")] == ["0.125"]
    assert "0.125 of 2.500 ms" in table.note


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("student_ptq_int8_tensorrt", "Student INT8 (PTQ), tensorrt"),
        ("student_int8_cpu_avx2", "Student INT8, cpu_avx2"),
        ("student_int8", "Student INT8"),
        ("mine", "mine"),
    ],
)
def test_files_of_further_targets_have_titles(name: str, title: str) -> None:
    assert summary.title(name) == title


def test_a_strange_file_name_is_ordered_last_and_gets_no_style(tmp_path: Path) -> None:
    report = build_report(tmp_path)
    report["deployed"].insert(0, {**report["deployed"][0], "name": "x;background:red"})
    assert "background:red" not in page_of(report, tmp_path).replace("x;background:red</td>", "")
    names = [row["name"] for row in summary.ordered(report["deployed"])]
    assert names[names.index("x;background:red") - 1] == "student_int8"


def test_a_further_target_s_file_is_in_the_tables_and_never_the_headline(tmp_path: Path) -> None:
    report = build_report(tmp_path, files=(*FILES, "student_int8_cpu_arm"))
    report = with_row(report, "student_int8_cpu_arm", score=1.0, p50_ms=0.5)
    page = page_of(report, tmp_path)
    assert "student_int8_cpu_arm" in page
    assert "A file named after another target" in page
    assert summary.headline(report).rows[0][1] == "97.8\u00a0%"


def test_every_name_is_escaped(tmp_path: Path) -> None:
    evil = "</style><script>alert('x')</script>"
    ptq = json.loads(json.dumps(build_ptq()).replace("layer1.0.conv2", evil).replace("31 of 53", evil))
    ptq["targets"][evil] = ptq["targets"]["cpu_avx2"]
    audit = build_audit(
        float_layers=[evil], reasons={evil: evil}, float_operators={evil: evil}, copies=[evil], operators={evil: 1},
        integer_layers=[evil], provider=evil,
    )  # fmt: skip
    verify = build_verify(
        first_divergence=evil, saturation=[{"layer": evil, "max_lsb": 1, "weight_sum": 1, "values": 0.1}]
    )
    verify["tensors"][0]["name"] = evil
    name = f"student_int8_{evil}"
    report = build_report(tmp_path, int8={"ptq": ptq, "audit": {name: audit}, "verify": {name: verify}})
    page = render(report, tmp_path)
    assert "<script" not in page
    assert page.count("</style>") == 1
    assert evil in text_of(report, verbose=True)


def test_on_cuda_the_deployed_file_is_fp16_timed_there(tmp_path: Path) -> None:
    stages = ("source", "prune", "distill", "export", "bench")
    files = ("teacher_fp32", "student_fp32", "student_fp16")
    run: dict[str, Any] = {"target": "cuda", "files": files}
    gpu = build_report(tmp_path / "gpu", stages, {"min_speedup": 1.7}, **run, providers=(CPU, CUDA))
    assert judge(gpu) == ("pass", [])  # 1.52 ms over 0.861 ms; on the CPU it would be 1.86
    assert "CUDA · batch 1" in summary.headline(gpu).rows[3][3]
    cpu = build_report(tmp_path / "cpu", stages, {"min_speedup": 1.7}, **run)
    assert cpu["failures"] == ["min_speedup: wanted at least 1.70×, not measured (CUDA, batch 1)"]
    assert summary.headline(cpu).rows[1][1] == f"{facts_of('student_fp16')[3]}\u00a0MB"


def test_the_terminal_shows_the_sensitive_layers_only_when_verbose(tmp_path: Path) -> None:
    report = build_report(tmp_path, int8=build_int8())
    assert [text_of(report, verbose=verbose).count("█ ") for verbose in (False, True)] == [0, 10]
