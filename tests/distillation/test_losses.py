"""Losses between logits, each against numpy computed from its paper's formula, image by image and class by class."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.distillation.logits import (
    dice_loss,
    dist_loss,
    dkd_loss,
    kd_loss,
    mse_loss,
    nkd_loss,
    standardized,
)
from compress.tasks.classification import cross_entropy_loss

Array = NDArray[np.float64]
RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.normal(0, 2, (6, 5)), RANDOM.normal(0, 3, (6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t: kd_loss(s, t, temperature=2.0),
    "mse": mse_loss,
    "dkd": lambda s, t: dkd_loss(s, t, torch.from_numpy(LABELS), alpha=1.0, beta=8.0, temperature=4.0),
    "dist": lambda s, t: dist_loss(s, t, beta=1.0, gamma=1.0, temperature=1.0),
    "nkd": lambda s, t: nkd_loss(s, t, torch.from_numpy(LABELS), gamma=1.5, temperature=1.0),
}


def softmax(values: Array) -> Array:
    powers = np.exp(values)
    return np.asarray(powers / powers.sum())


def divergence(p: Array, q: Array) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


def test_kd_is_the_sum_of_hintons_equation() -> None:
    expected = np.mean([divergence(softmax(t / 4), softmax(s / 4)) * 16 for s, t in zip(STUDENT, TEACHER, strict=True)])
    assert float(kd_loss(*tensors(STUDENT, TEACHER), temperature=4.0)) == pytest.approx(expected, rel=1e-5)


def test_kd_ignores_a_shift_of_the_logits() -> None:
    logits = torch.randn(5, 7)
    assert abs(float(kd_loss(logits, logits + 3.0, temperature=2.0))) < 1e-6


def test_kd_gradient_keeps_its_scale_over_temperature() -> None:
    norms = []
    for temperature in (4.0, 8.0):
        student = torch.zeros(1, 4, requires_grad=True)
        kd_loss(student, torch.tensor([[0.1, 0.2, -0.1, -0.2]]), temperature=temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert math.isclose(norms[0], norms[1], rel_tol=0.05)


def test_mse_is_the_mean_square_of_the_differences() -> None:
    assert float(mse_loss(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 2.0]]))) == 3.5


def dkd(
    student: Array, teacher: Array, labels: NDArray[np.int64], alpha: float, beta: float, temperature: float
) -> float:
    """Zhao 2022, eq. 7, from probabilities."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        target = divergence(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
        p_rest, q_rest = np.delete(p, label), np.delete(q, label)
        total += alpha * target + beta * divergence(p_rest / p_rest.sum(), q_rest / q_rest.sum())
    return total * temperature**2 / len(student)


def test_dkd_is_the_papers_equation() -> None:
    student, teacher = tensors(STUDENT, TEACHER)
    measured = dkd_loss(student, teacher, torch.from_numpy(LABELS), alpha=1.0, beta=8.0, temperature=4.0)
    assert float(measured) == pytest.approx(dkd(STUDENT, TEACHER, LABELS, 1.0, 8.0, 4.0), rel=1e-5)


def test_dkd_of_one_image_is_kd_where_beta_is_what_the_target_class_leaves() -> None:
    """Zhao 2022, eq. 6: KD = TCKD + (1 - p_target) NCKD."""
    student, teacher = tensors(STUDENT[:1], TEACHER[:1])
    beta = 1 - softmax(TEACHER[0] / 2)[LABELS[0]]
    decoupled = dkd_loss(student, teacher, torch.from_numpy(LABELS[:1]), alpha=1.0, beta=float(beta), temperature=2.0)
    assert float(decoupled) == pytest.approx(float(kd_loss(student, teacher, temperature=2.0)), rel=1e-5)


