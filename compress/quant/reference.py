"""Outputs of a fake-quantized network, tensor by tensor: the reference for `export.verify`."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.quant.fake_quant import ActivationQuantizer
from export.onnx_file.graph import OUTPUT

Arrays = Mapping[str, NDArray[np.float32]]


def reference_of(model: nn.Module) -> Callable[[NDArray[np.float32]], Arrays]:
    """Return a function from images (n, c, h, w) to the network's output and each quantizer's, by its module path."""

    @torch.inference_mode()
    def reference(images: NDArray[np.float32]) -> Arrays:
        found: dict[str, NDArray[np.float32]] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
                found[name] = output.cpu().contiguous().numpy()

            return hook

        quantizers = [
            (name, module) for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)
        ]
        handles = [module.register_forward_hook(keep(name)) for name, module in quantizers]
        try:
            found[OUTPUT] = model(torch.from_numpy(images)).cpu().numpy()
        finally:
            for handle in handles:
                handle.remove()
        return found

    return reference
