"""From a recipe to a plan: which spec every group gets, and the totals this leads to.

Needs only the shapes of the model (the meta device will do), and the weights for the ``error`` allocation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from compresskit.calibration.statistics import Calibration
from compresskit.decomposers import AUTO, DENSE, Group, Spec, Statistics, WeightSource, registry
from compresskit.errors import InputError, UnreachableError
from compresskit.model.measure import Flops, count_flops
from compresskit.model.swap import mount
from compresskit.model.targets import count_parameters, find_targets, skeleton
from compresskit.planning.blocks import Block, Pick, Proposal, blocks_of, least_error
from compresskit.planning.recipe import Recipe, apply_rules
from compresskit.planning.uniform import uniform

#: The achieved ratio lies within this share above the asked one, unless the plan says otherwise.
SLACK = 0.01

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Assignment:
    """One group with its method and spec.

    Attributes:
        parameters: of the factors, biases left out.
        error: relative Frobenius error, predicted by the plan or measured after factorising; None if not known.
        output_error: of the outputs on the text of the calibration, measured after factorising.
    """

    group: Group
    method: str
    spec: Spec
    parameters: int
    error: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class Plan:
    """A spec for each group, with the totals.

    Attributes:
        recipe: what was asked.
        assignments: every group that is factorised, in the model's order.
        ratio_asked: None where explicit shapes were given.
        parameters_before: of the dense model as loaded, tied and shared tensors once.
        parameters_after: of the compressed one.
        flops_before: at batch 1, length 128.
        flops_after: likewise.
        notes: what the user should know, e.g. a ratio that is not near the asked one.
        dense: names of the matrices that stay as they are.
        calibration: text and tokens that the factors were fitted to; None without.
    """

    recipe: Recipe
    assignments: tuple[Assignment, ...]
    ratio_asked: float | None
    parameters_before: int
    parameters_after: int
    flops_before: Flops
    flops_after: Flops
    notes: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    calibration: dict[str, Any] | None = None

    @property
    def ratio(self) -> float:
        """Achieved: dense parameters / compressed parameters."""
        return self.parameters_before / self.parameters_after

    def with_errors(self, errors: dict[str, float], output_errors: dict[str, float] | None = None) -> Plan:
        """The same plan with these errors by group name."""
        outputs = output_errors or {}
        assignments = (
            replace(
                a,
                error=errors.get(a.group.name, a.error),
                output_error=outputs.get(a.group.name, a.output_error),
            )
            for a in self.assignments
        )
        return replace(self, assignments=tuple(assignments))


def make_plan(
    model: PreTrainedModel,
    recipe: Recipe,
    source: WeightSource | None = None,
    *,
    statistics: Calibration | None = None,
    predict_errors: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Choose a spec for every group that the recipe's rules take.

    Args:
        model: the dense model; only shapes are used.
        recipe: with a ratio, or with explicit shapes.
        source: weights. Required by ``allocation: error`` and by ``predict_errors``.
        statistics: of the targets' inputs, from calibration: errors are then those of outputs.
        predict_errors: fill in every assignment's error, or with statistics its output error.
        progress: called with (what, done, total) during long work.

    Raises:
        InputError: a rule that matches nothing, a ratio out of reach, a shape that does not fit or saves nothing.
    """
    proposals = _proposals(model, recipe)
    if not proposals:
        raise InputError(f"recipe {recipe.name} factorises nothing in this model")
    notes: list[str] = []
    if recipe.explicit:
        picks = [Pick(proposal, _resolve(proposal, recipe)) for proposal in proposals]
    elif recipe.ratio is None:
        raise InputError(f"recipe {recipe.name} gives neither shapes nor a ratio: add --ratio")
    else:
        picks, notes = _chosen(model, proposals, recipe, recipe.ratio, source, statistics, progress)
    student = skeleton(model, "cpu")
    for (group, decomposer, _), spec in picks:
        mount(student, decomposer, group, spec)
    plan = Plan(
        recipe=recipe,
        assignments=tuple(
            Assignment(group, decomposer.name, spec, decomposer.cost(group, spec).parameters)
            for (group, decomposer, _), spec in picks
        ),
        ratio_asked=recipe.ratio,
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(student),
        flops_before=count_flops(model),
        flops_after=count_flops(student),
        dense=tuple(target.name for target in find_targets(student)),
        calibration=statistics.record() if statistics is not None else None,
    )
    plan = replace(plan, notes=(*notes, *_notes(plan, statistics)))
    if predict_errors:
        predicted = _predicted(picks, source, statistics, progress)
        plan = plan.with_errors(predicted) if statistics is None else plan.with_errors({}, predicted)
    return plan


