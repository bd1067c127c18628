"""How much each layer's quantization hurts: with only that layer's weights and activations rounded, how far the answers move."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant.layers import QuantLayer
from compress.quant.prepare import quantize_only_


@dataclass(frozen=True)
class Sensitivity:
    """The damage of one group: a layer's path, the mean KL of its logits from the float network's in nats, the top-1 it loses."""

    group: str
    kl: float
    top1_drop: float


@torch.no_grad()
def sensitivity(prepared: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Sensitivity, ...]:
    """Measure every group of a calibrated model on (images, labels) and return them, worst first; all quantize again afterwards."""
    prepared.eval()
    names = [name for name, module in prepared.named_modules() if isinstance(module, QuantLayer)]
    truth = torch.cat([labels for _, labels in batches])
    try:
        reference = _log_probabilities(prepared, batches, ())
        found = []
        for name in names:
            answers = _log_probabilities(prepared, batches, (name,))
            kl = F.kl_div(answers, reference, log_target=True, reduction="batchmean")
            found.append(Sensitivity(name, float(kl), _top1(reference, truth) - _top1(answers, truth)))
    finally:
        quantize_only_(prepared, None)
    return tuple(sorted(found, key=lambda group: -group.kl))


def _log_probabilities(prepared: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], names: tuple[str, ...]) -> Tensor:
    """Return log-probabilities (images, classes), in float64, with only the named groups quantizing."""
    quantize_only_(prepared, names)
    return torch.cat([prepared(images).double().log_softmax(1) for images, _ in batches])


def _top1(answers: Tensor, truth: Tensor) -> float:
    return float((answers.argmax(1) == truth).double().mean())
