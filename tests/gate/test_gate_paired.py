"""The statistics of the gate on accuracy, each against an independent computation."""

import json
import math

import numpy as np
import pytest

from export.gate.accuracy import accuracy_checks, images_check, power_note, score_check
from export.gate.checks import Check
from export.gate.predictions import Predictions, pair, predictions_from_json
from export.tasks.classification import CLASSIFICATION
from export.tasks.paired import compare_classes, detectable_loss, mcnemar
from export.tasks.task import Array, Comparison

CLASSES = ("cat", "dog", "gnu")


def predictions(*words: str) -> Predictions:
    """Predictions from `label:prediction` words, the images numbered."""
    rows: dict[str, tuple[str, tuple[float, ...]]] = {}
    for index, word in enumerate(words):
        label, _, answer = word.partition(":")
        rows[f"{index:016x}"] = (label, (float(CLASSES.index(label)), float(CLASSES.index(answer))))
    return Predictions(CLASSIFICATION, CLASSES, rows)


def of_counts(right: int, lost: int, gained: int, wrong: int = 0) -> tuple[Predictions, Predictions]:
    """Two files' predictions, given the numbers of images right in both, lost, gained and wrong in both."""
    before = ["cat:cat"] * (right + lost) + ["cat:dog"] * (gained + wrong)
    now = ["cat:cat"] * right + ["cat:dog"] * lost + ["cat:cat"] * gained + ["cat:dog"] * wrong
    return predictions(*before), predictions(*now)


def compared(before: Predictions, now: Predictions) -> Comparison:
    found = pair(before, now)
    assert found is not None
    return found


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (6, 0), (0, 6), (10, 0), (3, 9), (30, 10), (700, 640)])
def test_mcnemar_is_the_two_sided_binomial_test(lost: int, gained: int) -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_ten_images_lost_and_none_gained_are_no_chance() -> None:
    assert mcnemar(10, 0) == 2 / 2**10


def test_pairs_are_counted_by_hand() -> None:
    before = predictions("cat:cat", "cat:dog", "dog:dog", "dog:dog", "gnu:cat", "gnu:gnu")
    now = predictions("cat:cat", "cat:cat", "dog:gnu", "dog:cat", "gnu:dog", "gnu:gnu")
    found = compared(before, now)
    assert (found.images, found.before, found.now, found.changed) == (6, 4 / 6, 3 / 6, 4 / 6)
    assert found.counts.startswith("2 lost, 1 gained, 4 flipped of 6")
    assert found.worse == ("dog (2 lost, 0 gained)",)


def test_images_are_paired_by_digest_not_by_order() -> None:
    before = predictions("cat:cat", "dog:dog", "gnu:dog")
    now = Predictions(CLASSIFICATION, CLASSES, dict(reversed(before.rows.items())))
    assert compared(before, now).changed == 0


