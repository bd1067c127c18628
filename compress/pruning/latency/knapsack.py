"""Choose one width for each group of channels: the most value within a budget, where a layer's time depends on both of its widths.

A mixed-integer program, solved by HiGHS: a binary variable for each group and width, and a continuous one for each pair of widths of two
groups that share layers (MDP, Sun et al. 2025, eq. 5 to 8). The pair variables need not be integers: tied to the binaries as in the local
polytope, they come out as 0 or 1.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Floats = NDArray[np.float64]
GAP = 1e-3  # relative optimality gap at which the solver stops
SECONDS = 30.0


def most_value(
    values: Sequence[Floats],
    costs: Sequence[Floats],
    pairs: Mapping[tuple[int, int], Floats],
    budget: float,
    *,
    together: Sequence[Sequence[int]] = (),
) -> list[int] | None:
    """Return the index of each group's width, or None if no choice costs at most `budget`.

    `values` and `costs` (widths,) are one group's; `pairs` (widths of the first, widths of the second) is the joint cost of two groups.
    Of the groups in one entry of `together`, either all take their last width or none does.
    """
    starts = np.cumsum([0, *map(len, values)])
    count = int(starts[-1])
    pair_starts = np.cumsum([count, *(table.size for table in pairs.values())])
    objective = np.zeros(pair_starts[-1])
    objective[:count] = -np.concatenate([*values, np.empty(0)])
    price = np.concatenate([*costs, *(table.ravel() for table in pairs.values())])
    rows: list[int] = []
    columns: list[int] = []
    entries: list[float] = []
    wanted: list[float] = []
    for start, end in itertools.pairwise(starts):  # exactly one width per group
        _add(rows, columns, entries, len(wanted), range(start, end), 1.0)
        wanted.append(1.0)
    for first, *others in together:
        for other in others:
            _add(rows, columns, entries, len(wanted), [starts[first + 1] - 1], 1.0)
            _add(rows, columns, entries, len(wanted), [starts[other + 1] - 1], -1.0)
            wanted.append(0.0)
    for (first, second), start, table in zip(pairs, pair_starts, pairs.values(), strict=False):
        places = start + np.arange(table.size).reshape(table.shape)
        for group, lines in ((first, places), (second, places.T)):  # a pair is chosen if both of its widths are
            for index, line in enumerate(lines):
                _add(rows, columns, entries, len(wanted), line, 1.0)
                _add(rows, columns, entries, len(wanted), [starts[group] + index], -1.0)
                wanted.append(0.0)
    matrix = coo_array((entries, (rows, columns)), shape=(len(wanted), len(objective))).tocsr()
    scale = max(1e-12, float(np.abs(price).max(initial=0.0)))
    result = milp(
        objective,
        integrality=(np.arange(len(objective)) < count).astype(int),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(matrix, wanted, wanted),
            LinearConstraint(price[None] / scale, -np.inf, budget / scale),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    return [int(result.x[start:end].argmax()) for start, end in itertools.pairwise(starts)]


def _add(rows: list[int], columns: list[int], entries: list[float], row: int, places: object, entry: float) -> None:
    """Add one entry at each of some columns of a row."""
    for place in np.asarray(places).tolist():
        rows.append(row)
        columns.append(place)
        entries.append(entry)