def test_dist_is_one_minus_numpys_correlations() -> None:
    q, p = (np.stack([softmax(row / 2) for row in rows]) for rows in (STUDENT, TEACHER))
    inter = np.mean([1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(6)])
    intra = np.mean([1 - np.corrcoef(q[:, j], p[:, j])[0, 1] for j in range(5)])
    measured = dist_loss(*tensors(STUDENT, TEACHER), beta=2.0, gamma=0.5, temperature=2.0)
    assert float(measured) == pytest.approx(4 * (2.0 * inter + 0.5 * intra), rel=1e-5)


def dist_of_the_authors(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """The formulas of Huang 2022's released code (dist_kd.py), row by row and column by column in float64, with its 1e-8."""

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / ((a**2).sum().sqrt() * (b**2).sum().sqrt() + 1e-8)

    q, p = (torch.softmax(logits / temperature, 1) for logits in (student, teacher))
    inter = torch.stack([1 - correlation(q[i], p[i]) for i in range(len(q))]).mean()
    intra = torch.stack([1 - correlation(q[:, j], p[:, j]) for j in range(q.shape[1])]).mean()
    return temperature**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize(("classes", "temperature"), [(5, 2.0), (1000, 1.0), (1000, 4.0)])
def test_dist_and_its_gradient_are_the_authors_codes(classes: int, temperature: float) -> None:
    """At 1,000 classes a class's probabilities vary so little over a batch that the 1e-8 in the correlation counts."""
    random = np.random.default_rng(7)
    student, teacher = (torch.from_numpy(random.normal(0, scale, (8, classes))) for scale in (0.5, 2.0))
    mine, theirs = student.float().requires_grad_(), student.clone().requires_grad_()
    measured = dist_loss(mine, teacher.float(), beta=2.0, gamma=0.5, temperature=temperature)
    expected = dist_of_the_authors(theirs, teacher, 2.0, 0.5, temperature)
    measured.backward()
    expected.backward()
    assert measured.item() == pytest.approx(expected.item(), rel=1e-4)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 1e-3


def nkd(student: Array, teacher: Array, labels: NDArray[np.int64], gamma: float, temperature: float) -> float:
    """Yang 2023, from probabilities; the others' share is normalized to 1 as the paper says."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        q_rest, p_rest = np.delete(q, label), np.delete(p, label)
        others = -(p_rest / p_rest.sum() * np.log(q_rest / q_rest.sum())).sum()
        total += -softmax(t)[label] * math.log(softmax(s)[label]) + gamma * temperature**2 * others
    return total / len(student)


def test_nkd_is_the_papers_equation() -> None:
    student, teacher = tensors(STUDENT, TEACHER)
    measured = nkd_loss(student, teacher, torch.from_numpy(LABELS), gamma=1.5, temperature=3.0)
    assert float(measured) == pytest.approx(nkd(STUDENT, TEACHER, LABELS, 1.5, 3.0), rel=1e-5)


def test_nkds_other_classes_are_least_where_the_student_is_the_teacher() -> None:
    (teacher,) = tensors(TEACHER)
    labels = torch.from_numpy(LABELS)
    others = [
        float(
            nkd_loss(s, teacher, labels, gamma=1.0, temperature=1.0)
            - nkd_loss(s, teacher, labels, gamma=0.0, temperature=1.0)
        )
        for s in (teacher, *(teacher + 0.3 * torch.randn(6, 5) for _ in range(20)))
    ]
    assert min(others) == others[0]


def test_mixed_targets_count_by_their_most_probable_class() -> None:
    student, teacher = tensors(STUDENT, TEACHER)
    mixed = torch.full((6, 5), 0.1)
    mixed[torch.arange(6), torch.from_numpy(LABELS)] = 0.6
    assert float(nkd_loss(student, teacher, mixed, gamma=1.5, temperature=3.0)) == pytest.approx(
        nkd(STUDENT, TEACHER, LABELS, 1.5, 3.0), rel=1e-5
    )
    assert float(dkd_loss(student, teacher, mixed, alpha=1.0, beta=8.0, temperature=4.0)) == pytest.approx(
        dkd(STUDENT, TEACHER, LABELS, 1.0, 8.0, 4.0), rel=1e-5
    )


def test_standardized_logits_have_mean_0_and_the_samples_deviation_1() -> None:
    """Sun 2024's released code (KD.py): the deviation over classes - 1, and 1e-7 more."""
    (logits,) = tensors(TEACHER)
    expected = [(row - row.mean()) / (math.sqrt(((row - row.mean()) ** 2).sum() / 4) + 1e-7) for row in TEACHER]
    assert np.allclose(standardized(logits).numpy(), np.stack(expected), atol=1e-5)


def test_standardized_losses_ignore_scale_and_shift() -> None:
    student, teacher = standardized(torch.randn(4, 6)), torch.randn(4, 6)
    one, other = (kd_loss(student, standardized(t), temperature=2.0) for t in (teacher, 7 * teacher - 3))
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_of_minus_log_probability(smoothing: float) -> None:
    (logits,) = tensors(STUDENT)
    expected = np.mean(
        [
            -(1 - smoothing) * math.log(softmax(row)[label]) - smoothing * np.log(softmax(row)).mean()
            for row, label in zip(STUDENT, LABELS, strict=True)
        ]
    )
    measured = cross_entropy_loss(logits, torch.from_numpy(LABELS), label_smoothing=smoothing)
    assert float(measured) == pytest.approx(float(expected), rel=1e-5)


def test_cross_entropy_takes_labels_and_class_probabilities() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    probabilities = torch.nn.functional.one_hot(labels, 3).float()
    assert torch.allclose(
        cross_entropy_loss(logits, labels, label_smoothing=0.1),
        cross_entropy_loss(logits, probabilities, label_smoothing=0.1),
    )


@pytest.mark.parametrize("name", ["kd", "mse", "dkd", "dist"])
def test_a_student_that_answers_as_its_teacher_has_no_loss(name: str) -> None:
    (teacher,) = tensors(TEACHER)
    assert abs(float(LOSSES[name](teacher, teacher))) < 1e-5
    assert float(LOSSES[name](teacher + torch.randn(6, 5), teacher)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_gradients_are_finite_also_for_constant_and_for_saturated_logits(name: str, scale: float) -> None:
    student, teacher = (scale * x for x in tensors(STUDENT, TEACHER))
    for prepared in (lambda z: z, standardized):
        leaf = student.clone().requires_grad_()
        loss = LOSSES[name](prepared(leaf), prepared(teacher))
        loss.backward()
        assert leaf.grad is not None
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(leaf.grad).all())


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(name: str) -> None:
    student, teacher = (x.bfloat16() for x in tensors(STUDENT, TEACHER))
    loss = LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, LOSSES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", LOSSES)
def test_two_classes_and_one_image_are_enough(name: str) -> None:
    label = torch.tensor([1])
    one = LOSSES | {
        "dkd": lambda s, t: dkd_loss(s, t, label, alpha=1.0, beta=8.0, temperature=4.0),
        "nkd": lambda s, t: nkd_loss(s, t, label, gamma=1.5, temperature=1.0),
    }
    student = torch.tensor([[1.0, -1.0]], requires_grad=True)
    one[name](student, torch.tensor([[0.5, 2.0]])).backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_dice_counts_every_class_that_is_there_the_same() -> None:
    logits, labels = torch.tensor(RANDOM.normal(size=(40, 4)), dtype=torch.float32), torch.tensor([0] * 36 + [2] * 4)
    p, y = logits.double().softmax(1).numpy(), np.eye(4)[labels]
    by_class = [1 - 2 * (p[:, c] * y[:, c]).sum() / ((p[:, c] ** 2).sum() + y[:, c].sum()) for c in (0, 2)]
    assert float(dice_loss(logits, labels)) == pytest.approx(np.mean(by_class), rel=1e-5)
    assert float(dice_loss(logits, torch.tensor(y))) == pytest.approx(np.mean(by_class), rel=1e-5)
    assert float(dice_loss(100 * torch.tensor(y), labels)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(logits[:0], labels[:0])) == 0  # nothing is judged
