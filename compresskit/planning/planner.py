"""From a recipe to a plan: which spec every group gets, and the totals this leads to.

Needs only the shapes of the model (the meta device will do), and the weights for the ``error`` allocation.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from compresskit.calibration.statistics import Calibration
from compresskit.decomposers import registry
from compresskit.decomposers.base import AUTO, DENSE, NEAR, Group, Source, Spec, Statistics
from compresskit.errors import InputError, UnreachableError
from compresskit.model.measure import Flops, count_flops
from compresskit.model.swap import mount
from compresskit.model.targets import count_parameters, find_targets, skeleton
from compresskit.planning.allocation import Choice, allocate
from compresskit.planning.blocks import Block, Pick, Task, blocks_of, least_error
from compresskit.planning.recipe import Recipe, apply_rules

#: The achieved ratio lies within this share above the asked one, unless the plan says otherwise.
SLACK = 0.01

#: Bands around the common ratio, each NEAR wider than the one before, in which ratios count as equally near.
_BANDS = 12

#: What a candidate costs beside the one before it, in steps of distance, where candidates come best first.
_LATER = 0.003

#: The band that ``objective: latency`` starts with: ratios of single matrices may differ by a factor of 1.6 either way.
_ROOM = 3

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
    source: Source | None = None,
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
    tasks = _tasks(model, recipe)
    if not tasks:
        raise InputError(f"recipe {recipe.name} factorises nothing in this model")
    before = count_parameters(model)
    notes: list[str] = []
    if recipe.explicit:
        picks = [Pick(task, _resolve(task, recipe)) for task in tasks]
    elif recipe.ratio is None:
        raise InputError(f"recipe {recipe.name} gives neither shapes nor a ratio: add --ratio")
    else:
        tasks, stay_dense = _offered(tasks, recipe.allow_slow)
        if not tasks:
            raise UnreachableError(f"recipe {recipe.name}: no matrix of this model has a shape that saves parameters")
        notes += [f"{name} stays dense: no shape of it saves parameters" for name in stay_dense]
        blocks = blocks_of(tasks)
        rest = before - sum(task.group.parameters for block in blocks for task, *_ in block[0])
        budget = math.floor(before / recipe.ratio) - rest
        _check_reach(blocks, recipe, before, rest)
        if recipe.allocation == "uniform":
            specs = _uniform(tasks, budget, rest, recipe.allow_slow, fast=recipe.objective == "latency")
            picks = [Pick(task, spec) for task, spec in zip(tasks, specs, strict=True)]
        else:
            if source is None:
                raise InputError("allocation error needs the weights, not only the shapes")
            slack, slow = _slack(budget, rest), recipe.allow_slow
            fast = recipe.objective == "latency"
            picks = least_error(
                blocks, budget, slack, source, statistics, allow_slow=slow, fast=fast, progress=progress
            )
            order = {target.name: index for index, target in enumerate(find_targets(model))}
            picks.sort(key=lambda pick: order[pick.task.group.targets[0].name])

    assignments = [
        Assignment(task.group, task.decomposer.name, spec, task.decomposer.cost(task.group, spec).parameters)
        for task, spec in picks
    ]
    student = skeleton(model, "cpu")
    for task, spec in picks:
        mount(student, task.decomposer, task.group, spec)
    plan = Plan(
        recipe=recipe,
        assignments=tuple(assignments),
        ratio_asked=recipe.ratio,
        parameters_before=before,
        parameters_after=count_parameters(student),
        flops_before=count_flops(model),
        flops_after=count_flops(student),
        dense=tuple(target.name for target in find_targets(student)),
        calibration=statistics.record() if statistics is not None else None,
    )
    if recipe.ratio is not None and plan.ratio > recipe.ratio * (1 + SLACK):
        notes.append(f"{plan.ratio:.2f}x is the smallest ratio of at least {recipe.ratio:g}x that was found")
    if statistics is not None and recipe.calibration_sha256 not in (None, statistics.text["sha256"]):
        notes.append("the recipe was made with another calibration text: its factors will differ")
    notes += statistics.notes if statistics is not None else ()
    plan = replace(plan, notes=tuple(notes))
    if predict_errors:
        predicted = _predicted(picks, source, statistics, progress)
        plan = plan.with_errors(predicted) if statistics is None else plan.with_errors({}, predicted)
    return plan


def _tasks(model: PreTrainedModel, recipe: Recipe) -> list[Task]:
    targets = find_targets(model)
    order = {target.name: index for index, target in enumerate(targets)}
    tasks = []
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
            tasks.append(Task(group, decomposer, rule))
    return sorted(tasks, key=lambda task: order[task.group.targets[0].name])


def _offered(tasks: list[Task], allow_slow: bool) -> tuple[list[Task], list[str]]:
    """The tasks that have candidates at all, and the groups that have none from any method (prime or tiny shapes)."""
    some = [task for task in tasks if task.decomposer.candidates(task.group, 0, allow_slow=allow_slow)]
    covered = frozenset[str]().union(*(task.group.target_names for task in some))
    return some, list(dict.fromkeys(t.group.name for t in tasks if not t.group.target_names & covered))


def _resolve(task: Task, recipe: Recipe) -> Spec:
    options = task.rule.options
    assert options is not None
    try:
        return task.decomposer.resolve(task.group, options)
    except InputError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from None


def _check_reach(blocks: Sequence[Block], recipe: Recipe, before: int, rest: int) -> None:
    def least_of(task: Task) -> int:
        smallest = task.decomposer.candidates(task.group, 0, allow_slow=recipe.allow_slow)
        costs = [task.decomposer.cost(task.group, spec).parameters for spec in smallest]
        return min([*costs, task.group.parameters])

    least = rest + sum(
        min(sum(min(map(least_of, part)) for part in partition) for partition in block) for block in blocks
    )
    assert recipe.ratio is not None
    if before / recipe.ratio < least:
        everyone = {
            task.decomposer.name for block in blocks for partition in block for part in partition for task in part
        }
        methods = " and ".join(sorted(everyone))
        raise UnreachableError(
            f"ratio {recipe.ratio:g} is out of reach: with {methods} this model gets at most "
            f"{math.floor(100 * before / least) / 100:g}x smaller ({rest:,} of its {before:,} parameters stay dense)"
        )


def _uniform(tasks: Sequence[Task], budget: int, rest: int, allow_slow: bool, *, fast: bool) -> list[Spec]:
    """One spec per (role, shape), all ratios as near to a common one as possible; among near ones fewer terms and what
    a method prefers, or with ``fast`` the least estimated time.
    """
    classes: dict[tuple[Any, ...], list[Task]] = defaultdict(list)
    for task in tasks:
        group = task.group
        classes[task.decomposer.name, group.role, group.kind, group.shape, len(group.targets)].append(task)
    members = list(classes.values())
    sizes = [sum(task.group.parameters for task in tasks_) for tasks_ in members]
    common = sum(sizes) / budget  # the ratio that all would have if shapes were continuous

    candidates: list[list[Spec]] = []
    for tasks_ in members:
        task, wanted = tasks_[0], tasks_[0].group.parameters / common
        offered = [
            spec
            for factor in (1.0, 0.5, 2.0)
            for spec in task.decomposer.candidates(task.group, round(factor * wanted), allow_slow=allow_slow)
        ]
        offered += [task.decomposer.faster(task.group, spec) for spec in offered] if fast else []
        candidates.append(list(dict.fromkeys(offered)))

    # The narrowest band of ratios around the common one in which the budget is met; speed gets room to choose from.
    slack = _slack(budget, rest)
    for band in range(_ROOM if fast else 1, _BANDS + 1):
        choices, indices = [], []
        for tasks_, specs in zip(members, candidates, strict=True):
            task = tasks_[0]
            counts = [task.decomposer.cost(task.group, spec).parameters for spec in specs]
            distances = [abs(math.log(count * common / task.group.parameters)) for count in counts]
            inside = [i for i, distance in enumerate(distances) if distance <= band * NEAR or band == _BANDS]
            indices.append(inside)
            losses = [
                len(tasks_) * task.decomposer.time(task.group, specs[i])
                if fast
                else _terms(specs[i]) - 1 + distances[i] + (_LATER * i if task.decomposer.best_first else 0)
                for i in inside
            ]
            choices.append([Choice(len(tasks_) * counts[i], loss) for i, loss in zip(inside, losses, strict=True)])
        picks = allocate(choices, budget, slack) if all(choices) else None
        if picks is not None:
            total = sum(options[pick].parameters for options, pick in zip(choices, picks, strict=True))
            if total * (1 + slack) >= budget or band == _BANDS:
                break
    if picks is None:
        raise UnreachableError("no combination of candidates fits the budget")
    chosen: dict[str, Spec] = {}
    for tasks_, specs, inside, pick in zip(members, candidates, indices, picks, strict=True):
        chosen |= {task.group.name: specs[inside[pick]] for task in tasks_}
    return [chosen[task.group.name] for task in tasks]


def _terms(spec: Spec) -> int:
    """Summed products per matrix; 1 for methods that do not sum."""
    return int(getattr(spec, "terms", 1))


def _slack(budget: int, rest: int) -> float:
    """SLACK of the whole model's parameters, as a share of the factorised part's budget."""
    lowest = (budget + rest) / (1 + SLACK) - rest
    return budget / lowest - 1 if lowest > 0 else math.inf


def _predicted(
    picks: Sequence[Pick], source: Source | None, statistics: Statistics | None, progress: Progress
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
