"""Uniform plans: every matrix about equally much smaller. Shapes are enough, no weight is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from compresskit.decomposers import NEAR, Spec
from compresskit.planning.allocation import Choice, allocate
from compresskit.planning.blocks import Pick, Proposal
from compresskit.planning.budgets import Step, Window

#: Bands around the common ratio, each NEAR wider than the one before, in which ratios count as equally near.
_BANDS = 12

#: What a candidate costs beside the one before it, in steps of distance, where candidates come best first.
_LATER = 0.003

#: The band that ``objective: latency`` starts with: ratios of single matrices may differ by a factor of 1.6 either way.
_ROOM = 3


class _Class(NamedTuple):
    """Groups of one role and shape, which a uniform plan gives one spec.

    Attributes:
        members: a proposal for each of them, all of one method.
        specs: what it may be.
        parameters: of each spec.
        distances: of each spec's ratio from the common one, as a logarithm.
        losses: what is kept small: complexity, distance and what the method prefers less, or the estimated time.
    """

    members: list[Proposal]
    specs: list[Spec]
    parameters: list[int]
    distances: list[float]
    losses: list[float]

    def choices(self, reach: float) -> dict[int, Choice]:
        """The specs whose distance is within reach, by their place."""
        count = len(self.members)
        return {
            i: Choice(count * self.parameters[i], self.losses[i])
            for i, distance in enumerate(self.distances)
            if distance <= reach
        }


def uniform(
    proposals: Sequence[Proposal], step: Step, window: Window, *, allow_slow: bool, fast: bool
) -> list[Pick] | None:
    """One spec per (role, shape), all ratios as near to a common one as possible; among near ones the less complex ones
    and what a method prefers, or with ``fast`` the least estimated time.

    Args:
        proposals: one for each group.
        step: its budget decides the common ratio.
        window: of that step, the totals that count.
        allow_slow: also specs above 1.1 x the dense FLOPs.
        fast: the least estimated time counts, not complexity.

    Returns:
        A pick for every proposal, in their order; None if no total lies in the window.
    """
    alike: dict[tuple[Any, ...], list[Proposal]] = defaultdict(list)
    for proposal in proposals:
        group = proposal.group
        alike[proposal.decomposer.name, group.role, group.kind, group.shape, len(group.targets)].append(proposal)
    # The ratio that all would have if shapes were continuous.
    common = sum(proposal.group.parameters for proposal in proposals) / step.budget
    classes = [_class(members, common, allow_slow, fast=fast) for members in alike.values()]

    # The narrowest band of ratios around the common one with a preferred total; speed gets room to choose from.
    places: list[int] | None = None
    for band in range(_ROOM if fast else 1, _BANDS + 1):
        last = band == _BANDS
        choices = [class_.choices(math.inf if last else band * NEAR) for class_ in classes]
        picked = allocate([list(item.values()) for item in choices], step.budget, window) if all(choices) else None
        if picked is not None:
            places = [list(item)[index] for item, index in zip(choices, picked, strict=True)]
            total = sum(item[place].parameters for item, place in zip(choices, places, strict=True))
            if total >= window.preferred:
                break
    if places is None:
        return None
    chosen = {
        proposal.group.name: class_.specs[place]
        for class_, place in zip(classes, places, strict=True)
        for proposal in class_.members
    }
    return [Pick(proposal, chosen[proposal.group.name]) for proposal in proposals]


def _class(members: list[Proposal], common: float, allow_slow: bool, *, fast: bool) -> _Class:
    group, decomposer, _ = members[0]
    wanted = group.parameters / common
    offered = [
        spec
        for factor in (1.0, 0.5, 2.0)
        for spec in decomposer.candidates(group, round(factor * wanted), allow_slow=allow_slow)
    ]
    offered.append(members[0].smallest(allow_slow=allow_slow))
    offered += [decomposer.faster(group, spec) for spec in offered] if fast else []
    specs = list(dict.fromkeys(offered))
    parameters = [decomposer.cost(group, spec).parameters for spec in specs]
    distances = [abs(math.log(count * common / group.parameters)) for count in parameters]
    if fast:
        losses = [len(members) * decomposer.time(group, spec) for spec in specs]
    else:
        later = _LATER if decomposer.best_first else 0
        losses = [
            spec.complexity + distance + later * i
            for i, (spec, distance) in enumerate(zip(specs, distances, strict=True))
        ]
    return _Class(members, specs, parameters, distances, losses)
