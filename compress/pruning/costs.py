"""What a cut costs or saves: every layer's width, multiply-accumulates and parameters as functions of the channels that stay."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

OUTPUT_CUTS = frozenset(pruner.prune_out_channels for pruner in tp.function.PrunerBox.values() if pruner is not None)


def is_output_cut(handler: Callable[..., object]) -> bool:
    """Tell whether Torch-Pruning's function removes a layer's outputs (else its inputs)."""
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


def measure_layers(model: nn.Module, images: torch.Tensor) -> list[Layer]:
    """Run `images` (1, 3, s, s) once and return every layer with parameters, in order of execution."""
    found: dict[str, Layer] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        # Every input pixel of a transposed convolution meets all weights, every output pixel of another.
        name, pixels = names[module], inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        layer = _layer(name, module, pixels)
        before = found.get(name)  # a detector's head runs on every level of its pyramid
        found[name] = layer if before is None else replace(layer, macs=before.macs + layer.macs)

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    hooks = [module.register_forward_hook(record) for module in names if isinstance(module, kinds)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def _layer(name: str, module: nn.Module, pixels: torch.Tensor) -> Layer:
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        positions = pixels.shape[-2] * pixels.shape[-1]
        depthwise = module.groups > 1 and module.groups == module.in_channels
        inputs, outputs = module.in_channels, module.out_channels
    elif isinstance(module, nn.Linear):
        positions = pixels.numel() // pixels.shape[-1]
        depthwise, inputs, outputs = False, module.in_features, module.out_features
    else:
        vectors = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        channels = int(module.weight.numel()) if isinstance(module.weight, torch.Tensor) else 0
        return Layer(name, kind, channels, channels, True, 0, 0, vectors)
    weights = module.weight.numel()
    vectors = 0 if module.bias is None else outputs
    return Layer(name, kind, inputs, outputs, depthwise, weights * positions, weights, vectors)


class CostModel:
    """The network's cost as a function of how many inputs and outputs each layer has left."""

    def __init__(self, layers: list[Layer], goal: str) -> None:
        self.outputs = np.array([layer.outputs for layer in layers], dtype=float)
        self.inputs = np.array([layer.inputs for layer in layers], dtype=float)
        self.depthwise = np.array([layer.depthwise for layer in layers])
        macs = goal == "macs"
        self.product = np.array([layer.macs if macs else layer.weights for layer in layers], dtype=float)
        self.vector = np.array([0 if macs else layer.vectors for layer in layers], dtype=float)

    def cost(self, outputs: np.ndarray, inputs: np.ndarray) -> float:
        """Return multiply-accumulates or parameters for the given widths (layers,)."""
        kept_outputs = outputs / np.maximum(self.outputs, 1)
        kept_inputs = np.where(self.depthwise, 1.0, inputs / np.maximum(self.inputs, 1))
        return float((self.product * kept_outputs * kept_inputs + self.vector * kept_outputs).sum())
