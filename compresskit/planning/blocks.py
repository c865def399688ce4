"""Least error under a budget: which spec, and with ``method: auto`` which method, every group gets.

Methods may group matrices differently: one takes all attention matrices of one shape together, another each alone. A
block is a set of matrices that no method groups with others outside it; its partitions are the ways to cut it into
groups. Within a partition every group takes the best spec of any method that would form it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from compresskit.decomposers import AnyDecomposer, Group, Spec, Statistics, Target, WeightSource, row_blocks
from compresskit.errors import InputError
from compresskit.planning.allocation import Choice, allocate
from compresskit.planning.budgets import Step, Window
from compresskit.planning.recipe import Rule

#: Budgets, as factors of a group's fair share, that candidates are asked for.
_BUDGETS = (1 / 4, 1 / 2, 1 / math.sqrt(2), 1.0, math.sqrt(2), 2.0, 4.0)

#: Of a method's candidates for one budget, how many are looked at where several methods compete.
_NEAREST = 2

#: Errors below this count as equal: those from spectra of weights with 32 bits are no more exact, and a larger group
#: must not win by rounding.
_EXACT = 1e-3

#: What the output error of the word embedding counts: everything after it is computed from it, and rows of words that
#: training does not show stay as they are cut. Where matrices count alike it counts this many times all others together
#: (the deeper the model, the less each layer decides), where they are weighed by sensitivities so many times its own.
#: Measured (reports/plan-weights). By their numbers of weights it would count 20 to 80 times as much as another matrix,
#: and the layers would starve.
_WORDS, _WORDS_WEIGHED = 0.5, 4

#: Sensitivities below this count as this: what no prediction seems to depend on still keeps some form.
_LEAST = 1e-3

#: Prices of a parameter at which partitions are compared.
_POINTS = 64

#: What ``objective: latency`` may give up of the least total penalty, and the prices of time that are tried for it.
_GIVEN_UP, _PRICES = 0.05, np.logspace(-2, 1.5, 8)


class Proposal(NamedTuple):
    """A group with a method that may factorise it, and the rule that says so."""

    group: Group
    decomposer: AnyDecomposer
    rule: Rule

    def smallest(self, *, allow_slow: bool) -> Spec:
        """The spec with the fewest parameters; the method must have candidates for the group."""
        offered: list[Spec] = self.decomposer.candidates(self.group, 0, allow_slow=allow_slow)
        return min(offered, key=self.parameters)

    def parameters(self, spec: Spec) -> int:
        """Of the factors that ``spec`` leads to."""
        return self.decomposer.cost(self.group, spec).parameters


class Pick(NamedTuple):
    """A proposal with a spec for it."""

    proposal: Proposal
    spec: Spec


Part = list[Proposal]  # one group, and every method that would factorise it
Partition = list[Part]
Block = list[Partition]


def blocks_of(proposals: Sequence[Proposal]) -> list[Block]:
    """The blocks of some matrices, given the proposals of every method for them.

    A partition that lacks a matrix of its block takes it as other methods form it alone.
    """
    connected: list[set[str]] = []
    for proposal in proposals:
        names = {target.name for target in proposal.group.targets}
        touched = [block for block in connected if block & names]
        connected = [block for block in connected if not block & names] + [names.union(*touched)]
    return [
        _partitions([proposal for proposal in proposals if proposal.group.target_names <= block]) for block in connected
    ]


def _partitions(proposals: Sequence[Proposal]) -> Block:
    parts: dict[frozenset[str], Part] = {}
    by_method: dict[str, dict[frozenset[str], None]] = {}
    for proposal in proposals:
        names = proposal.group.target_names
        parts.setdefault(names, []).append(proposal)
        by_method.setdefault(proposal.decomposer.name, {})[names] = None
    everything = frozenset[str]().union(*parts)
    partitions = set()
    for mine in by_method.values():
        missing = everything.difference(*mine)
        partitions.add(frozenset([*mine, *(names for names in parts if len(names) == 1 and names <= missing)]))
    whole = [partition for partition in partitions if frozenset[str]().union(*partition) == everything]
    if not whole:
        raise InputError(
            f"methods {', '.join(by_method)} group {', '.join(sorted(everything))} in ways that do not fit"
        )
    return [
        [part for names, part in parts.items() if names in partition]
        for partition in sorted(whole, key=lambda names: (len(names), sorted(map(sorted, names))))
    ]


class _Option(NamedTuple):
    picks: tuple[Pick, ...]
    parameters: int
    penalty: float
    time: float
    cost: float  # what is kept small: the penalty, and with objective latency the time at some price


#: What may become of each group, by the names of its matrices.
Found = dict[frozenset[str], list[_Option]]

_FIGURES = ("parameters", "penalty", "time", "cost")


def _names(part: Part) -> frozenset[str]:
    """What tells a group from all others: the names of its matrices."""
    return part[0].group.target_names


def find_options(
    blocks: Sequence[Block],
    budget: int,
    source: WeightSource,
    statistics: Statistics | None,
    *,
    allow_slow: bool,
    fast: bool,
    progress: Callable[[str, int, int], None],
) -> Found:
    """What may become of every group: specs around its fair share of the budget, with their penalties.

    The penalty is ||W - W'||_F^2 over all matrices; with statistics the squared relative error of outputs, times the
    matrix's sensitivity where it is known; a group's error, the mean over its matrices, counts with their sum. The word
    embedding counts more (:data:`_WORDS`).

    Args:
        blocks: with all groups.
        budget: parameters that the factors have together.
        source: the weights.
        statistics: of the matrices' inputs, or None.
        allow_slow: also specs above 1.1 x the dense FLOPs.
        fast: keep what is fast too.
        progress: called with (what, done, total) after each group.
    """
    common = sum(proposal.group.parameters for block in blocks for part in block[0] for proposal in part[:1]) / budget
    everything = {_names(part): part for block in blocks for partition in block for part in partition}
    targets = {target.name: target for part in everything.values() for target in part[0].group.targets}
    words = max(_WORDS * sum(target.role != "embedding" for target in targets.values()), 1)
    found: Found = {}
    known: dict[Any, list[list[Spec]]] = {}
    for done, (names, part) in enumerate(everything.items(), start=1):
        group, methods = part[0].group, tuple(proposal.decomposer.name for proposal in part)
        alike = (methods, group.role, group.kind, group.shape, len(group.targets))
        candidates = known.get(alike) or _candidates(part, common, allow_slow)
        found[names] = _options(part, candidates, source, statistics, words)
        if statistics is not None:  # errors of outputs take long: what never pays for one matrix is not tried on others
            known.setdefault(alike, _fronts(part, found[names], fast=fast))
        progress("candidates", done, len(everything))
    return found


def least_error(blocks: Sequence[Block], found: Found, step: Step, window: Window, *, fast: bool) -> list[Pick] | None:
    """A partition for every block and a pick for each of its groups, with the least total penalty.

    Args:
        blocks: with all groups.
        found: from :func:`find_options`, for the budget of this step.
        step: decides the partitions, and what time is worth.
        window: of that step, the totals that count.
        fast: the least estimated time instead, with a total penalty at most :data:`_GIVEN_UP` above the least that the
            step's whole budget would allow.

    Returns:
        None if no total lies in the window.
    """
    return _picks(_cheapest(blocks, found, step, window, _price(blocks, found, step) if fast else 0.0))


def _picks(options: list[_Option] | None) -> list[Pick] | None:
    return None if options is None else [pick for option in options for pick in option.picks]


def _price(blocks: Sequence[Block], found: Found, step: Step) -> float:
    """The price of time at which a plan with the step's whole budget is fastest."""
    best = _cheapest(blocks, found, step, step.whole, 0.0)
    if best is None:
        return 0.0
    least, unit = _total(best, "penalty"), _total(best, "penalty") / max(_total(best, "time"), 1.0)
    chosen, shortest = 0.0, _total(best, "time")
    for price in unit * _PRICES:
        tried = _cheapest(blocks, found, step, step.whole, float(price))
        # Less is faster, but it was not asked for.
        small = tried is None or _total(tried, "parameters") < step.preferred
        if tried is None or small or _total(tried, "penalty") > (1 + _GIVEN_UP) * least:
            break
        if _total(tried, "time") < shortest:
            chosen, shortest = float(price), _total(tried, "time")
    return chosen