def _chosen(
    model: PreTrainedModel,
    proposals: list[Proposal],
    recipe: Recipe,
    ratio: float,
    source: WeightSource | None,
    statistics: Statistics | None,
    progress: Progress,
) -> tuple[list[Pick], list[str]]:
    """What a recipe with a ratio comes to, and what to say of it."""
    fast = recipe.objective == "latency"
    proposals, stay_dense = _offered(proposals, recipe.allow_slow)
    if not proposals:
        raise UnreachableError(f"recipe {recipe.name}: no matrix of this model has a shape that saves parameters")
    notes = [f"{name} stays dense: no shape of it saves parameters" for name in stay_dense]
    blocks = blocks_of(proposals)
    before = count_parameters(model)
    rest = before - sum(proposal.group.parameters for block in blocks for proposal, *_ in block[0])
    budget = math.floor(before / ratio) - rest
    _check_reach(blocks, recipe, ratio, before, rest)
    slack, slow = _slack(budget, rest), recipe.allow_slow
    if recipe.allocation == "uniform":
        return uniform(proposals, budget, slack, allow_slow=slow, fast=fast), notes
    if source is None:
        raise InputError("allocation error needs the weights, not only the shapes")
    picks = least_error(blocks, budget, slack, source, statistics, allow_slow=slow, fast=fast, progress=progress)
    order = {target.name: index for index, target in enumerate(find_targets(model))}
    return sorted(picks, key=lambda pick: order[pick.proposal.group.targets[0].name]), notes


def _notes(plan: Plan, statistics: Calibration | None) -> Iterator[str]:
    asked = plan.ratio_asked
    if asked is not None and plan.ratio > asked * (1 + SLACK):
        yield f"{plan.ratio:.2f}x is the smallest ratio of at least {asked:g}x that was found"
    if statistics is not None:
        if plan.recipe.calibration_sha256 not in (None, statistics.text["sha256"]):
            yield "the recipe was made with another calibration text: its factors will differ"
        yield from statistics.notes


def _proposals(model: PreTrainedModel, recipe: Recipe) -> list[Proposal]:
    targets = find_targets(model)
    order = {target.name: index for index, target in enumerate(targets)}
    proposals = []
    names: Counter[str] = Counter()
    for rule, chosen in apply_rules(recipe, targets):
        if rule.method == DENSE:
            continue
        rivals = registry.METHODS.all().values() if rule.method == AUTO else [registry.get(rule.method)]
        for decomposer, group in ((rival, group) for rival in rivals for group in rival.groups(chosen)):
            if rule.method == AUTO and not decomposer.has_own_form(group):
                continue
            if len(group.targets) > 1:
                names[group.name] += 1
                if names[group.name] > 1:  # two rules that share factors among different layers of one role
                    group = replace(group, name=f"{group.name}_{names[group.name]}")
            proposals.append(Proposal(group, decomposer, rule))
    return sorted(proposals, key=lambda proposal: order[proposal.group.targets[0].name])


def _offered(proposals: list[Proposal], allow_slow: bool) -> tuple[list[Proposal], list[str]]:
    """The proposals that have candidates at all, and the groups for which no method has any (prime or tiny shapes)."""
    some = [
        proposal for proposal in proposals if proposal.decomposer.candidates(proposal.group, 0, allow_slow=allow_slow)
    ]
    covered = frozenset[str]().union(*(proposal.group.target_names for proposal in some))
    return some, list(dict.fromkeys(t.group.name for t in proposals if not t.group.target_names & covered))


def _resolve(proposal: Proposal, recipe: Recipe) -> Spec:
    try:
        options = proposal.rule.options
        assert options is not None  # every rule of an explicit recipe has some
        return proposal.decomposer.resolve(proposal.group, options)
    except InputError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from None


def _check_reach(blocks: Sequence[Block], recipe: Recipe, ratio: float, before: int, rest: int) -> None:
    def least_of(proposal: Proposal) -> int:
        smallest = proposal.decomposer.candidates(proposal.group, 0, allow_slow=recipe.allow_slow)
        costs = [proposal.decomposer.cost(proposal.group, spec).parameters for spec in smallest]
        return min([*costs, proposal.group.parameters])

    least = rest + sum(
        min(sum(min(map(least_of, part)) for part in partition) for partition in block) for block in blocks
    )
    if before / ratio < least:
        everyone = {
            proposal.decomposer.name
            for block in blocks
            for partition in block
            for part in partition
            for proposal in part
        }
        methods = " and ".join(sorted(everyone))
        raise UnreachableError(
            f"ratio {ratio:g} is out of reach: with {methods} this model gets at most "
            f"{math.floor(100 * before / least) / 100:g}x smaller ({rest:,} of its {before:,} parameters stay dense)"
        )


def _slack(budget: int, rest: int) -> float:
    """SLACK of the whole model's parameters, as a share of the factorised part's budget."""
    lowest = (budget + rest) / (1 + SLACK) - rest
    return budget / lowest - 1 if lowest > 0 else math.inf


def _predicted(
    picks: Sequence[Pick], source: WeightSource | None, statistics: Statistics | None, progress: Progress
) -> dict[str, float]:
    if source is None:
        raise InputError("errors cannot be predicted without the weights")
    errors = {}
    for done, ((group, decomposer, _), spec) in enumerate(picks, start=1):
        if statistics is None:
            (errors[group.name],) = decomposer.errors(group, [spec], source)
        else:
            (errors[group.name],) = decomposer.output_errors(group, [spec], source, statistics)
        progress("errors", done, len(picks))
    return errors
