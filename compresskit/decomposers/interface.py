"""What a decomposer owes. One file per method answers it; planning, saving, reloading and reporting then work for the
method without a change elsewhere. Nothing here knows transformers.

Letters in shapes: m = out_features (or vocabulary size v of an embedding), n = in_features (or embedding size d),
W is (m, n) as ``nn.Linear.weight`` and ``nn.Embedding.weight`` store it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from compresskit.decomposers.groups import Group, Target
from compresskit.decomposers.layers import FactorisedLayer
from compresskit.decomposers.least_squares import output_error, weight_error
from compresskit.decomposers.sources import Statistics, WeightSource
from compresskit.validation import validate

#: ``method: dense`` in a recipe keeps matrices as they are; no decomposer may take the name.
DENSE = "dense"

#: ``method: auto`` lets the planner choose the method too; no decomposer may take the name.
AUTO = "auto"

#: A candidate may cost at most this many times the dense FLOPs, unless slow ones are allowed.
MAX_FLOPS_RATIO = 1.1

#: Parameter counts whose ratio is within this (as a logarithm) count as equally near.
NEAR = 0.15

#: Budgets that candidates are made for, as factors of the asked one; and where those are all too slow, smaller ones.
STEPS = (0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1)
SHRINKING = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

#: Tokens that costs are compared at: one sequence of 128, as in the definition of FLOPs.
COST_TOKENS = 128


class Spec(BaseModel):
    """How a group is factorised: plain, validated data that goes into ``config.json``. Subclassed once per method."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    method: str

    @property
    def complexity(self) -> int:
        """What a uniform plan keeps small among specs that are equally near in size, e.g. how many products are summed
        beyond the first one. Default: 0.
        """
        return 0

    def describe(self) -> str:
        """The spec in a few characters, for tables, e.g. ``384x48 (x) 2x16``."""
        raise NotImplementedError


