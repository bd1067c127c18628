"""A network's named outputs, and how several lie side by side in one array, which is what all but a file's ends work on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Output:
    """One of several outputs of a network."""

    name: str
    shape: tuple[int, ...]  # of one image's
    weight: float = 1.0  # in the score and in losses

    @property
    def size(self) -> int:
        """The number of its values for one image."""
        return prod(self.shape)


def columns(outputs: Sequence[Output]) -> dict[str, slice]:
    """Return where each output lies in a packed array."""
    ends = np.cumsum([one.size for one in outputs]).tolist()
    return {one.name: slice(end - one.size, end) for one, end in zip(outputs, ends, strict=True)}


def packed(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return several outputs (n, ...) side by side as (n, values), and a single one as it is."""
    if len(arrays) == 1:
        return np.asarray(arrays[0])
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def unpacked(array: NDArray[Any], outputs: Sequence[Output]) -> Mapping[str, NDArray[Any]]:
    """Return each output (n, *shape) of a packed array (n, values)."""
    places = columns(outputs)
    return {one.name: array[:, places[one.name]].reshape(-1, *one.shape) for one in outputs}
