"""Which totals a plan may have. What was asked is one thing, what candidates are made for another.

Candidates, fair shares and penalties depend on a budget. They are worked out for the steps of a ladder that the model
alone decides, and what was asked only says which totals of a step count. So two plans choose among the same totals, and
who asks for a smaller model never gets a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, pairwise
from typing import NamedTuple

#: The achieved ratio lies within this share above the asked one, unless the plan says otherwise.
SLACK = 0.01

#: Budgets of neighbouring steps differ by at most this factor.
_WIDTH = 1.1


class Window(NamedTuple):
    """Which totals count.

    Attributes:
        most: none is larger.
        preferred: those from here on come before all others; without any, the largest one is taken.
        above: all are larger.
    """

    most: int
    preferred: float
    above: int


class Step(NamedTuple):
    """One step of the ladder, in parameters that all factors have together.

    Attributes:
        budget: what candidates are made for.
        preferred: what counts as near to the budget begins here.
        above: the next step's budget: totals of this step are larger.
        reach: what the groups that are chosen must be able to come down to.
    """

    budget: int
    preferred: float
    above: int
    reach: int

    @property
    def whole(self) -> Window:
        """All totals of the step."""
        return Window(self.budget, self.preferred, self.above)


def ladder(before: int, rest: int, least: int) -> list[Step]:
    """The steps of a model, largest budgets first: ratios of two digits (1.0, 1.1, ..., 9.9, 10, 11, ..., 99, 100,
    110, ...), with more between them where the factorised part is small.

    Args:
        before: parameters of the dense model.
        rest: those of them that stay as they are.
        least: the smallest total of the factors; the last step holds it.
    """
    budgets = [before - rest]
    for ratio in _two_digits():
        budget = before * 10 // ratio - rest
        if budget < least:
            break
        budgets.append(budget)
    between: set[int] = set()
    for upper, lower in pairwise([*budgets, least]):
        parts = max(1, math.ceil(math.log(upper / lower) / math.log(_WIDTH)))
        between |= {int(upper * (lower / upper) ** (part / parts)) for part in range(1, parts)}
    every = sorted({*budgets, *between}, reverse=True)
    return [
        Step(budget, near(budget, rest), above, least if above < least else budget)
        for budget, above in pairwise([*every, least - 1])
    ]


def near(budget: int, rest: int) -> float:
    """Where totals of the factors begin that make the whole model at most :data:`SLACK` smaller than the budget."""
    return (budget + rest) / (1 + SLACK) - rest


def _two_digits() -> Iterator[int]:
    """Ratios of two digits from 1 on, in tenths."""
    return (digits * 10**power for power in count() for digits in range(10, 100))


def windows(steps: list[Step], most: int, rest: int) -> Iterator[tuple[Step, Window]]:
    """For totals of at most ``most`` the steps that may have one, and which of their totals count."""
    for step in steps:
        if step.above < most:
            yield step, Window(min(most, step.budget), near(most, rest), step.above)
