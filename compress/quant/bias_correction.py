"""Correct the biases of a calibrated network: each channel's mean becomes the float network's again.

Rounding a channel's weights shifts its mean output, and the shifts of all layers add up; a depthwise channel has nine weights to average
them out. Nagel et al. 2019 (Data-Free Quantization Through Weight Equalization and Bias Correction), section 4.2 and appendix D: layer
after layer, measured on images. Without a training: batch-norm in training mode takes the shift out by itself.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from compress.quant.layers import QuantLayer, QuantNorm
from compress.quant.prepare import groups, quantize_only_

IMAGES = 64  # all at once, since a layer is corrected while they pass
PIXELS = 64 * 224**2  # fewer images where they are larger
FEWEST = 8

Means = Mapping[str, Tensor]  # the mean of each channel (channels,), by the layer's path


def images_to_correct_with(batches: Iterable[Tensor]) -> Tensor:
    """Return the first images (n, c, h, w) of the batches, at most IMAGES of at most PIXELS together."""
    taken: list[Tensor] = []
    for batch in batches:
        taken.append(batch)
        most = max(FEWEST, min(IMAGES, PIXELS // batch[0, 0].numel()))
        if sum(map(len, taken)) >= most:
            break
    return torch.cat(taken)[:most]


@torch.no_grad()
def float_means(prepared: fx.GraphModule, images: Tensor) -> Means:
    """Return the mean outputs of every layer while nothing rounds."""
    found: dict[str, Tensor] = {}
    quantize_only_(prepared, ())
    try:
        _run(prepared, images, lambda name, _, output: found.update({name: _means(prepared, name, output)}))
    finally:
        quantize_only_(prepared, None)
    return found


@torch.no_grad()
def corrected(prepared: fx.GraphModule, images: Tensor, wanted: Means | None = None) -> fx.GraphModule:
    """Return a copy of a calibrated model on its target's grid, in eval mode, whose layers have the wanted mean outputs on `images`.

    `wanted` are the `float_means`, measured where they are not given; they are the same for all ranges. Layers that run more than once stay
    as they are.
    """
    wanted = float_means(prepared, images) if wanted is None else wanted
    network = copy.deepcopy(prepared)
    quantize_only_(network, None)

    def correct_(name: str, part: nn.Module, output: Tensor) -> Tensor:
        shift = wanted[name] - _means(network, name, output)
        _shift_(part, shift)
        return output + (shift if isinstance(part, nn.Linear) else shift.view(-1, *[1] * (output.dim() - 2)))

    _run(network, images, correct_)
    return network


def _run(network: fx.GraphModule, images: Tensor, at: Callable[[str, nn.Module, Tensor], Tensor | None]) -> None:
    """Run the images, and call `at(layer's path, the module that holds its bias, output)` behind every layer that runs once."""
    runs = Counter(groups(network))
    layers = {name: network.get_submodule(name) for name, count in runs.items() if count == 1}
    ends = {name: _end(layer) for name, layer in layers.items()}
    handles = [
        part.register_forward_hook(lambda part, _, output, name=name: at(name, part, output))
        for name, part in ends.items()
    ]
    network.eval()
    for layer in layers.values():
        layer.train()  # convolutions and batch-norm run one by one, as no kernel with a part in training mode is exact
    try:
        network(images)
    finally:
        network.eval()
        for handle in handles:
            handle.remove()


def _end(layer: nn.Module) -> nn.Module:
    """Return the batch-norm right behind a layer, else the layer."""
    kernel = layer.kernel if isinstance(layer, QuantLayer) else None
    return layer if kernel is None or kernel.norm is None else kernel.norm


def _shift_(part: nn.Module, shift: Tensor) -> None:
    """Add `shift` (channels,) to what a layer or batch-norm returns."""
    if isinstance(part, QuantNorm) and not part.affine:
        assert part.running_mean is not None
        assert part.running_var is not None
        part.running_mean -= shift * (part.running_var + part.eps).sqrt()
    else:
        bias = part.get_parameter("bias") if part.bias is not None else torch.zeros_like(shift)
        part.bias = nn.Parameter(bias + shift)


def _means(network: fx.GraphModule, name: str, output: Tensor) -> Tensor:
    """Return each channel's mean (channels,): of (n, channels, …), or of a linear layer's (…, channels)."""
    channels = output.dim() - 1 if isinstance(_end(network.get_submodule(name)), nn.Linear) else 1
    return output.float().mean([dim for dim in range(output.dim()) if dim != channels])
