"""Distillation losses against hand arithmetic."""

import math

import torch
from torch import nn

from compress.data.batches import Batch
from compress.distillation import distillation_step
from compress.losses import cross_entropy_loss, kd_loss
from compress.recipe import CrossEntropyTerm, KDTerm
from compress.tasks import TASKS


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_kd_loss_is_the_sum_of_hintons_equation() -> None:
    student, teacher, temperature = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], [[0.2, 2.5, 0.1], [1.0, -2.0, 2.0]], 4.0
    expected = 0.0
    for row, target in zip(student, teacher, strict=True):
        p, q = softmax([v / temperature for v in target]), softmax([v / temperature for v in row])
        expected += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) * temperature**2 / 2
    measured = kd_loss(torch.tensor(student), torch.tensor(teacher), temperature=temperature)
    assert math.isclose(float(measured), expected, rel_tol=1e-5)


def test_kd_loss_is_zero_when_student_and_teacher_agree() -> None:
    logits = torch.randn(5, 7)
    assert abs(float(kd_loss(logits, logits + 3.0, temperature=2.0))) < 1e-6  # softmax ignores a shift


def test_kd_gradient_keeps_its_scale_over_temperature() -> None:
    norms = []
    for temperature in (4.0, 8.0):
        student = torch.zeros(1, 4, requires_grad=True)
        kd_loss(student, torch.tensor([[0.1, 0.2, -0.1, -0.2]]), temperature=temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert math.isclose(norms[0], norms[1], rel_tol=0.05)


def test_cross_entropy_takes_mixed_targets() -> None:
    logits = torch.randn(6, 3)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    probabilities = nn.functional.one_hot(labels, 3).float()
    assert torch.allclose(
        cross_entropy_loss(logits, labels, label_smoothing=0.1),
        cross_entropy_loss(logits, probabilities, label_smoothing=0.1),
    )


def test_a_step_adds_its_terms_by_weight() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    terms = (CrossEntropyTerm(name="cross_entropy", weight=0.25), KDTerm(name="kd", weight=3.0))
    batch = Batch(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))
    measured = distillation_step(terms, TASKS["classification"], teacher)(student, batch)
    assert torch.allclose(measured["loss"], 0.25 * measured["cross_entropy"] + 3.0 * measured["kd"])


def test_the_teacher_does_not_run_when_no_loss_asks_for_it() -> None:
    class Forbidden(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the teacher ran")

    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    step = distillation_step((CrossEntropyTerm(name="cross_entropy"),), TASKS["classification"], Forbidden())
    step(student, Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 1])))
