"""What each micro-batch of each rank is of its whole batch, so that splitting a batch does not change its gradient."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from compress.data.batches import Batch


def shared(parts: Sequence[Batch], *, ranks: int, group: dist.ProcessGroup | None) -> Sequence[Batch]:
    """Return this rank's micro-batches of one batch, each with `share`; a batch in one part is returned as it is.

    A loss is a mean over n images, pixels, anchors or objects, with n = 1 where there is none. So it is n / N of the
    whole batch's loss, N over all micro-batches of all ranks. The first call of `share` counts and adds up over ranks.
    """
    if ranks == 1 and len(parts) == 1:
        return parts
    fractions: list[Tensor] = []  # (losses,) of each part
    given: list[Batch] = []

    def share(number: int, count: Callable[[Batch], Tensor]) -> Tensor:
        if not fractions:
            counts = torch.stack([count(part) for part in given])  # (parts, losses)
            total = counts.sum(0)
            if ranks > 1:
                dist.all_reduce(total, group=group)
            fractions.extend(counts.clamp(min=1) / total.clamp(min=1))
        return fractions[number]

    given.extend(part._replace(share=partial(share, number)) for number, part in enumerate(parts))
    return given
