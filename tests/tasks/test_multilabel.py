"""What multi-label networks answer: scores against scikit-learn, comparisons, and losses of independent sigmoids by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from compress.data.images import ArrayImages
from compress.data.mixing import Mixes, mix
from compress.distillation.logits import kd_loss, mse_loss
from compress.distillation.step import check_task
from compress.errors import CompressError, RecipeError
from compress.recipe.losses import CrossEntropyTerm, DiceTerm, DISTTerm, DKDTerm, KDTerm, MSETerm, NKDTerm
from compress.recipe.read import read_recipe
from compress.report.judge.classes import at_chance
from compress.tasks.multilabel import MULTILABEL as TASK
from export.errors import BundleError
from export.tasks.multilabel import MULTILABEL, average_precision, by_chance, ranking
from export.tasks.task import Array

LABELS = ("cat", "dog", "hat")
TRUTHS = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], np.float32)
LOGITS = np.array([[2.0, -1, -3], [0.5, 3, -2], [-9, -9, -9]], np.float32)
ROWS = MULTILABEL.statistics(MULTILABEL.decode(LOGITS), TRUTHS, (3,))


def guessed(images: int, *, noise: float, seed: int = 0, classes: int = 3) -> Array:
    """Return rows of a file whose logits are the truths and noise; probabilities have two digits, so that many are equal."""
    random = np.random.default_rng(seed)
    truths = (random.random((images, classes)) < 0.3).astype(np.float32)
    logits = truths * 2 - 1 + noise * random.normal(size=truths.shape)
    return MULTILABEL.statistics(MULTILABEL.decode(logits).round(2), truths, (classes,))


@pytest.mark.parametrize("noise", [0.0, 1.0, 5.0])
def test_the_score_is_scikit_learns_macro_average_precision(noise: float) -> None:
    rows = guessed(200, noise=noise)
    truths, found = rows[:, :3], rows[:, 3:]
    assert average_precision(rows) == pytest.approx(average_precision_score(truths, found, average=None))
    assert MULTILABEL.total(rows) == pytest.approx(average_precision_score(truths, found))
    drawn = np.random.default_rng(1).integers(0, 200, 200)
    weighted = ranking(rows).precision(np.bincount(drawn, minlength=200).astype(float))
    assert weighted == pytest.approx(average_precision_score(truths[drawn], found[drawn], average=None))


def test_a_class_that_no_image_has_is_in_no_mean() -> None:
    rows = ROWS[1:]
    assert np.isnan(average_precision(rows)).tolist() == [True, False, True]
    assert MULTILABEL.total(rows) == 1
    assert MULTILABEL.total(ROWS[2:]) == 0


def test_labels_are_given_from_a_probability_of_a_half_and_counted_by_class() -> None:
    found = MULTILABEL.by_class({"a": ROWS}, LABELS, ())
    assert found is not None
    assert found["images"] == [1, 1, 1]
    assert (found["files"]["a"]["correct"], found["files"]["a"]["answered"]) == ([1, 1, 0], [2, 1, 0])
    assert found["files"]["a"]["scores"] == [1, 1, 0.5]
    assert MULTILABEL.further(ROWS) == {"F1": pytest.approx(2 * 2 / (3 + 3)), "all labels right": pytest.approx(1 / 3)}
    assert MULTILABEL.show(LOGITS[1], LABELS, 5) == (
        ("label", "probability"),
        [("dog", pytest.approx(1 / (1 + math.exp(-3)))), ("cat", pytest.approx(1 / (1 + math.exp(-0.5))))],
    )
    assert [MULTILABEL.truth_text(row, LABELS) for row in ROWS] == ["cat, hat", "dog", "nothing"]
    assert np.isfinite(MULTILABEL.decode(np.array([[np.nan, np.inf, -np.inf]]))).all()


def test_labels_pass_through_json_and_what_is_none_is_refused() -> None:
    words = MULTILABEL.truths_json(TRUTHS)
    assert words == [[0, 2], [1], []]
    assert np.array_equal(MULTILABEL.truths(words, (3,)), TRUTHS)
    for bad in ([3], [-1], [True], 1, ["0"]):
        with pytest.raises(BundleError, match=r"golden\.truths: must be lists of integers below 3"):
            MULTILABEL.truths([bad], (3,))


def test_agreement_and_divergence_look_at_each_label_alone() -> None:
    answers = MULTILABEL.decode(LOGITS)
    assert MULTILABEL.agreement(answers, 1 - answers).tolist() == [0, 0, 0]
    assert MULTILABEL.agreement(answers, TRUTHS).tolist() == pytest.approx([2 / 3, 2 / 3, 1])
    assert MULTILABEL.divergence(LOGITS, LOGITS) == pytest.approx([0, 0, 0])
    logits, others = np.array([[0.0, 1.0]]), np.array([[0.0, -1.0]])
    p = 1 / (1 + math.exp(1))
    by_hand = (p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 2
    assert MULTILABEL.divergence(logits, others) == pytest.approx([by_hand])


def test_what_ignores_the_images_is_at_chance_near_the_prevalence() -> None:
    rows = guessed(400, noise=1.0)
    blind, constant = rows.copy(), rows.copy()
    blind[:, 3:] = np.random.default_rng(5).random((400, 3))
    constant[:, 3:] = 0.2
    files = {"teacher_fp32": rows, "student_fp32": blind, "student_int8": constant}
    found = MULTILABEL.by_class(files, LABELS, ())
    assert found is not None
    expected, probability = by_chance(rows)
    assert expected == pytest.approx(rows[:, :3].mean(), abs=0.03)
    assert probability == 1 / 200
    assert by_chance(constant)[1] == 1
    told = at_chance(found, files)
    assert set(told) == {"student_fp32", "student_int8"}
    assert "predicts at chance: its mean AP is 28.58" in told["student_int8"]
    assert "by guessing (p = 1.0)" in told["student_int8"]


def test_equal_files_are_no_loss_and_a_lost_class_is_named() -> None:
    before = guessed(200, noise=0.5)
    worse = before.copy()
    worse[:, 4] = np.random.default_rng(3).permutation(worse[:, 4])
    equal = MULTILABEL.compare(before, before, LABELS)
    assert (equal.p_value, equal.changed, equal.lost) == (1.0, 0.0, ())
    found = MULTILABEL.compare(before, worse, LABELS)
    assert found.p_value < 0.01
    assert found.now < found.before
    assert [text.split(" ")[0] for text in found.lost] == ["dog"]


def test_the_loss_is_binary_cross_entropy_whose_labels_can_be_weighed() -> None:
    outputs, truths = torch.from_numpy(LOGITS), torch.from_numpy(TRUTHS)
    p = outputs.sigmoid()
    by_hand = -(truths * p.log() + (1 - truths) * (1 - p).log())
    assert float(TASK.loss(outputs, truths, label_smoothing=0.0)) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    smooth = 0.9 * truths + 0.05
    by_hand = -(smooth * p.log() + (1 - smooth) * (1 - p).log())
    assert float(TASK.loss(outputs, truths, label_smoothing=0.1)) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert TASK.class_weights is not None
    many = torch.tensor([[1.0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    weights = TASK.class_weights(ArrayImages(np.zeros((4, 2, 2, 3), np.uint8), many), 3)
    assert weights.tolist() == pytest.approx([1 / 3, 3, 3])
    weighed = TASK.loss(torch.zeros(4, 3), many, label_smoothing=0.0, weights=weights)
    assert float(weighed) == pytest.approx((1 * 2 + 3 * 2 + 3 * 2) / 12 * math.log(2), rel=1e-5)


def test_soft_targets_are_matched_sigmoid_by_sigmoid() -> None:
    student = torch.from_numpy(LOGITS) + torch.tensor([0.5, -1.0, 2.0])
    s, t = (TASK.rows(part, torch.from_numpy(TRUTHS)) for part in (student, torch.from_numpy(LOGITS)))
    wanted = (torch.from_numpy(LOGITS) / 2).sigmoid()
    crossed, least = (F.binary_cross_entropy_with_logits(z / 2, wanted) for z in (student, torch.from_numpy(LOGITS)))
    assert float(kd_loss(s, t, temperature=2.0)) == pytest.approx(4 * float(crossed - least), rel=1e-4)
    assert float(mse_loss(s, t)) == pytest.approx((0.25 + 1 + 4) / 3 / 2)
    assert TASK.truth_rows(student, torch.from_numpy(TRUTHS)).tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 0]


def test_losses_that_compare_classes_are_refused() -> None:
    check_task(
        [CrossEntropyTerm(name="cross_entropy", label_smoothing=0.1), KDTerm(name="kd"), MSETerm(name="mse")], TASK
    )
    for term in (DiceTerm(name="dice"), DKDTerm(name="dkd"), DISTTerm(name="dist"), NKDTerm(name="nkd")):
        with pytest.raises(CompressError, match=f"loss {term.name}: compares an image's classes.* use kd or mse"):
            check_task([term], TASK)
    with pytest.raises(CompressError, match="loss kd with standardize: compares"):
        check_task([KDTerm(name="kd", standardize=True)], TASK)
    with pytest.raises(RecipeError, match=r"teaching\.top_k: .* in multilabel they are independent"):
        read_recipe(
            Path("recipes/quickstart.yaml"), ["task=multilabel", "data.dataset=scenes_plain", "teaching.top_k=3"]
        )


def test_mixed_images_have_the_mean_of_their_labels() -> None:
    images, truths = torch.zeros(1, 3, 4, 4), torch.tensor([[1.0, 0.0, 1.0]])
    mixes = Mixes(torch.tensor([0]), torch.tensor([0.75]), torch.tensor([[0, 0, 0, 0]]))
    _, mixed = mix(images, truths, images, torch.tensor([[0.0, 0.0, 1.0]]), mixes, classes=3)
    assert mixed.tolist() == [[0.75, 0, 1]]
