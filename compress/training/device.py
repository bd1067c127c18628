"""Where a rank trains: its device, and the group in which ranks share gradients."""

import torch
import torch.distributed as dist

from compress.errors import CompressError
from compress.ranks import local_rank, ranks


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
