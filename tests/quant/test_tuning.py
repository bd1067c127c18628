"""Tuning with plain callables: what is tried, when it stops, what is chosen, what is kept; and the order of damage that it follows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from answered import answered
from networks import Residual, lively
from torch import Tensor, fx, nn

from compress.quant.calibrate import calibrate_
from compress.quant.prepare import groups, prepare
from compress.quant.rows import GroupRow, TrialRow
from compress.quant.sensitivity import sensitivity
from compress.quant.tuning import (
    Trial,
    choose,
    fallback_trials,
    file_of,
    judge_of,
    nearest_first,
    timed,
    until_one_holds,
)
from export.onnx_file.targets import TARGETS
from export.runtime.accuracy import Score
from export.runtime.latency import Ratio

IMAGES = 100
LABELS = np.arange(IMAGES) % 10
MINMAX, PERCENTILE, ENTROPY = (Trial("int8", method) for method in ("minmax", "percentile", "entropy"))


def score_with(mistakes: int) -> Score:
    predictions = LABELS.copy()
    predictions[:mistakes] = (predictions[:mistakes] + 1) % 10
    logits = 5 * np.eye(10, dtype=np.float32)[predictions]
    return replace(answered(predictions, LABELS), evidence=logits)


class Bench:
    """Builds a file that holds the number of its mistakes, and counts what it built."""

    def __init__(self, mistakes: dict[Trial, int]) -> None:
        self.mistakes = mistakes
        self.built: list[Trial] = []

    def build(self, trial: Trial, path: Path) -> None:
        self.built.append(trial)
        path.write_text(str(self.mistakes[trial]))

    def judge(
        self, folder: Path, *, max_drop: float, tell: Callable[[TrialRow], None] = lambda _: None
    ) -> Callable[[Trial], TrialRow]:
        return judge_of(
            self.build,
            lambda path: score_with(int(path.read_text())),
            baseline=score_with(5),
            max_drop=max_drop,
            folder=folder,
            faster=lambda path: Ratio(ratio, ratio - 1, ratio + 1) if (ratio := float(path.read_text())) else None,
            tell=tell,
        )


def test_trying_stops_at_the_first_trial_that_holds(tmp_path: Path) -> None:
    bench = Bench({MINMAX: 20, PERCENTILE: 6, ENTROPY: 5})
    results = until_one_holds(tuple(bench.mistakes), bench.judge(tmp_path, max_drop=0.01))
    assert bench.built == [MINMAX, PERCENTILE]
    assert [result["met"] for result in results] == [False, True]


def test_a_result_says_what_was_lost_and_how_fast_it_is(tmp_path: Path) -> None:
    result = Bench({MINMAX: 20}).judge(tmp_path, max_drop=0.01)(MINMAX)
    assert result["score"] == pytest.approx(0.80)
    assert result["drop"] == pytest.approx(0.15)
    assert result["agreement"] == pytest.approx(0.85)  # the first five are wrong in the same way
    right, wrong = (
        np.exp(5) / (np.exp(5) + 9),
        1 / (np.exp(5) + 9),
    )  # two of ten probabilities change places in 15 of 100 images
    assert result["kl"] == pytest.approx(0.15 * (right - wrong) * 5)
    assert result["latency_ratio"] == 20.0
    assert result == {
        "number_format": "int8", "calibration": "minmax", "keep_float": [], "engine": "compress", "score": result["score"],
        "drop": result["drop"], "agreement": result["agreement"], "kl": result["kl"], "latency_ratio": 20.0,
        "latency_ci95": [19.0, 21.0], "met": False,
    }  # fmt: skip


def test_a_trial_better_than_the_float_network_holds(tmp_path: Path) -> None:
    result = Bench({MINMAX: 3}).judge(tmp_path, max_drop=0.0)(MINMAX)
    assert result["met"]
    assert result["drop"] == pytest.approx(-0.02)


def test_a_loss_of_just_the_limit_holds(tmp_path: Path) -> None:
    """0.95 - 0.94 is 0.010000000000000009."""
    assert Bench({MINMAX: 6}).judge(tmp_path, max_drop=0.01)(MINMAX)["met"]


def test_a_trial_that_was_judged_is_not_built_again(tmp_path: Path) -> None:
    first, second = Bench({MINMAX: 20, PERCENTILE: 12}), Bench({MINMAX: 20, PERCENTILE: 12, ENTROPY: 6})
    before, after = (
        until_one_holds(tuple(bench.mistakes), bench.judge(tmp_path, max_drop=0.01)) for bench in (first, second)
    )
    assert second.built == [ENTROPY]
    assert after[:2] == before
    assert file_of(MINMAX, tmp_path).read_text() == "20"


def test_files_near_the_best_on_few_images_are_judged_on_all(tmp_path: Path) -> None:
    bench = Bench({MINMAX: 6, PERCENTILE: 6, ENTROPY: 6})
    nearest_first(
        [MINMAX, PERCENTILE, ENTROPY],
        {MINMAX: 0.02, PERCENTILE: 0.011, ENTROPY: 0.01},
        bench.judge(tmp_path, max_drop=0.01),
    )
    assert bench.built == [ENTROPY, PERCENTILE]


def test_where_no_file_near_the_best_holds_the_next_are_judged_up_to_one_that_does(tmp_path: Path) -> None:
    bench = Bench({MINMAX: 6, PERCENTILE: 20, ENTROPY: 30})
    kl = {MINMAX: 0.03, PERCENTILE: 0.02, ENTROPY: 0.01}
    results = nearest_first([MINMAX, PERCENTILE, ENTROPY], kl, bench.judge(tmp_path, max_drop=0.01))
    assert bench.built == [ENTROPY, PERCENTILE, MINMAX]
    assert [row["met"] for row in results] == [False, False, True]


def test_every_result_is_told_as_it_comes(tmp_path: Path) -> None:
    told: list[TrialRow] = []
    bench = Bench({MINMAX: 20, PERCENTILE: 6})
    results = until_one_holds(tuple(bench.mistakes), bench.judge(tmp_path, max_drop=0.01, tell=told.append))
    assert tuple(told) == results


def test_an_error_while_building_ends_the_tuning_with_itself(tmp_path: Path) -> None:
    def build(_: Trial, __: Path) -> None:
        raise ZeroDivisionError("while building")

    judge = judge_of(build, lambda _: score_with(0), baseline=score_with(0), max_drop=0.0, folder=tmp_path)
    with pytest.raises(ZeroDivisionError, match="while building"):
        judge(MINMAX)


def test_fallbacks_double_the_groups_in_float_and_end_with_fp16() -> None:
    worst = tuple("abcdefghij")
    trials = fallback_trials("entropy", worst, 12)
    assert [len(trial.keep_float) for trial in trials] == [1, 2, 4, 8, 0]
    assert [trial.keep_float for trial in trials[:-1]] == [worst[:1], worst[:2], worst[:4], worst[:8]]
    assert {trial.calibration for trial in trials[:-1]} == {"entropy"}
    assert trials[-1].number_format == "fp16"


def test_fp16_keeps_its_place_when_trials_are_few() -> None:
    assert [trial.number_format for trial in fallback_trials("minmax", tuple("abcdefgh"), 2)] == ["int8", "fp16"]
    assert fallback_trials("minmax", tuple("abcdefgh"), 0) == ()


def test_all_groups_in_float_is_no_trial() -> None:
    assert [len(trial.keep_float) for trial in fallback_trials("minmax", tuple("abcd"), 12)] == [1, 2, 0]


def result(trial: Trial, kl: float, *, met: bool, speed: tuple[float, float] | None = None) -> TrialRow:
    return TrialRow(
        number_format=trial.number_format,
        calibration=trial.calibration,
        keep_float=list(trial.keep_float),
        engine=trial.engine,
        score=0.8,
        drop=0.0,
        agreement=0.9,
        kl=kl,
        latency_ratio=speed and speed[0],
        latency_ci95=speed and list(speed),
        met=met,
    )


def test_the_best_is_chosen_and_not_the_first_that_holds() -> None:
    held = [result(MINMAX, 0.05, met=True), result(PERCENTILE, 0.01, met=True), result(ENTROPY, 0.03, met=True)]
    assert choose(held) == 1


def test_choosing_prefers_a_trial_that_holds_to_one_closer_to_the_float_network() -> None:
    assert choose([result(MINMAX, 0.01, met=False), result(PERCENTILE, 0.05, met=True)]) == 1


def test_of_equals_the_earlier_is_chosen() -> None:
    held = [result(MINMAX, 0.1, met=True), result(PERCENTILE, 0.05, met=True), result(ENTROPY, 0.05, met=True)]
    assert choose(held) == 1


OTHERS = Trial("int8", "minmax", engine="onnxruntime")


def test_another_engine_s_file_is_chosen_where_it_holds_and_ours_does_not() -> None:
    assert choose([result(MINMAX, 0.01, met=False), result(OTHERS, 0.05, met=True)]) == 1


@pytest.mark.parametrize(("low", "chosen"), [(2.11, 1), (2.09, 0)])
def test_of_two_engines_the_faster_is_chosen_where_the_intervals_part_else_the_closer(low: float, chosen: int) -> None:
    ours, others = result(MINMAX, 0.01, met=True, speed=(1.9, 2.1)), result(OTHERS, 0.05, met=True, speed=(low, 2.5))
    assert choose([ours, others]) == chosen


def test_without_times_another_engine_s_closer_file_is_no_better_than_ours() -> None:
    assert choose([result(MINMAX, 0.05, met=True), result(OTHERS, 0.01, met=True)]) == 0


def test_the_files_of_one_engine_are_not_told_apart_by_time() -> None:
    slow, fast = (result(trial, kl, met=True, speed=(2 * kl, 2.1 * kl)) for trial, kl in ((MINMAX, 1), (ENTROPY, 2)))
    assert choose([fast, slow]) == 1


def test_each_engines_best_is_timed_and_the_best_int8_file_where_fp16_is_chosen() -> None:
    asked: list[Trial] = []

    def faster(trial: Trial) -> Ratio:
        asked.append(trial)
        return Ratio(2.0, 1.9, 2.1)

    held = [result(MINMAX, 0.05, met=True), result(PERCENTILE, 0.01, met=True), result(OTHERS, 0.02, met=False)]
    assert [row["latency_ratio"] for row in timed(held, faster)] == [None, 2.0, None]
    half = Trial("fp16", "none")
    lost = [result(MINMAX, 0.05, met=False), result(OTHERS, 0.02, met=False), result(half, 0.001, met=True)]
    assert [row["latency_ratio"] for row in timed(lost, faster)] == [2.0, 2.0, 2.0]
    assert asked == [PERCENTILE, MINMAX, OTHERS, half]


def test_where_nothing_holds_the_best_is_chosen() -> None:
    assert choose([result(MINMAX, 0.1, met=False), result(PERCENTILE, 0.07, met=False)]) == 1


def network() -> Residual:
    torch.manual_seed(0)
    model = Residual(5, width=8)
    lively(model)
    return model


@pytest.fixture(scope="module")
def prepared() -> fx.GraphModule:
    model = prepare(network(), TARGETS["cpu_avx2"], torch.zeros(1, 3, 16, 16))
    calibrate_(model, [batch for batch, _ in labelled(2)], "minmax")
    return model


def labelled(batches: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 3, 16, 16, generator=generator), torch.randint(5, (16,), generator=generator))
        for _ in range(batches)
    ]


def damage(model: fx.GraphModule, batches: list[tuple[Tensor, Tensor]]) -> tuple[GroupRow, ...]:
    truth = torch.cat([labels for _, labels in batches])

    def score(outputs: Tensor) -> float:
        return float((outputs.argmax(1) == truth).double().mean())

    return sensitivity(model, [images for images, _ in batches], rows=lambda outputs: outputs, score=score)


def test_every_layer_has_its_sensitivity_worst_first(prepared: fx.GraphModule) -> None:
    found = damage(prepared, labelled(2))
    assert sorted(group["group"] for group in found) == sorted(groups(prepared))
    assert [group["kl"] for group in found] == sorted((group["kl"] for group in found), reverse=True)
    assert all(group["kl"] > 0 for group in found)


def test_the_heads_sensitivity_is_that_of_its_rounded_weights_alone(prepared: fx.GraphModule) -> None:
    """No grid follows the last layer, so rounding its weights by hand is all that its group does."""
    model = network()
    (images, labels), *_ = labelled(1)
    with torch.no_grad():
        reference = model(images)
        weight = model.head.weight
        scale = weight.abs().amax(1, keepdim=True) / 63
        weight.copy_((weight / scale).round() * scale)
        answers = model(images)
    p, q = reference.double().softmax(1), answers.double().softmax(1)
    found = {group["group"]: group for group in damage(prepared, [(images, labels)])}["head"]
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=0.02)
    right = [float((logits.argmax(1) == labels).double().mean()) for logits in (reference, answers)]
    assert found["drop"] == pytest.approx(right[0] - right[1])


def test_a_layer_whose_weights_round_to_nothing_is_the_worst() -> None:
    model = network()
    with torch.no_grad():  # a huge weight on an input that is always zero
        for norm in (model.stem[1], model.block1.bn2):
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight[0] = norm.bias[0] = 0
        model.block2.conv1.weight[:, 0] = 1000
    planted = prepare(model, TARGETS["cpu_vnni"], torch.zeros(1, 3, 16, 16))
    calibrate_(planted, [batch for batch, _ in labelled(2)], "minmax")
    worst, second, *_ = damage(planted, labelled(2))
    assert worst["group"] == "block2.conv1"
    assert worst["kl"] > 10 * second["kl"]


def test_measuring_sensitivity_leaves_everything_quantizing(prepared: fx.GraphModule) -> None:
    images = labelled(1)[0][0]
    with torch.no_grad():
        before = prepared(images)
        damage(prepared, labelled(1))
        assert torch.equal(prepared(images), before)
