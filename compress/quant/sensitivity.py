"""How much each layer's quantization hurts: with only that layer's weights and activations rounded, how far the answers move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant.layers import QuantLayer
from compress.quant.prepare import quantize_only_


@dataclass(frozen=True)
class Sensitivity:
    """The damage of one group: a layer's path, the mean KL of its logits from the float network's in nats, the score it loses."""

    group: str
    kl: float
    drop: float


@torch.no_grad()
def sensitivity(
    prepared: nn.Module,
    batches: Sequence[Tensor],
    *,
    rows: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], float],
) -> tuple[Sensitivity, ...]:
    """Measure every group of a calibrated model on images and return them, worst first; all quantize again afterwards.

    `rows` gives logits (n, classes) of outputs, `score` what outputs of all images are worth.
    """
    prepared.eval()
    names = [name for name, module in prepared.named_modules() if isinstance(module, QuantLayer)]
    try:
        reference = _outputs(prepared, batches, ())
        expected, best = rows(reference).double().log_softmax(1), score(reference)
        found = []
        for name in names:
            outputs = _outputs(prepared, batches, (name,))
            kl = F.kl_div(rows(outputs).double().log_softmax(1), expected, log_target=True, reduction="batchmean")
            found.append(Sensitivity(name, float(kl), best - score(outputs)))
    finally:
        quantize_only_(prepared, None)
    return tuple(sorted(found, key=lambda group: -group.kl))


def _outputs(prepared: nn.Module, batches: Sequence[Tensor], names: tuple[str, ...]) -> Tensor:
    """Return the outputs (images, ...) with only the named groups quantizing."""
    quantize_only_(prepared, names)
    return torch.cat([prepared(images).float() for images in batches])
