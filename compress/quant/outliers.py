"""Leave out of calibration the few images on which a network's activations are many times as large as on all others.

A trained ResNet-50 that keeps values below 10 reached 1,300 on 9 of 1,250 photographs: with one of them among the calibration images, all
scales are a hundred times too coarse. A percentile does not help: it counts values, and one image has enough of them.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

TIMES = 8.0  # the largest value in a layer, over the median image's
LAYERS = 0.1  # of the layers must see such values, as one layer may fire on what is rare
MOST = 0.05  # of the images, at least one; where more are so, that is what such images are
FEWEST = 8  # images, to know what is usual


@torch.no_grad()
def outliers(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return which images (images,), bool on the CPU, to leave out: those that make the values in LAYERS of the layers TIMES the usual.

    Batches are (n, channels, height, width). A layer is a convolution or linear one of the float network; its input's largest value counts.
    """
    found: list[dict[str, Tensor]] = []
    images: list[int] = []

    def look(name: str, entering: Tensor) -> None:
        if entering.numel() and len(entering) % images[-1] == 0:  # else the first dimension is not that of images
            largest, seen = entering.reshape(images[-1], -1).abs().amax(1).float().cpu(), found[-1].get(name)
            found[-1][name] = largest if seen is None else largest.maximum(seen)

    handles = [
        part.register_forward_pre_hook(lambda _, entering, name=name: look(name, entering[0]))
        for name, part in model.eval().named_modules()
        if isinstance(part, _ConvNd | nn.Linear)
    ]
    try:
        for batch in batches:
            found.append({})
            images.append(len(batch))
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    none = torch.zeros(sum(images), dtype=torch.bool)
    names = set.intersection(*map(set, found)) if len(none) >= FEWEST else ()
    if not names:
        return none
    largest = torch.stack([torch.cat([batch[name] for batch in found]) for name in names])
    usual = largest.median(1, keepdim=True).values
    is_outlier = ((largest > TIMES * usual) & (usual > 0)).float().mean(0) >= LAYERS
    return is_outlier if is_outlier.sum() <= max(1, MOST * len(none)) else none


def without(batches: Iterable[Tensor], left_out: Tensor) -> Iterator[Tensor]:
    """Yield the batches without the images `left_out` (images,), which are counted over all batches."""
    first = 0
    for batch in batches:
        kept = ~left_out[first : first + len(batch)]
        first += len(batch)
        if kept.all():
            yield batch
        elif kept.any():
            yield batch[kept.to(batch.device)].contiguous(memory_format=torch.channels_last)