class RuleOptions(BaseModel):
    """What a recipe rule may say about a method's shapes; every field of the method's spec among it, so that a plan
    can be written down as a recipe. Subclassed once per method; unknown keys are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(NamedTuple):
    """Parameters of the factors (biases left out), and FLOPs (2 x multiply-adds) of the cheapest path through them."""

    parameters: int
    flops: int


SpecT = TypeVar("SpecT", bound=Spec)
OptionsT = TypeVar("OptionsT", bound=RuleOptions)


class Decomposer(ABC, Generic[SpecT, OptionsT]):
    """A way to factorise: ``class Mine(Decomposer[MySpec, MyOptions])``, in one file, registered under ``name``.

    Code that holds decomposers of several methods calls them :data:`AnyDecomposer`.

    Attributes:
        name: what ``--method`` takes.
        summary: one line for ``compresskit methods``.
        reference: where the method comes from.
        spec_type: its :class:`Spec`.
        options_type: its :class:`RuleOptions`, the keys a recipe rule may give.
        best_first: whether candidates of one size differ in worth and come best first: uniform plans then take a later
            one only for a better size. Default: no.
        gains_by_calibration: whether students that are not trained come nearer to the original with calibration, so
            that the command line recommends it. Default: yes.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    spec_type: type[SpecT]
    options_type: type[OptionsT]
    best_first: ClassVar[bool] = False
    gains_by_calibration: ClassVar[bool] = True

    # -- which matrices, and which shapes ---------------------------------------------------------------------------

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        """Which targets belong together. Default: each on its own."""
        return [Group(target.name, (target,)) for target in targets]

    def has_own_form(self, group: Group) -> bool:
        """Whether the group gets a form that no other method has; where not, ``auto`` leaves it to the others."""
        return True

    @abstractmethod
    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[SpecT]:
        """About a dozen specs whose parameters lie around ``parameters``, preferred ones first.

        ``parameters`` at or below the smallest possible gives the smallest ones. Never a spec that saves nothing, nor
        one above :data:`MAX_FLOPS_RATIO` x dense FLOPs unless ``allow_slow``. May be empty.
        """

    def slow(self, group: Group, spec: SpecT) -> bool:
        """Whether a spec takes more than :data:`MAX_FLOPS_RATIO` x the dense FLOPs."""
        return self.cost(group, spec).flops > MAX_FLOPS_RATIO * 2 * COST_TOKENS * group.parameters

    def offered(self, group: Group, specs: Iterable[SpecT], parameters: int, *, allow_slow: bool) -> list[SpecT]:
        """At most a dozen specs: those that save parameters and are not slow, nearest to ``parameters`` first."""
        sizes = {spec: self.cost(group, spec).parameters for spec in specs}
        usable = [spec for spec, size in sizes.items() if size < group.parameters]
        if not allow_slow:
            usable = [spec for spec in usable if not self.slow(group, spec)]
        return sorted(usable, key=lambda spec: abs(sizes[spec] - parameters))[:12]

    @abstractmethod
    def resolve(self, group: Group, options: OptionsT) -> SpecT:
        """The spec that explicit recipe options mean for this group's shape.

        Raises:
            InputError: the options do not fit the shape, or name too few factors.
        """

    @abstractmethod
    def check(self, group: Group, spec: SpecT) -> None:
        """Raises InputError if ``spec`` does not fit the group's shape or saves no parameters."""

    def parse_spec(self, data: dict[str, Any]) -> SpecT:
        """A spec from plain data (``config.json``). Raises InputError on unknown keys or wrong types."""
        spec: SpecT = validate(self.spec_type, data, f"{self.name} spec")
        return spec

    # -- what they cost ---------------------------------------------------------------------------------------------

    @abstractmethod
    def cost(self, group: Group, spec: SpecT, tokens: int = COST_TOKENS) -> Cost:
        """Parameters, and FLOPs for ``tokens`` tokens through every target of the group."""

    def time(self, group: Group, spec: SpecT, tokens: int = COST_TOKENS) -> float:
        """Estimated time of a forward pass, in units of a large matrix product's FLOP. Default: the FLOPs."""
        return float(self.cost(group, spec, tokens).flops)

    def faster(self, group: Group, spec: SpecT) -> SpecT:
        """The fastest spec with as many parameters as ``spec``. Default: ``spec`` itself."""
        return spec

    # -- what they lose ---------------------------------------------------------------------------------------------

    def errors(self, group: Group, specs: Sequence[SpecT], source: WeightSource) -> list[float]:
        """The relative Frobenius error that each spec will have, ||W - W'||_F / ||W||_F over the group's matrices.

        Exact for one spec (of weights with 32 bits to about 5e-4); of several a close upper bound will do where exact
        figures would take too long. Default: by factorising; from spectra it is found in a fraction of the time.
        """
        return [weight_error(self._made(group, spec, source, None)) for spec in specs]

    def output_errors(
        self, group: Group, specs: Sequence[SpecT], source: WeightSource, statistics: Statistics
    ) -> list[float]:
        """The relative error that each spec's outputs will have on the text of the calibration, ||(W - W') X||_F /
        ||W X||_F, root mean square over the group's matrices (of an embedding: of its rows, weighted by how often they
        occur). Default: by factorising.
        """
        return [output_error(self._made(group, spec, source, statistics), statistics) for spec in specs]

    def _made(
        self, group: Group, spec: SpecT, source: WeightSource, statistics: Statistics | None
    ) -> list[tuple[Target, Tensor, Tensor]]:
        """(target, W, W') of every matrix of the group."""
        layers = self.build(group, spec, source, statistics)
        return [(target, source.read(target), layers[target.name].dense_weight()) for target in group.targets]

    # -- the factors and the layers ---------------------------------------------------------------------------------

    @abstractmethod
    def factorise(
        self, group: Group, spec: SpecT, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """The factors, named as the state dict will name them (``<target name>.<factor>``), in the weight's dtype.

        Whole numbers, such as row numbers, are buffers of the layer. A decomposer that cannot use ``statistics``
        ignores them.
        """

    @abstractmethod
    def layers(self, group: Group, spec: SpecT) -> dict[str, nn.Module]:
        """The modules to put in place, by module path; parameters uninitialised, so the meta device works.

        A path that is no target is the group's own name: its :class:`~.layers.SharedFactors`, mounted on the base
        model. Every other one is a :class:`~.layers.FactorisedLayer`.
        """

    @torch.no_grad()
    def build(
        self, group: Group, spec: SpecT, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, FactorisedLayer]:
        """The layer of every target, by its name, with its factors. Biases stay on the meta device, and factors are
        frozen.
        """
        with torch.device("meta"):
            layers = self.layers(group, spec)
        for name, factor in self.factorise(group, spec, source, statistics).items():
            path, _, attribute = name.rpartition(".")
            frozen = nn.Parameter(factor, requires_grad=False) if factor.is_floating_point() else factor
            setattr(layers[path], attribute, frozen)
        return {path: layer for path, layer in layers.items() if isinstance(layer, FactorisedLayer)}


#: A decomposer of some method, where it does not matter of which.
AnyDecomposer: TypeAlias = Decomposer[Any, Any]
