"""Images that a caller of the Python functions gives."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from export.images.size import Shape

Images = Iterable[Any] | Tensor
"""Normalized images (n, channels, height, width): a tensor, an array, or batches of them, alone or first in a tuple."""


def first_images(images: Images, number: int) -> tuple[Tensor, Shape]:
    """Return the first images (n, channels, height, width) on the CPU, at most `number`, and the shape of one."""
    taken: list[Tensor] = []
    for given in [images] if hasattr(images, "shape") else images:
        taken.append(torch.as_tensor(given[0] if isinstance(given, tuple | list) else given).float().cpu())
        if taken[-1].dim() != 4:
            raise CompressError(f"images: must be (n, channels, height, width), got {tuple(taken[-1].shape)}")
        if sum(map(len, taken)) >= number:
            break
    _, channels, height, width = taken[0].shape
    return torch.cat(taken)[:number], (channels, height, width)
