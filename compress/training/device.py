"""Where a rank trains: its device, and the group in which ranks share gradients."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.errors import CompressError
from compress.ranks import local_rank, ranks

Network = TypeVar("Network", bound=nn.Module)
ONEDNN_BLOCK = 16  # channels; strided 1 x 1 convolutions of fewer inputs crash in their backward pass


def device_of(asked: str) -> torch.device:
    """Return this rank's device for `auto`, `cpu` or `cuda`; CompressError if it has no GPU of its own."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise CompressError("device: cuda, but torch finds no GPU; use device: auto, or see `compress doctor`")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise CompressError(
            f"device: {asked}: no GPU for rank {local_rank()} of this machine, which has {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node={torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return device


def gradient_group(device: torch.device) -> dist.ProcessGroup | None:
    """Return the ranks' group for gradients, with torch's own timeout of minutes; None for a single rank."""
    if ranks() == 1:
        return None
    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


def place_(model: Network, device: torch.device) -> Network:
    """Move a network to the device in channels_last: convolutions up to 8 times faster on a CPU, tensor cores on a GPU."""
    model.to(device).to(memory_format=torch.channels_last)
    for layer in model.modules() if device.type == "cpu" else ():
        if isinstance(layer, nn.Conv2d) and layer.in_channels < ONEDNN_BLOCK and _is_strided_1x1(layer):
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            if not layer._forward_pre_hooks:
                layer.register_forward_pre_hook(_in_rows)
    return model


def _is_strided_1x1(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.stride != (1, 1)


def _in_rows(_layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Pass a layer its images row by row where a gradient follows: in channels_last oneDNN 3.12 writes past its memory (its issue 6035)."""
    return tuple(images.contiguous() for images in given) if torch.is_grad_enabled() else None
