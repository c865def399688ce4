"""One choice per item under a parameter budget: the multiple-choice knapsack, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from compresskit.planning.budgets import Window

#: Resolution of the table. Totals themselves stay exact: each cell keeps the true total of its best choice.
_CELLS = 8000


class Choice(NamedTuple):
    """Something an item may take: its parameters, and the penalty to keep small."""

    parameters: int
    penalty: float


def allocate(items: Sequence[Sequence[Choice]], budget: int, window: Window) -> list[int] | None:
    """For every item the index of a choice, so that the sum of parameters lies in the window.

    Among preferred totals the least sum of penalties wins; if there are none, the largest total below. Which totals are
    known depends on ``budget`` alone: of two windows with the same one, the lower never gives the larger total.

    Args:
        items: what each may take.
        budget: the largest total that is looked at.
        window: the totals that count.

    Returns:
        None if no total lies in the window.
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
    totals = total[ends] + sum(smallest)
    ends = ends[(totals > window.above) & (totals <= window.most)]
    if not len(ends):
        # A cell keeps one total, so the smallest of all may not be among them.
        least = [min(range(len(item)), key=lambda index, item=item: item[index]) for item in items]  # type: ignore[misc]
        return least if window.above < sum(smallest) <= window.most else None
    inside = ends[total[ends] + sum(smallest) >= window.preferred]
    cell = int(inside[np.argmin(penalty[inside])]) if len(inside) else int(ends[np.argmax(total[ends])])
    picks = []
    for taken, origin in reversed(history):
        picks.append(int(taken[cell]))
        cell = int(origin[cell])
    return picks[::-1]
