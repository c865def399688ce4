"""Which specs a recipe with a ratio comes to, for a model with given shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from transformers import PreTrainedModel

from compresskit.decomposers import AUTO, DENSE, Statistics, WeightSource, registry
from compresskit.errors import InputError, UnreachableError
from compresskit.model.targets import count_parameters, find_targets
from compresskit.planning.blocks import Block, Found, Pick, Proposal, blocks_of, find_options, least_error
from compresskit.planning.budgets import Step, ladder, windows
from compresskit.planning.recipe import Recipe, apply_rules
from compresskit.planning.uniform import uniform
from compresskit.progress import Progress


def proposals_of(model: PreTrainedModel, recipe: Recipe) -> list[Proposal]:
    """Every group that a rule may factorise, with the methods that its rule allows, in the model's order."""
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


class Chooser:
    """Chooses among the proposals for a model; what was worked out for one total serves others near it.

    Args:
        model: the dense model; only shapes are used.
        proposals: what may be factorised, from :func:`proposals_of`.
        recipe: without explicit shapes.
        source: the weights, which allocation ``error`` needs.
        statistics: of the matrices' inputs, or None.
        progress: called with (what, done, total) during long work.

    Attributes:
        least: the smallest total of parameters, of the whole model, that can be had.
        dense: how many parameters stay as they are.
        notes: what the user should know.

    Raises:
        InputError: allocation ``error`` without weights.
        UnreachableError: no matrix has a shape that saves parameters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        proposals: list[Proposal],
        recipe: Recipe,
        source: WeightSource | None,
        statistics: Statistics | None,
        progress: Progress,
    ) -> None:
        if recipe.by_error and source is None:
            raise InputError("allocation error needs the weights, not only the shapes")
        self._proposals, stay_dense = _offered(proposals, recipe.allow_slow)
        if not self._proposals:
            raise UnreachableError(f"recipe {recipe.name}: no matrix of this model has a shape that saves parameters")
        self.notes = [f"{name} stays dense: no shape of it saves parameters" for name in stay_dense]
        self._recipe, self._source, self._statistics, self._progress = recipe, source, statistics, progress
        self._blocks = blocks_of(self._proposals)
        before = count_parameters(model)
        self.dense = before - sum(proposal.group.parameters for block in self._blocks for proposal, *_ in block[0])
        factors = sum(proposal.parameters(spec) for proposal, spec in self.smallest())
        self.least = self.dense + factors
        self._steps = ladder(before, self.dense, factors)
        self._found: dict[Step, Found] = {}
        self._order = {target.name: index for index, target in enumerate(find_targets(model))}

    @property
    def methods(self) -> str:
        """Names of all methods that something may be factorised by, as part of a sentence."""
        return " and ".join(sorted({proposal.decomposer.name for proposal in self._proposals}))

    def smallest(self) -> list[Pick]:
        """The spec with the fewest parameters for every group. Shapes are enough, no weight is read."""
        return [pick for block in self._blocks for pick in self._smallest(block)]

    def picks(self, most: int) -> list[Pick]:
        """A spec for every group, in the model's order.

        The total lies at most :data:`~.budgets.SLACK` below ``most`` where one was found there; else it is the largest
        that was found. For a smaller ``most`` it is never larger.

        Args:
            most: parameters that the whole model may have; at least :attr:`least`.

        Raises:
            UnreachableError: ``most`` is smaller than that.
        """
        for step, window in windows(self._steps, most - self.dense, self.dense):
            slow, fast = self._recipe.allow_slow, self._recipe.objective == "latency"
            if self._recipe.by_error:
                found = self._options(step, allow_slow=slow, fast=fast)
                picks = least_error(self._blocks, found, step, window, fast=fast)
            else:
                picks = uniform(self._proposals, step, window, allow_slow=slow, fast=fast)
            if picks is not None:
                return sorted(picks, key=lambda pick: self._order[pick.proposal.group.targets[0].name])
        raise UnreachableError(f"no plan has at most {most:,} parameters")

    def _smallest(self, block: Block) -> list[Pick]:
        def size(pick: Pick) -> int:
            return pick.proposal.parameters(pick.spec)

        slow = self._recipe.allow_slow
        partitions = [
            [min((Pick(each, each.smallest(allow_slow=slow)) for each in part), key=size) for part in partition]
            for partition in block
        ]
        return min(partitions, key=lambda picks: sum(map(size, picks)))

    def _options(self, step: Step, *, allow_slow: bool, fast: bool) -> Found:
        if step not in self._found:
            if self._source is None:
                raise InputError("allocation error needs the weights, not only the shapes")
            self._found[step] = find_options(
                self._blocks,
                step.budget,
                self._source,
                self._statistics,
                allow_slow=allow_slow,
                fast=fast,
                progress=self._progress,
            )
        return self._found[step]


def _offered(proposals: list[Proposal], allow_slow: bool) -> tuple[list[Proposal], list[str]]:
    """The proposals that have candidates at all, and the groups for which no method has any (prime or tiny shapes)."""
    some = [
        proposal for proposal in proposals if proposal.decomposer.candidates(proposal.group, 0, allow_slow=allow_slow)
    ]
    covered = frozenset[str]().union(*(proposal.group.target_names for proposal in some))
    return some, list(dict.fromkeys(t.group.name for t in proposals if not t.group.target_names & covered))
