"""Losses between one layer's features in student and teacher. Each is a pure function that returns one float32 number.

Features are (batch, channels, height, width), for `pkt` also (batch, channels). `pkt` compares images, so the channels
may differ; `cwd` and `pkd` adapt the student's features where they do, and average the larger map down to the smaller
one; `review` always adapts them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 1e-7


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean p_{j|i} log(p_{j|i} / q_{j|i}) over all pairs (Passalis & Tefas 2018, Learning Deep Representations with Probabilistic
    Knowledge Transfer, section 3), p the teacher's, q the student's.

    p_{j|i} = K(x_i, x_j) / Σ_k K(x_i, x_k) with K = (cos + 1) / 2. Pairs i = j count, unlike in the paper, as in the authors'
    code and in mdistiller, from which the default weight is. Maps are averaged over their positions first.
    """  # noqa: D205
    q, p = (_neighbours(_embedded(features)) for features in (student, teacher))
    return (p * ((p + SMALL) / (q + SMALL)).log()).mean()


def review_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the hierarchical context loss of one fused map (Chen et al. 2021, Distilling Knowledge via Knowledge Review, section 3.3).

    (MSE + Σ_l 2^-k MSE of both averaged to l × l) / (1 + Σ_l 2^-k), for those l of 4, 2, 1 below the map's size, k = 1, 2, …
    """
    s, t = student.float(), teacher.float()
    loss, weight, total = F.mse_loss(s, t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(s.shape[2:]):
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
    return loss / total


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T² · mean over channels of KL(φ(t/T) ‖ φ(s/T)) (Shu 2021, Channel-wise Knowledge Distillation for Dense Prediction, eq. 4 and 5).

    φ is the softmax over a channel's positions. The mean over images is as in the authors' code.
    """
    s, t = ((maps / temperature).flatten(0, 1).flatten(1) for maps in _same_size(student.float(), teacher.float()))
    apart = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)  # rows are channels
    return apart * temperature**2


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean (n(s) - n(t))² / 2, which is 1 - Pearson's correlation (Cao 2022, PKD, eq. 3 and 4).

    n normalizes each channel to mean 0 and deviation 1 over all positions of the batch.
    """
    s, t = (_normalized(maps) for maps in _same_size(student.float(), teacher.float()))
    return F.mse_loss(s, t) / 2


def _normalized(maps: Tensor) -> Tensor:
    rows = maps.transpose(0, 1).flatten(1)  # (channels, positions of all images)
    deviation, mean = torch.std_mean(rows, 1, correction=0, keepdim=True)
    return (rows - mean) / (deviation + 1e-6)


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two maps (batch, channels, height, width) down to the smaller height and width."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = tuple(min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)  # type: ignore[arg-type]


def _embedded(features: Tensor) -> Tensor:
    """Return one vector for each image, (batch, channels)."""
    return features.float().flatten(2).mean(2) if features.dim() > 2 else features.float()


def _neighbours(points: Tensor) -> Tensor:
    """Return each point's (row's) neighbour probabilities over all points, itself included, (n, n)."""
    unit: Tensor = points / (points.norm(dim=1, keepdim=True) + SMALL)
    kernel = (unit @ unit.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)
