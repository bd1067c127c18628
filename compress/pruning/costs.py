"""A network's cost as a function of its layers' widths.

MACs and parameters follow from the layers; milliseconds are predicted from timings (`compress.pruning.latency.predict`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import nn

Floats = NDArray[np.float64]
WidthCost = Callable[[Floats, Floats], float]  # from the remaining outputs and inputs (layers,)
OUTPUT_CUTS = frozenset(pruner.prune_out_channels for pruner in tp.function.PrunerBox.values() if pruner is not None)


def is_output_cut(handler: Callable[..., object]) -> bool:
    """Tell whether a Torch-Pruning handler removes a layer's outputs; otherwise it removes inputs."""
    return handler in OUTPUT_CUTS


@dataclass(frozen=True)
class Layer:
    """One layer at its full width."""

    name: str
    kind: str
    inputs: int
    outputs: int
    depthwise: bool
    macs: int  # for one image
    weights: int  # parameters that scale with inputs * outputs
    vectors: int  # parameters that scale with outputs: biases, batch-norms
    maps: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # spatial sizes of the input and the output


def measure_layers(model: nn.Module, images: torch.Tensor) -> list[Layer]:
    """Run `images` (1, c, h, w) once and return every layer with parameters that maps one tensor to one, in order of execution."""
    found: dict[str, Layer] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        tensors = one_to_one(inputs, output)
        if tensors is not None:
            layer = _layer(names[module], module, *tensors)
            before = found.get(layer.name)  # a detector's head runs once per pyramid level
            found[layer.name] = layer if before is None else replace(layer, macs=before.macs + layer.macs)

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    hooks = [module.register_forward_hook(record) for module in names if isinstance(module, kinds)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def one_to_one(inputs: tuple[object, ...], output: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a layer's input and output; None for one that maps several tensors, as of octave convolutions, or none by position."""
    (first, *others) = inputs or (None,)
    if not isinstance(first, torch.Tensor) or not isinstance(output, torch.Tensor):
        return None
    return None if any(isinstance(other, torch.Tensor) for other in others) else (first, output)


def macs(layers: Sequence[Layer], fixed: float = 0.0) -> WidthCost:
    """Return millions of MACs as a function of the widths; `fixed` of them lie outside of the layers."""
    return _product_cost(layers, [layer.macs for layer in layers], [0] * len(layers), fixed)


def params(layers: Sequence[Layer], fixed: float = 0.0) -> WidthCost:
    """Return millions of parameters as a function of the widths; `fixed` of them lie outside of the layers."""
    return _product_cost(layers, [layer.weights for layer in layers], [layer.vectors for layer in layers], fixed)


COSTS = {"macs": macs, "params": params}  # for milliseconds see `LatencyModel.cost`


def _product_cost(layers: Sequence[Layer], products: Sequence[int], vectors: Sequence[int], fixed: float) -> WidthCost:
    full_outputs, full_inputs = full_widths(layers)
    depthwise = np.array([layer.depthwise for layer in layers])

    def cost(outputs: Floats, inputs: Floats) -> float:
        kept_outputs = outputs / np.maximum(full_outputs, 1)
        kept_inputs = np.where(depthwise, 1.0, inputs / np.maximum(full_inputs, 1))
        return fixed + float((products * kept_outputs * kept_inputs + vectors * kept_outputs).sum()) / 1e6

    return cost


def full_widths(layers: Sequence[Layer]) -> tuple[Floats, Floats]:
    """Return the layers' outputs and inputs (layers,) before pruning."""
    outputs = np.array([layer.outputs for layer in layers], dtype=float)
    return outputs, np.array([layer.inputs for layer in layers], dtype=float)


def _layer(name: str, module: nn.Module, before: torch.Tensor, after: torch.Tensor) -> Layer:
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        # A transposed convolution applies all weights at each input pixel, any other at each output pixel.
        pixels = before if isinstance(module, nn.ConvTranspose2d) else after
        positions = pixels.shape[-2] * pixels.shape[-1]
        depthwise = module.groups > 1 and module.groups == module.in_channels
        inputs, outputs = module.in_channels, module.out_channels
        maps = (tuple(before.shape[2:]), tuple(after.shape[2:]))
    elif isinstance(module, nn.Linear):
        positions = after.numel() // after.shape[-1]
        depthwise, inputs, outputs = False, module.in_features, module.out_features
        maps = (tuple(before.shape[1:-1]), tuple(after.shape[1:-1]))
    else:
        vectors = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        channels = int(module.weight.numel()) if isinstance(module.weight, torch.Tensor) else 0
        return Layer(name, kind, channels, channels, True, 0, 0, vectors)
    weights = module.weight.numel()
    vectors = 0 if module.bias is None else outputs
    return Layer(name, kind, inputs, outputs, depthwise, weights * positions, weights, vectors, maps)
