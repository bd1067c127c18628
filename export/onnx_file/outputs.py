"""A network's named outputs, and how several lie side by side in one array, which is what all but a file's ends work on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.errors import BundleError

Softmax = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class Output:
    """One of several outputs of a network."""

    name: str
    shape: tuple[int, ...]  # of one image's
    weight: float = 1.0  # in the score and in losses
    unordered: bool = False  # its rows are a set, as a detector's queries chosen by top-k: compared after matching

    softmax: Softmax | None = None  # what its channels are of a softmax, which a training then compares by KL

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


def matched(array: NDArray[Any], reference: NDArray[Any], outputs: Sequence[Output]) -> NDArray[Any]:
    """Return a packed array (n, values) with the rows of its unordered outputs moved to those of the reference that they are nearest to.

    Unordered outputs (n, rows, channels) of equally many rows are one set, whose rows move together. The assignment has the least sum of
    squared distances, each output in units of both arrays' variance over an image's rows (Hungarian method, Kuhn 1955). BundleError without
    scipy where the nearest rows alone do not tell it.
    """
    sets: dict[int, list[Output]] = {}
    for one in outputs:
        if one.unordered:
            sets.setdefault(one.shape[0], []).append(one)
    if not sets:
        return array
    places, moved = columns(outputs), array.copy()
    for rows, members in sets.items():
        for mine, its, found in zip(array, reference, moved, strict=True):  # one image's distances are in memory
            parts = [[one[places[member.name]].reshape(rows, -1) for one in (mine, its)] for member in members]
            order = _assigned(np.sum([_distances(*part) for part in parts], axis=0))
            for member, (part, _) in zip(members, parts, strict=True):
                found[places[member.name]] = part[order].ravel()
    return moved


def _distances(array: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    """Return the mean squared distance of each row of the reference (rows, channels) from each of the array, in units of their variance."""
    mine, its = (np.nan_to_num(one.astype(np.float64), posinf=1e9, neginf=-1e9) for one in (array, reference))
    unit = np.concatenate([mine, its]).var(axis=0).sum() + 1e-12
    apart = np.square(its).sum(1)[:, None] + np.square(mine).sum(1)[None] - 2 * its @ mine.T
    return np.asarray(apart / unit)


def _assigned(cost: NDArray[Any]) -> NDArray[Any]:
    """Return for each row the column of the assignment with the least sum, (rows,)."""
    nearest = cost.argmin(axis=1)
    if len(set(nearest.tolist())) == len(nearest):
        return np.asarray(nearest)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise BundleError(f"unordered outputs: rows are matched by scipy ({error}): pip install scipy") from error
    return np.asarray(linear_sum_assignment(cost)[1])
