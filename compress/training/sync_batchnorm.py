"""Batch-norm statistics over the images of all ranks while a network trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def synchronized(model: nn.Module, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Let the model's batch-norms share their statistics over the group; undo it at the end.

    Only their class changes: torch's own conversion makes new modules, which lose the attributes of `qat`'s batch-norms.
    """
    norms = {module: type(module) for module in model.modules() if isinstance(module, _BatchNorm)}
    for norm, kind in norms.items():
        norm.__class__ = type(kind.__name__, (kind, nn.SyncBatchNorm), {"process_group": group})
    try:
        yield
    finally:
        for norm, kind in norms.items():
            norm.__class__ = kind
