"""A network's predictions for images without labels, which become their labels."""

from collections.abc import Sequence, Sized

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.data.batches import eval_batches, in_order
from compress.data.dataset import Dataset

Numbers = NDArray[np.int64]


@torch.no_grad()
def predictions(
    images: Dataset,
    network: nn.Module,
    names: Sequence[str] | None,
    *,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> tuple[Sequence[str], Numbers, Numbers]:
    """Return the classes' names, and the likeliest class of every training image (n,) and validation image (m,).

    Classes without names are numbered. A broken image gets class 0, but is never used.
    """
    tables = []
    for views, stored in ((images.train, images.train), (images.val, images.held_out)):
        shares = in_order(len(views)).split(batch_size)
        batches = eval_batches(views, images.preprocess, shares, device=device, workers=workers)
        # The targets of images without labels are their numbers.
        rows = [(batch.targets.cpu().numpy(), network(batch.images).float().cpu().numpy()) for batch in batches]
        numbers, outputs = (np.concatenate(column) for column in zip(*rows, strict=True))
        names = names or [f"class_{index:04d}" for index in range(outputs.shape[1])]
        tables.append(_table(stored, numbers, outputs))
    assert names is not None  # both parts have images
    return names, tables[0], tables[1]


def _table(images: Sized, numbers: Numbers, outputs: NDArray[np.float32]) -> Numbers:
    table = np.zeros(max(len(images), int(numbers.max()) + 1), np.int64)
    table[numbers] = outputs.argmax(axis=1)
    return table
