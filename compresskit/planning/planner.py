"""From a recipe to a plan: which spec every group gets, and the totals this leads to.

Needs only the shapes of the model (the meta device will do), and the weights for the ``error`` allocation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PreTrainedModel

from compresskit.calibration.statistics import Calibration
from compresskit.decomposers import Group, Spec, Statistics, WeightSource, exact_products
from compresskit.errors import InputError, UnreachableError
from compresskit.model.measure import Flops, count_flops
from compresskit.model.swap import mount
from compresskit.model.targets import count_parameters, find_targets, skeleton
from compresskit.planning.blocks import Pick, Proposal
from compresskit.planning.budgets import SLACK
from compresskit.planning.choosing import Chooser, proposals_of
from compresskit.planning.recipe import Recipe
from compresskit.planning.size import SizeLimit
from compresskit.progress import Progress, silent


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
class Untrimmed:
    """A model before its vocabulary was trimmed: what a ratio counts against.

    Attributes:
        text: name of the text that the tokens to keep were chosen by.
        rows: of its word embedding.
        parameters: of the whole model, tied and shared tensors once.
        flops: at batch 1, length 128.
        rows_left: of the trimmed model, which is the one to compress.
        parameters_left: likewise.
    """

    text: str
    rows: int
    parameters: int
    flops: Flops
    rows_left: int
    parameters_left: int

    @property
    def smaller(self) -> float:
        """By which factor trimming alone makes the model smaller."""
        return self.parameters / self.parameters_left

    @property
    def removed(self) -> int:
        """Parameters that trimming took away."""
        return self.parameters - self.parameters_left


@dataclass(frozen=True)
class Plan:
    """A spec for each group, with the totals.

    Attributes:
        recipe: what was asked.
        assignments: every group that is factorised, in the model's order.
        ratio_asked: None where explicit shapes were given.
        parameters_before: of the dense model as loaded, tied and shared tensors once; with ``untrimmed`` of that model.
        parameters_after: of the compressed one.
        flops_before: at batch 1, length 128.
        flops_after: likewise.
        notes: what the user should know, e.g. a ratio that is not near the asked one.
        dense: names of the matrices that stay as they are.
        calibration: text and tokens that the factors were fitted to; None without.
        untrimmed: the model before its vocabulary was trimmed; None where it was not.
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
    untrimmed: Untrimmed | None = None

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


