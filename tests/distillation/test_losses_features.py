"""Losses between features, each against numpy computed from its paper's formula with loops over images and pairs."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.distillation.adapters import Review, Widened
from compress.distillation.features import cwd_loss, pkd_loss, pkt_loss, review_loss

Array = NDArray[np.float64]
RANDOM = np.random.default_rng(1)
STUDENT, TEACHER = RANDOM.normal(size=(5, 3, 8, 8)), RANDOM.normal(size=(5, 6, 8, 8))
SAME_WIDTH = RANDOM.normal(size=(5, 6, 8, 8))

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pkt": pkt_loss,
    "cwd": lambda s, t: cwd_loss(s, t, temperature=4.0),
    "pkd": pkd_loss,
    "review": review_loss,
}


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


def pooled(maps: Array, size: int) -> Array:
    """Average (n, c, h, w) over equal squares to (n, c, size, size)."""
    n, c, h, w = maps.shape
    return np.asarray(maps.reshape(n, c, size, h // size, size, w // size).mean((3, 5)))


def test_pkt_is_the_divergence_of_the_neighbours_probabilities() -> None:
    """The formulas of mdistiller's PKT.py, pair by pair: a point is its own neighbour, too."""

    def probability(points: Array, i: int, j: int) -> float:
        unit = [point / (np.sqrt((point**2).sum()) + 1e-7) for point in points]
        return float((unit[i] @ unit[j] + 1) / 2 / sum((unit[i] @ unit[k] + 1) / 2 for k in range(5)))

    s, t = STUDENT.mean((2, 3)), TEACHER.mean((2, 3))
    expected = np.mean(
        [
            probability(t, i, j) * np.log((probability(t, i, j) + 1e-7) / (probability(s, i, j) + 1e-7))
            for i, j in itertools.product(range(5), repeat=2)
        ]
    )
    assert float(pkt_loss(*tensors(STUDENT, TEACHER))) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("size", "levels"), [(8, (4, 2, 1)), (4, (2, 1)), (1, ())])
def test_review_weighs_each_coarser_level_by_half(size: int, levels: tuple[int, ...]) -> None:
    s, t = pooled(SAME_WIDTH, size), pooled(TEACHER, size)
    loss, weight, total = ((s - t) ** 2).mean(), 1.0, 1.0
    for level in levels:
        weight /= 2
        loss, total = loss + weight * ((pooled(s, level) - pooled(t, level)) ** 2).mean(), total + weight
    assert float(review_loss(*tensors(s, t))) == pytest.approx(float(loss / total), rel=1e-5)


@pytest.mark.parametrize("name", ["cwd", "pkd"])
def test_the_larger_map_is_averaged_down(name: str) -> None:
    same = float(LOSSES[name](*tensors(pooled(SAME_WIDTH, 4), pooled(TEACHER, 4))))
    for student, teacher in ((SAME_WIDTH, pooled(TEACHER, 4)), (pooled(SAME_WIDTH, 4), TEACHER)):
        assert float(LOSSES[name](*tensors(student, teacher))) == pytest.approx(same, rel=1e-5)


def test_cwd_compares_where_each_channel_is_strong() -> None:
    apart = []
    for s, t in zip(SAME_WIDTH.reshape(30, 64), TEACHER.reshape(30, 64), strict=True):
        p, q = (np.exp(row / 4) / np.exp(row / 4).sum() for row in (t, s))
        apart.append(16 * (p * np.log(p / q)).sum())
    measured = cwd_loss(*tensors(SAME_WIDTH, TEACHER), temperature=4.0)
    assert float(measured) == pytest.approx(float(np.mean(apart)), rel=1e-4)


def test_pkd_is_one_minus_the_correlation_and_sees_no_scale() -> None:
    found = [np.corrcoef(SAME_WIDTH[:, c].ravel(), TEACHER[:, c].ravel())[0, 1] for c in range(6)]
    measured = pkd_loss(*tensors(7 * SAME_WIDTH + 2, TEACHER))
    assert float(measured) == pytest.approx(1 - float(np.mean(found)), rel=1e-4)


