"""Losses between a student's logits, its teacher's, and the labels. Each is a pure function that returns a mean over the batch."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T² · KL(softmax(t/T) ‖ softmax(s/T)) for logits (batch, classes) (Hinton et al. 2015, Distilling the Knowledge)."""
    # T² keeps the gradient's scale independent of the temperature (Hinton 2015, section 2).
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=1),
        F.log_softmax(teacher.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def cross_entropy_loss(student: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of logits (batch, classes) with labels (batch,) or class probabilities (batch, classes)."""
    return F.cross_entropy(student.float(), targets, label_smoothing=label_smoothing)


# A logit loss takes (student, teacher, temperature); more of them are lines here.
LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {"kd": kd_loss}