@exact_products
def make_plan(
    model: PreTrainedModel,
    recipe: Recipe,
    source: WeightSource | None = None,
    *,
    size: SizeLimit | None = None,
    statistics: Calibration | None = None,
    untrimmed: Untrimmed | None = None,
    predict_errors: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Choose a spec for every group that the recipe's rules take.

    Args:
        model: the dense model; only shapes are used.
        recipe: with a ratio, or with explicit shapes.
        source: weights. Required by ``allocation: error`` and by ``predict_errors``.
        size: of the weight file, instead of the recipe's ratio.
        statistics: of the targets' inputs, from calibration: errors are then those of outputs.
        untrimmed: the model before its vocabulary was trimmed: the ratio counts against it.
        predict_errors: fill in every assignment's error, or with statistics its output error; on the meta device, where
            weights hold no numbers, errors stay unknown.
        progress: called with (what, done, total) during long work.

    Raises:
        InputError: a rule that matches nothing, a ratio or size out of reach, a shape that does not fit or saves
            nothing.
    """
    without_weights = any(parameter.is_meta for parameter in model.parameters())
    if without_weights:  # a move to the meta device has cut its ties
        model = skeleton(model)
        model.tie_weights()
    before = count_parameters(model) if untrimmed is None else untrimmed.parameters
    proposals = proposals_of(model, recipe)
    if not proposals:
        raise InputError(f"recipe {recipe.name} factorises nothing in this model")
    notes: list[str] = []
    asked: float | None = None
    if recipe.explicit:
        picks = [Pick(proposal, _resolve(proposal, recipe)) for proposal in proposals]
        student = _student(model, picks)
    else:
        chooser = Chooser(model, proposals, recipe, source, statistics, progress)
        notes = chooser.notes
        if size is not None:
            picks, student, asked = _within_size(model, chooser, size, before)
        else:
            asked = recipe.ratio
            picks = _within_ratio(model, chooser, recipe, before)
            student = _student(model, picks)
    plan = Plan(
        recipe=recipe,
        assignments=tuple(
            Assignment(group, decomposer.name, spec, decomposer.cost(group, spec).parameters)
            for (group, decomposer, _), spec in picks
        ),
        ratio_asked=asked,
        parameters_before=before,
        parameters_after=count_parameters(student),
        flops_before=count_flops(model) if untrimmed is None else untrimmed.flops,
        flops_after=count_flops(student),
        dense=tuple(target.name for target in find_targets(student)),
        calibration=statistics.record() if statistics is not None else None,
        untrimmed=untrimmed,
    )
    plan = replace(plan, notes=(*notes, *_notes(plan, statistics)))
    if predict_errors and not without_weights:
        predicted = _predicted(picks, source, statistics, progress)
        plan = plan.with_errors(predicted) if statistics is None else plan.with_errors({}, predicted)
    return plan


def check_reachable(
    model: PreTrainedModel,
    recipe: Recipe,
    source: WeightSource,
    *,
    size: SizeLimit | None = None,
    untrimmed: Untrimmed | None = None,
) -> None:
    """Refuse what no plan for the model can have, without making one: shapes are enough, no weight is read.

    Args:
        model, recipe, source, size, untrimmed: as for :func:`make_plan`; the recipe without explicit shapes.

    Raises:
        InputError: a rule that matches nothing, a ratio or size out of reach.
    """
    chooser = Chooser(model, proposals_of(model, recipe), recipe, source, None, silent)
    before = count_parameters(model) if untrimmed is None else untrimmed.parameters
    if size is None:
        _most(model, chooser, recipe, before)
        return
    _check_below_dense(model, size)
    smallest = _student(model, chooser.smallest())
    if size.file_size(smallest) > size.most:
        raise _too_small(size, smallest, chooser, before)


def _student(model: PreTrainedModel, picks: Sequence[Pick]) -> PreTrainedModel:
    """The model with these groups factorised, without memory for weights."""
    student = skeleton(model, "cpu")
    for (group, decomposer, _), spec in picks:
        mount(student, decomposer, group, spec)
    return student


def _within_ratio(model: PreTrainedModel, chooser: Chooser, recipe: Recipe, before: int) -> list[Pick]:
    """What comes nearest to the recipe's ratio against ``before`` parameters and is at least that much smaller."""
    return chooser.picks(_most(model, chooser, recipe, before))


def _most(model: PreTrainedModel, chooser: Chooser, recipe: Recipe, before: int) -> int:
    """How many parameters the recipe's ratio allows. Raises InputError: it is out of reach."""
    if recipe.ratio is None:
        raise InputError(f"recipe {recipe.name} gives neither shapes nor a ratio: add --ratio")
    most = math.floor(Fraction(before) / Fraction(str(recipe.ratio)))  # the ratio as it is written
    dense = count_parameters(model)
    if dense < before and dense <= most:
        raise InputError(
            f"ratio {recipe.ratio:g}: trimming alone makes the model {before / dense:.2f}x smaller; ask for more, or "
            "use `compresskit trim`"
        )
    if most < chooser.least:
        raise UnreachableError(
            f"ratio {recipe.ratio:g} is out of reach: with {chooser.methods} this model gets at most "
            f"{math.floor(Fraction(100 * before, chooser.least)) / 100:g}x smaller "
            f"({chooser.dense:,} of its {before:,} parameters stay dense)"
        )
    return most


def _within_size(
    model: PreTrainedModel, chooser: Chooser, size: SizeLimit, before: int
) -> tuple[list[Pick], PreTrainedModel, float]:
    """What comes nearest to a size of the weight file and is at most that large, the student, and the ratio against
    ``before`` parameters that it amounts to.
    """
    _check_below_dense(model, size)
    width = max(parameter.itemsize for parameter in model.parameters())
    student, most = model, count_parameters(model)
    while (excess := size.file_size(student) - size.most) > 0:
        if most == chooser.least:
            raise _too_small(size, student, chooser, before)
        most = max(chooser.least, count_parameters(student) - math.ceil(excess / width))
        picks = chooser.picks(most)
        student = _student(model, picks)
    return picks, student, before / most


def _check_below_dense(model: PreTrainedModel, size: SizeLimit) -> None:
    largest = size.file_size(model)
    if largest <= size.most:
        raise InputError(f"size {size}: not below the dense model's {largest / 1e6:.2f} MB")


def _too_small(size: SizeLimit, smallest: PreTrainedModel, chooser: Chooser, before: int) -> UnreachableError:
    """The error for a size below that of the smallest student."""
    needed = size.file_size(smallest)
    step = 10 ** max(0, len(str(needed)) - 3)  # three digits, rounded up, so that the size named can be had
    least = math.ceil(needed / step) * step / 1e6
    return UnreachableError(
        f"size {size}: too small: with {chooser.methods} this model's weight file has at least {least:g} MB "
        f"({chooser.dense:,} of its {before:,} parameters stay dense)"
    )


def _notes(plan: Plan, statistics: Calibration | None) -> Iterator[str]:
    asked = plan.ratio_asked
    if asked is not None and plan.ratio > asked * (1 + SLACK):
        yield f"{plan.ratio:.2f}x is the smallest ratio of at least {asked:g}x that was found"
    if statistics is not None:
        if plan.recipe.calibration_sha256 not in (None, statistics.text["sha256"]):
            yield "the recipe was made with another calibration text: its factors will differ"
        yield from statistics.notes


def _resolve(proposal: Proposal, recipe: Recipe) -> Spec:
    try:
        options = proposal.rule.options
        assert options is not None  # every rule of an explicit recipe has some
        return proposal.decomposer.resolve(proposal.group, options)
    except InputError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from None


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