def test_features_of_the_same_width_need_no_adapter() -> None:
    narrow, wide = torch.Size((5, 3, 8, 8)), torch.Size((5, 6, 8, 8))
    student, same = tensors(STUDENT, SAME_WIDTH)
    adapter = Widened([narrow, wide], [wide, wide])
    adapted = adapter([student, same])
    weight, bias = (parameter.detach().numpy() for parameter in adapter.parameters())
    expected = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], STUDENT) + bias[:, None, None]
    assert np.allclose(adapted[0].detach().numpy(), expected, atol=1e-5)
    assert adapted[1] is same


@pytest.mark.parametrize("name", LOSSES)
def test_the_teachers_own_features_have_no_loss(name: str) -> None:
    teacher, other = tensors(TEACHER, SAME_WIDTH)
    assert float(LOSSES[name](teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(LOSSES[name](other, teacher)) > 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("student", ["random", "all zero", "all alike", "one image"])
def test_gradients_are_finite_also_where_images_cannot_be_told_apart(name: str, student: str) -> None:
    features, teacher = tensors(SAME_WIDTH, TEACHER)
    if student == "all zero":
        features = torch.zeros_like(features)
    elif student == "all alike":
        features = features[:1].expand(5, -1, -1, -1).clone()
    elif student == "one image":
        features, teacher = features[:1], teacher[:1]
    features.requires_grad_()
    loss = LOSSES[name](features, teacher)
    loss.backward()
    assert features.grad is not None
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(features.grad).all())
    assert float(features.grad.abs().max()) < 1e4


def test_the_review_fuses_each_layer_with_all_later_ones() -> None:
    student = [torch.Size((2, 3, 8, 8)), torch.Size((2, 5, 4, 4)), torch.Size((2, 7, 2, 2))]
    teacher = [torch.Size((2, 4, 16, 16)), torch.Size((2, 6, 4, 4)), torch.Size((2, 8, 2, 2))]
    adapter = Review(student, teacher).eval()
    features = [torch.randn(shape, requires_grad=True) for shape in student]
    fused = adapter(features)
    assert [f.shape for f in fused] == teacher
    for index, out in enumerate(fused):
        reaches = torch.autograd.grad(out.square().sum(), features, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in reaches] == [later >= index for later in range(3)]


def test_the_fusion_is_the_papers_attention() -> None:
    """The first fused map by numpy, with the batch-norms as they start: y·0.5 of each where the attention's weights are zero."""
    shapes = [torch.Size((1, 3, 2, 2)), torch.Size((1, 4, 1, 1))]
    adapter = Review(shapes, shapes).eval()
    attention = adapter.fusions[0].get_submodule("attention")
    torch.nn.init.zeros_(attention.get_parameter("weight"))
    torch.nn.init.constant_(attention.get_parameter("bias"), float(np.log(3)))  # sigmoid(ln 3) = 3/4
    shallow, deep = torch.randn(1, 3, 2, 2), torch.randn(1, 4, 1, 1)
    scale = 1 / np.sqrt(1 + 1e-5)  # of a new batch-norm
    kernels = {name: p.detach().numpy() for name, p in adapter.named_parameters() if "weight" in name and p.dim() == 4}
    entered = np.einsum("oc,nchw->nohw", kernels["fusions.0.enter.0.weight"][:, :, 0, 0], shallow.numpy()) * scale
    below = np.einsum("oc,nchw->nohw", kernels["fusions.1.enter.0.weight"][:, :, 0, 0], deep.numpy()) * scale
    padded = np.pad(0.75 * (entered + below), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    expected = np.einsum("ochw,ncyxhw->noyx", kernels["fusions.0.leave.0.weight"], windows) * scale
    assert np.allclose(adapter([shallow, deep])[0].detach().numpy(), expected, atol=1e-5)
