"""Losses between student's and teacher's logits and the targets. Each is a pure function, a mean over the batch.

Logits are (batch, classes) of any float type; everything is computed in float32. Targets are labels (batch,) or, after
mixup or CutMix, class probabilities (batch, classes). `dkd_loss` and `nkd_loss` need one target class and take the most
probable one of mixed targets, as in NKD's code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def standardized(logits: Tensor) -> Tensor:
    """Return (z - mean(z)) / std(z) for each row (Sun et al. 2024, Logit Standardization in Knowledge Distillation, algorithm 1).

    The loss's temperature is then the paper's base temperature. The deviation divides by classes - 1, as in the authors'
    code, for which their weights were tuned. A row of equal logits becomes zeros.
    """
    deviation, mean = torch.std_mean(logits.float(), 1, keepdim=True)
    return (logits.float() - mean) / (deviation + 1e-7)


def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T² · KL(softmax(t/T) ‖ softmax(s/T)) (Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network, section 2)."""
    # T² keeps the gradient's scale independent of the temperature (Hinton 2015, section 2).
    return _divergence(student.float() / temperature, teacher.float() / temperature) * temperature**2


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean (s - t)² over batch and classes (Ba & Caruana 2014, Do Deep Nets Really Need to be Deep?, eq. 1).

    The paper halves the sum over classes; the mean keeps a weight valid for any number of classes.
    """
    return F.mse_loss(student.float(), teacher.float())


def dkd_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Return T² · (α TCKD + β NCKD) (Zhao et al. 2022, Decoupled Knowledge Distillation, eq. 7).

    TCKD = KL of (p_target, 1 - p_target), NCKD = KL of the softmax over the other classes; KD is TCKD + (1 - p_target) NCKD.
    """
    labels = _labels(targets)
    s, t = student.float() / temperature, teacher.float() / temperature
    target_class = _divergence(_target_or_not(s, labels), _target_or_not(t, labels))
    other_classes = _divergence(_others(s, labels), _others(t, labels))
    return (alpha * target_class + beta * other_classes) * temperature**2


def dist_loss(student: Tensor, teacher: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """Return T² · (β inter + γ intra) (Huang et al. 2022, Knowledge Distillation from A Stronger Teacher, section 3).

    With p = softmax(z/T): inter = mean over images of 1 - ρ(p_s[i, :], p_t[i, :]), intra = mean over classes of
    1 - ρ(p_s[:, j], p_t[:, j]), ρ = Pearson's correlation. T² and the 1e-8 in ρ are from the authors' code; with many
    classes the 1e-8 matters, as each class's probabilities hardly vary.
    """
    s, t = (student.float() / temperature).softmax(1), (teacher.float() / temperature).softmax(1)
    return (beta * _decorrelation(s, t) + gamma * _decorrelation(s.T, t.T)) * temperature**2


def nkd_loss(student: Tensor, teacher: Tensor, targets: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """Return -T_t log S_t - γ λ² Σ_{i≠t} N(T_i) log N(S_i) (Yang et al. 2023, From Knowledge Distillation to Self-Knowledge Distillation:
    A Unified Approach with Normalized Loss and Customized Soft Labels, the NKD loss).

    T and S are softmax(z), t the target class, N(·) the softmax of the other classes' z/λ; `temperature` is λ. Its minimum
    is not 0: the first term is a cross-entropy with the target class, weighted by the teacher's confidence.
    """  # noqa: D205
    labels = _labels(targets)
    at_target = labels.unsqueeze(1)
    sure = teacher.float().softmax(1).gather(1, at_target)
    target_class = -(sure * student.float().log_softmax(1).gather(1, at_target)).mean()
    s, t = _others(student.float() / temperature, labels), _others(teacher.float() / temperature, labels)
    other_classes = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
    return target_class + gamma * temperature**2 * other_classes


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over classes of 1 - 2 Σ p y / (Σ p² + Σ y²), sums over rows (Milletari 2016, V-Net, section 3).

    Classes that no row has are left out; cross-entropy already penalizes their probabilities.
    """
    probabilities = logits.float().softmax(1)
    true = targets.float() if targets.dim() == 2 else F.one_hot(targets, logits.shape[1]).float()
    both, sizes = (probabilities * true).sum(0), (probabilities.square() + true.square()).sum(0)  # (classes,)
    present = true.sum(0) > 0
    return (1 - 2 * both / sizes.clamp(min=1e-7))[present].mean() if present.any() else 0 * both.sum()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the batch's mean KL(softmax(teacher) ‖ softmax(student))."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def _decorrelation(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over rows of 1 - Pearson's correlation, which is a·b / (‖a‖‖b‖ + 1e-8) of centred rows."""
    a, b = (rows - rows.mean(1, keepdim=True) for rows in (a, b))
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)  # (rows,)
    return 1 - correlation.mean()


def _labels(targets: Tensor) -> Tensor:
    """Return labels (batch,): of mixed targets the most probable class."""
    return targets.argmax(1) if targets.dim() == 2 else targets


def _target_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits (batch, 2) whose softmax is (p_target, 1 - p_target)."""
    target = logits.gather(1, labels.unsqueeze(1))  # (batch, 1)
    return torch.cat([target, _others(logits, labels).logsumexp(1, keepdim=True)], 1)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits without each row's label, (batch, classes - 1)."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, index + (index >= labels.unsqueeze(1)))
