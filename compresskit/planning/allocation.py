"""One choice per item under a parameter budget: the multiple-choice knapsack, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: Resolution of the table. Totals themselves stay exact: each cell keeps the true total of its best choice.
_CELLS = 8000


class Choice(NamedTuple):
    """Something an item may take: its parameters, and the penalty to keep small."""

    parameters: int
    penalty: float


def allocate(items: Sequence[Sequence[Choice]], budget: int, slack: float) -> list[int] | None:
    """For every item the index of a choice, so that the sum of parameters is at most ``budget``.

    Among totals in [budget / (1 + slack), budget] the least sum of penalties wins; if no total lies there, the
    largest total below. None if even the smallest choices exceed the budget.
    """
    smallest = [min(choice.parameters for choice in item) for item in items]
    room = budget - sum(smallest)
    if room < 0:
        return None
    width = max(room / _CELLS, 1e-9)
    extras = [[choice.parameters - least for choice in item] for item, least in zip(items, smallest, strict=True)]

    penalty = np.full(_CELLS + 1, np.inf)
    total = np.zeros(_CELLS + 1, dtype=np.int64)  # true extra parameters of the best choice in each cell
    penalty[0] = 0.0
    history: list[tuple[np.ndarray, np.ndarray]] = []  # per item: choice taken and cell come from
    for item, extra in zip(items, extras, strict=True):
        reachable = np.flatnonzero(np.isfinite(penalty))
        new_penalty = np.full(_CELLS + 1, np.inf)
        new_total = np.zeros(_CELLS + 1, dtype=np.int64)
        taken = np.full(_CELLS + 1, -1, dtype=np.int32)
        origin = np.zeros(_CELLS + 1, dtype=np.int32)
        for index, choice in enumerate(item):
            totals = total[reachable] + extra[index]
            fits = totals <= room
            cells = (totals[fits] / width).astype(np.int64).clip(max=_CELLS)
            penalties = penalty[reachable][fits] + choice.penalty
            # Best per cell first, so that the first occurrence of a cell is the one to keep.
            order = np.lexsort((-totals[fits], penalties, cells))
            cells, first = np.unique(cells[order], return_index=True)
            best = order[first]
            better = penalties[best] < new_penalty[cells]
            cells, best = cells[better], best[better]
            new_penalty[cells] = penalties[best]
            new_total[cells] = totals[fits][best]
            taken[cells] = index
            origin[cells] = reachable[fits][best]
        penalty, total = new_penalty, new_total
        history.append((taken, origin))

    ends = np.flatnonzero(np.isfinite(penalty))
    inside = ends[total[ends] + sum(smallest) >= budget / (1 + slack)]
    cell = int(inside[np.argmin(penalty[inside])]) if len(inside) else int(ends[np.argmax(total[ends])])
    picks = []
    for taken, origin in reversed(history):
        picks.append(int(taken[cell]))
        cell = int(origin[cell])
    return picks[::-1]
