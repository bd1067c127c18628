"""How much each layer's quantization hurts: round only its weights and activations, and compare the outputs with float."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.quant.layers import QuantLayer
from compress.quant.prepare import quantize_only_
from compress.quant.rows import GroupRow


@torch.no_grad()
def sensitivity(
    prepared: nn.Module,
    batches: Sequence[Tensor],
    *,
    rows: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], float],
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[GroupRow, ...]:
    """Measure every group of a calibrated model and return them, worst first; afterwards all quantize again.

    `rows` turns outputs into logits (n, classes); `score` scores the outputs of all images; `tell` gets what is done.
    """
    prepared.eval()
    names = [name for name, module in prepared.named_modules() if isinstance(module, QuantLayer)]
    try:
        reference = _outputs(prepared, batches, ())
        expected, best = rows(reference).double().log_softmax(1), score(reference)
        found = []
        for number, name in enumerate(names, start=1):
            tell(f"damage by layer {number} of {len(names)}")
            outputs = _outputs(prepared, batches, (name,))
            kl = F.kl_div(rows(outputs).double().log_softmax(1), expected, log_target=True, reduction="batchmean")
            found.append(GroupRow(group=name, kl=float(kl), drop=best - score(outputs)))
    finally:
        quantize_only_(prepared, None)
    return tuple(sorted(found, key=lambda group: -group["kl"]))


def _outputs(prepared: nn.Module, batches: Sequence[Tensor], names: tuple[str, ...]) -> Tensor:
    """Return the outputs (images, ...) with only the named groups quantizing."""
    quantize_only_(prepared, names)
    return torch.cat([prepared(images).float() for images in batches])