def test_answers_survive_json() -> None:
    before = predictions("cat:cat", "cat:dog", "gnu:cat")
    assert predictions_from_json(CLASSIFICATION, CLASSES, json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.parametrize(("images", "churn"), [(1000, 0.0), (1000, 0.02), (5000, 0.015), (20000, 0.03)])
def test_the_detectable_loss_is_found_in_four_of_five_simulations(images: int, churn: float) -> None:
    loss = detectable_loss(images, churn)
    changing = max(churn, loss)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(images, [(changing + loss) / 2, (changing - loss) / 2, 1 - changing], size=500)
    found = np.mean([mcnemar(int(lost), int(gained)) < 0.05 and lost > gained for lost, gained, _ in drawn])
    assert 0.73 < found < 0.87


def test_fewer_images_than_flips_that_count_detect_nothing() -> None:
    assert detectable_loss(5, 0.0) >= 1.0


def test_a_sure_loss_beyond_the_limit_fails() -> None:
    checks, _ = accuracy_checks(*of_counts(right=980, lost=10, gained=0, wrong=10), 0.995, same_file=False)
    assert named(checks, "top-1").status == "fail"
    assert "10 lost, 0 gained, 10 flipped of 1000, p = 0.002" in named(checks, "top-1").detail


def test_a_sure_loss_within_the_limit_passes() -> None:
    checks, _ = accuracy_checks(*of_counts(right=9980, lost=10, gained=0, wrong=10), 0.995, same_file=False)
    assert named(checks, "top-1").status == "pass"


def test_a_loss_beyond_the_limit_that_may_be_chance_is_inconclusive() -> None:
    checks, _ = accuracy_checks(*of_counts(right=300, lost=5, gained=1), 0.995, same_file=False)
    assert named(checks, "top-1").status == "inconclusive"
    assert "give more images" in named(checks, "top-1").detail


@pytest.mark.parametrize(("same_file", "status"), [(True, "unexplained"), (False, "pass")])
def test_only_another_file_may_answer_better(same_file: bool, status: str) -> None:
    assert (
        score_check(compared(*of_counts(900, 0, 20, 80)), 0.995, CLASSIFICATION.metric, same_file=same_file).status
        == status
    )


def test_equal_files_that_churn_fail_in_less_than_one_gate_of_forty() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(1000, [0.02, 0.02, 0.96], size=200)
    failed = sum(
        score_check(
            compared(*of_counts(int(right), int(lost), int(gained))), 0.999, CLASSIFICATION.metric, same_file=False
        ).status
        == "fail"
        for lost, gained, right in drawn.tolist()
    )
    assert failed / 200 < 0.025 + 0.025


def test_a_class_that_is_lost_shows_though_the_whole_hides_it() -> None:
    others = ["cat:cat"] * 960 + ["dog:gnu"] * 20
    before = predictions(*others, *["gnu:gnu"] * 20)
    now = predictions(*["cat:cat"] * 960, *["dog:dog"] * 20, *["gnu:cat"] * 20)
    checks, _ = accuracy_checks(before, now, 0.995, same_file=False)
    assert (named(checks, "top-1").status, named(checks, "single classes").status) == ("pass", "fail")
    assert named(checks, "single classes").detail == "gnu (20 lost, 0 gained)"


def test_images_that_are_gone_or_moved_leave_no_verdict() -> None:
    before = predictions("cat:cat", "dog:dog", "gnu:gnu")
    now = Predictions(CLASSIFICATION, CLASSES, dict.fromkeys(list(before.rows)[:2], ("cat", (0.0, 0.0))))
    check = images_check(before, now)
    assert check.status == "inconclusive"
    assert "1 of the baseline's images are not in the data, 1 have another label" in check.detail


def test_no_common_image_is_inconclusive() -> None:
    before = predictions("cat:cat")
    checks, notes = accuracy_checks(
        before, Predictions(CLASSIFICATION, CLASSES, {"f" * 16: ("cat", (0.0, 0.0))}), 0.995, same_file=False
    )
    assert ([check.status for check in checks], notes) == (["inconclusive"], [])


def test_the_note_says_when_the_images_are_too_few_for_the_limit() -> None:
    few, many = (power_note(compared(*of_counts(count, 0, 0)), 0.99) for count in (300, 30_000))
    smallest = math.ceil(1e4 * detectable_loss(300, 0)) / 1e2
    assert f"a loss of {smallest:.1f}"[:14] in few
    assert "more than the limit allows (1.00 points)" in few
    assert "more than the limit" not in many


def by_resampling(before: Array, now: Array) -> Comparison:
    """Compare the means of rows (n, 1)."""
    return compare_classes(
        before,
        now,
        ("mean",),
        resampled=lambda rows, weights: weights @ rows / len(rows),
        measure="mean",
        changed=np.any(before != now, axis=1),
        how="different",
    )


def test_the_bootstrap_finds_what_mcnemar_finds() -> None:
    generator = np.random.default_rng(0)
    for lost, gained in ((0, 0), (30, 28), (60, 20), (12, 3)):
        before, now = np.zeros((1000, 1)), np.zeros((1000, 1))
        before[: 500 + lost], now[lost : 500 + lost + gained] = 1, 1
        order = generator.permutation(1000)
        found = by_resampling(before[order], now[order])
        assert found.now - found.before == pytest.approx((gained - lost) / 1000)
        assert (found.p_value < 0.05) == (mcnemar(lost, gained) < 0.05)
        assert found.detectable == pytest.approx(detectable_loss(1000, (lost + gained) / 1000), rel=0.3, abs=6e-3)


def test_the_smallest_loss_that_is_detected_grows_with_the_change_and_is_no_lost_image_where_nothing_changed() -> None:
    generator = np.random.default_rng(0)
    before = generator.beta(8, 2, (61, 1))
    moved = [np.clip(before + spread * generator.normal(size=before.shape), 0, 1) for spread in (0, 0.01, 0.3)]
    losses = [by_resampling(before, now).detectable for now in moved]
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(6 * before.std() / 61, rel=0.05)
    assert losses[0] < detectable_loss(61, 0.0) / 4


def test_the_smallest_loss_without_a_change_is_found_in_four_of_five_simulations() -> None:
    generator, found = np.random.default_rng(0), []
    for _ in range(100):
        before = generator.beta(8, 2, (61, 1))
        lost = before.std() * (generator.random(before.shape) < 6 / 61)
        comparison = by_resampling(before, before - lost)
        found.append(comparison.p_value < 0.05)
    assert 0.7 < np.mean(found) < 0.95