def _total(options: Sequence[_Option], figure: str) -> float:
    return sum(getattr(option, figure) for option in options)


def _cheapest(blocks: Sequence[Block], found: Found, step: Step, window: Window, price: float) -> list[_Option] | None:
    """For every group of the best partitions its option, with the least penalty and ``price`` times the time."""
    if price:
        found = {key: _front([o._replace(cost=o.penalty + price * o.time) for o in found[key]]) for key in found}
    partitions = _best_partitions(blocks, found, step.reach)
    if partitions is None:
        return None
    items = [found[_names(part)] for partition in partitions for part in partition]
    chosen = allocate([[Choice(o.parameters, o.cost) for o in options] for options in items], step.budget, window)
    return None if chosen is None else [options[index] for options, index in zip(items, chosen, strict=True)]


def _front(options: Sequence[_Option]) -> list[_Option]:
    """The options that no other one beats with at most as many parameters."""
    front: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.parameters, option.cost)):
        if not front or option.cost < front[-1].cost:
            front.append(option)
    return front


def _candidates(part: Part, common: float, allow_slow: bool) -> list[list[Spec]]:
    """For every method that may factorise a group its candidates around the group's fair share of the budget."""
    found = []
    for group, decomposer, _ in part:
        wanted = (round(factor * group.parameters / common) for factor in _BUDGETS)
        offers = (decomposer.candidates(group, count, allow_slow=allow_slow) for count in wanted)
        found.append([spec for offered in offers for spec in (offered if len(part) == 1 else offered[:_NEAREST])])
    for proposal, specs in zip(part, found, strict=True):
        specs.append(proposal.smallest(allow_slow=allow_slow))
    return [list(dict.fromkeys(specs)) for specs in found]


def _options(
    part: Part,
    candidates: Sequence[Sequence[Spec]],
    source: WeightSource,
    statistics: Statistics | None,
    words: float,
) -> list[_Option]:
    """What may become of a group, given the candidates of every method for it; ``words``: see :func:`_weight`."""
    options = []
    for proposal, specs in zip(part, candidates, strict=True):
        group, decomposer = proposal.group, proposal.decomposer
        if statistics is None:
            scale, errors = _energy(group, source), decomposer.errors(group, specs, source)
        else:
            scale = sum(_weight(target, statistics, words) for target in group.targets)
            errors = decomposer.output_errors(group, specs, source, statistics)
        penalties = [scale * max(error, _EXACT) ** 2 for error in errors]
        times = [decomposer.time(group, spec) for spec in specs]
        options += [
            _Option((Pick(proposal, spec),), decomposer.cost(group, spec).parameters, penalty, time, penalty)
            for spec, penalty, time in zip(specs, penalties, times, strict=True)
        ]
    return options


def _weight(target: Target, statistics: Statistics, words: float) -> float:
    """How often the squared relative error of the target's output counts; ``words``: that of the word embedding, where
    matrices count alike.
    """
    is_words, sensitivity = target.role == "embedding", statistics.sensitivity(target)
    if sensitivity is None:
        return words if is_words else 1
    return max(sensitivity, _LEAST) * (_WORDS_WEIGHED if is_words else 1)


def _fronts(part: Part, options: Sequence[_Option], *, fast: bool) -> list[list[Spec]]:
    """For every method the specs that no other one of it beats in parameters and penalty, with ``fast`` in time too."""
    own = [[option for option in options if option.picks[0].proposal is proposal] for proposal in part]
    if not fast:
        return [[option.picks[0].spec for option in _front(mine)] for mine in own]
    return [
        [option.picks[0].spec for option in mine if not any(_beats(other, option) for other in mine)] for mine in own
    ]


def _beats(one: _Option, other: _Option) -> bool:
    """Whether ``one`` is nowhere worse and somewhere better."""
    figures = [(getattr(one, name), getattr(other, name)) for name in ("parameters", "penalty", "time")]
    return all(mine <= its for mine, its in figures) and any(mine < its for mine, its in figures)


def _best_partitions(blocks: Sequence[Block], found: Found, budget: int) -> list[Partition] | None:
    """Of every block the partition that the least total penalty would take, by a curve of each; None if no partitions
    fit the budget.
    """
    if all(len(block) == 1 for block in blocks):
        return [block[0] for block in blocks]
    curves: list[list[tuple[Partition, _Option]]] = []
    for block in blocks:
        curves.append([])
        for partition in block:
            curves[-1] += [(partition, point) for point in _curve([found[_names(part)] for part in partition])]
    items = [[Choice(o.parameters, o.cost) for _, o in curve] for curve in curves]
    chosen = allocate(items, budget, Window(budget, 0, -1))
    return None if chosen is None else [curve[index][0] for curve, index in zip(curves, chosen, strict=True)]


def _curve(parts: Sequence[Sequence[_Option]]) -> list[_Option]:
    """Totals of a partition with the least penalty for their parameters: at every price of a parameter each group takes
    the option that costs least, penalty and price together (the lower convex hull of all totals).
    """
    sizes, penalties = (
        [np.array([getattr(o, name) for o in part], float) for part in parts] for name in ("parameters", "cost")
    )
    middle = sum(map(np.ptp, penalties)) / max(sum(map(np.ptp, sizes)), 1.0)
    points = {}
    for price in middle * np.array([0.0, *np.logspace(-4, 4, _POINTS), 1e12]):  # from least penalty to least size
        picked = [int(np.argmin(penalty + price * size)) for size, penalty in zip(sizes, penalties, strict=True)]
        total = [sum(getattr(part[i], name) for part, i in zip(parts, picked, strict=True)) for name in _FIGURES]
        points[total[0]] = _Option((), *total)
    return list(points.values())


def _energy(group: Group, source: WeightSource) -> float:
    """||W||_F^2 over the group's matrices."""
    rows = (block for target in group.targets for block in row_blocks(source, target))
    return sum(float(torch.linalg.vector_norm(block.float(), dim=1).double().square().sum()) for block in rows)
