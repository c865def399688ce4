"""What a decomposer owes, and the words it shares with the rest of compresskit.

One file per method answers the interface :class:`Decomposer`; planning, saving, reloading and reporting then work
for it without a change elsewhere. Nothing here knows transformers.

Letters in shapes: m = out_features (or vocabulary size v of an embedding), n = in_features (or embedding size d),
W is (m, n) as ``nn.Linear.weight`` and ``nn.Embedding.weight`` store it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from compresskit.decomposers import weighted
from compresskit.validation import validate

Kind = Literal["linear", "embedding"]
Role = Literal["embedding", "attention", "ffn", "head"]
ROLES: tuple[Role, ...] = ("embedding", "attention", "ffn", "head")

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

#: Rows of a large matrix that are worked on at a time.
BLOCK_ROWS = 8192

#: Tokens that costs are compared at: one sequence of 128, as in the definition of FLOPs.
COST_TOKENS = 128


@dataclass(frozen=True)
class Target:
    """One weight matrix that may be factorised.

    Attributes:
        name: module path in the model, as ``model.get_submodule`` takes it.
        kind: ``linear`` or ``embedding``.
        role: what the matrix does; None for a matrix that stays dense unless a recipe's pattern names it.
        shape: (m, n) of the weight.
        bias: whether the linear has a bias (it is kept, and counted with the dense rest).
        padding_idx: of an embedding.
        reason: why ``role`` is None.
    """

    name: str
    kind: Kind
    role: Role | None
    shape: tuple[int, int]
    bias: bool = False
    padding_idx: int | None = None
    reason: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Group:
    """Targets that are factorised together, all of one role, kind and shape.

    Attributes:
        name: the target's own where there is one; of several a name without dots, under which the base model holds
            what they share.
        targets: in the model's order.
    """

    name: str
    targets: tuple[Target, ...]

    @property
    def role(self) -> Role | None:
        """Role of every target."""
        return self.targets[0].role

    @property
    def kind(self) -> Kind:
        """Kind of every target."""
        return self.targets[0].kind

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of every target's weight."""
        return self.targets[0].shape

    @property
    def parameters(self) -> int:
        """Number of weights of all targets, without biases."""
        return sum(target.parameters for target in self.targets)

    @property
    def target_names(self) -> frozenset[str]:
        """Names of all targets."""
        return frozenset(target.name for target in self.targets)

    @property
    def target(self) -> Target:
        """The only target of a group of one."""
        (target,) = self.targets
        return target


class Spec(BaseModel):
    """How a group is factorised: plain, validated data that goes into ``config.json``. Subclassed once per method."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    method: str

    def describe(self) -> str:
        """The spec in a few characters, for tables, e.g. ``384x48 (x) 2x16``."""
        raise NotImplementedError


class Options(BaseModel):
    """What a recipe rule may say about a method's shapes; every field of the method's spec among it, so that a plan
    can be written down as a recipe. Subclassed once per method; unknown keys are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(NamedTuple):
    """Parameters of the factors (biases left out), and FLOPs (2 x multiply-adds) of the cheapest path through them."""

    parameters: int
    flops: int


class Source(Protocol):
    """Hands out weights, from a live model or from files."""

    def read(self, target: Target) -> Tensor:
        """The whole weight, (m, n), in its stored dtype."""
        ...

    def rows(self, target: Target, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the weight, (stop - start, n): for matrices too large to hold twice."""
        ...


class Statistics(Protocol):
    """What calibration knows about the inputs of the targets. Always optional."""

    def second_moment(self, target: Target) -> Tensor | None:
        """X^T X of a linear's input, (n, n); None if not known."""
        ...

    def token_counts(self, target: Target) -> Tensor | None:
        """How often each row of an embedding was looked up, (m,); None if not known."""
        ...

    def sensitivity(self, target: Target) -> float | None:
        """How much the model's predictions lose, to second order, per squared relative error of the target's output, as
        a multiple of the mean over targets; None if not known.
        """
        ...


def moment_of(target: Target, statistics: Statistics | None) -> Tensor | None:
    """The second moment of a linear's input, where it is known."""
    return statistics.second_moment(target) if statistics is not None and target.kind == "linear" else None


def counts_of(target: Target, statistics: Statistics | None) -> Tensor | None:
    """How often each row of an embedding was looked up, where it is known."""
    return statistics.token_counts(target) if statistics is not None and target.kind == "embedding" else None


def output_error(matrices: Iterable[tuple[Target, Tensor, Tensor]], statistics: Statistics) -> float:
    """||(W - W') X||_F / ||W X||_F, root mean square over (target, W, W'); see :meth:`Decomposer.output_errors`."""
    squares = []
    for target, weight, made in matrices:
        moment, counts = moment_of(target, statistics), counts_of(target, statistics)
        residual, norm = weighted.energies(weight, made, moment, counts)
        squares.append(residual / norm if norm > 0 else 0.0)
    return math.sqrt(sum(squares) / len(squares))


def row_blocks(source: Source, target: Target) -> Iterator[Tensor]:
    """The weight of ``target`` in blocks of at most :data:`BLOCK_ROWS` rows."""
    m = target.shape[0]
    if m <= BLOCK_ROWS:
        yield source.read(target)
        return
    for start in range(0, m, BLOCK_ROWS):
        yield source.rows(target, start, min(start + BLOCK_ROWS, m))


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y + bias`` in y's dtype, as ``F.linear`` does it under autocast; into y itself where no gradient needs it."""
    if bias is None:
        return y
    bias = bias.to(y.dtype)
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


class FactorisedLinear(nn.Module, ABC):
    """A linear layer computed from factors: y = x W'^T + bias, W' never stored.

    Args:
        in_features: n.
        out_features: m.
        bias: whether a bias parameter (m,) is held.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        ...

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """W', (m, n)."""

    @property
    def weight(self) -> Tensor:
        """W', multiplied out anew at every access: for code that reads a weight; it cannot be set."""
        return self.dense_weight()

    def to_dense(self) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the weight multiplied out, same dtype, device and bias."""
        weight = self.dense_weight().detach()
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=False)
        dense.weight = nn.Parameter(weight.contiguous())
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SharedFactors(nn.Module):
    """Factors that several layers compute with. Mounted on the base model; the layers refer to it through ``__dict__``,
    unregistered, so that the factors are stored, counted and trained once.
    """


class FactorisedEmbedding(nn.Module, ABC):
    """A word embedding computed from factors; also serves a tied output head through :meth:`project`.

    Args:
        num_embeddings: v.
        embedding_dim: d.
        padding_idx: row that gets no gradient through the look-up, as in ``nn.Embedding``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        ...

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        """``hidden`` times the transposed table, without forming the table."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The table, (v, d)."""

    @property
    def weight(self) -> Tensor:
        """The table, multiplied out anew at every access: for code that reads a weight; it cannot be set."""
        return self.dense_weight()

    def to_dense(self) -> nn.Embedding:
        """An ordinary ``nn.Embedding`` with the table multiplied out."""
        weight = self.dense_weight().detach().contiguous()
        with torch.device("meta"):
            dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        dense.weight = nn.Parameter(weight)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


class TiedHead(nn.Module):
    """The output head of a masked-LM whose weight is tied to a factorised embedding: same factors, own bias.

    The embedding is referenced through ``__dict__``, not registered, so its factors are stored and counted once.
    """

    def __init__(self, embedding: FactorisedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        self.bias = bias

    @property
    def embedding(self) -> FactorisedEmbedding:
        """The embedding whose factors this head computes with."""
        found: FactorisedEmbedding = self.__dict__["embedding"]
        return found

    @property
    def weight(self) -> Tensor:
        """The embedding's table, multiplied out anew at every access (some heads read it); it cannot be set."""
        return self.embedding.dense_weight()

    def forward(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        logits = self.embedding.project(hidden)
        return logits if self.bias is None else logits + self.bias


class Decomposer(ABC):
    """A way to factorise. One subclass, one file; registered under ``name``.

    Attributes:
        name: what ``--method`` takes.
        summary: one line for ``compresskit methods``.
        reference: where the method comes from.
        spec_type: its :class:`Spec`.
        options_type: its :class:`Options`, the keys a recipe rule may give.
        best_first: whether candidates of one size differ in worth and come best first: uniform plans then take a later
            one only for a better size. Default: no.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    spec_type: ClassVar[type[Spec]]
    options_type: ClassVar[type[Options]]
    best_first: ClassVar[bool] = False

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        """Which targets belong together. Default: each on its own."""
        return [Group(target.name, (target,)) for target in targets]

    def has_own_form(self, group: Group) -> bool:
        """Whether the group gets a form that no other method has; where not, ``auto`` leaves it to the others."""
        return True

    @abstractmethod
    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[Spec]:
        """About a dozen specs whose parameters lie around ``parameters``, preferred ones first.

        ``parameters`` at or below the smallest possible gives the smallest ones. Never a spec that saves nothing, nor
        one above :data:`MAX_FLOPS_RATIO` x dense FLOPs unless ``allow_slow``. May be empty.
        """

    def slow(self, group: Group, spec: Spec) -> bool:
        """Whether a spec takes more than :data:`MAX_FLOPS_RATIO` x the dense FLOPs."""
        return self.cost(group, spec).flops > MAX_FLOPS_RATIO * 2 * COST_TOKENS * group.parameters

    def offered(self, group: Group, specs: Iterable[Spec], parameters: int, *, allow_slow: bool) -> list[Spec]:
        """At most a dozen specs: those that save parameters and are not slow, nearest to ``parameters`` first."""
        sizes = {spec: self.cost(group, spec).parameters for spec in specs}
        usable = [spec for spec, size in sizes.items() if size < group.parameters]
        if not allow_slow:
            usable = [spec for spec in usable if not self.slow(group, spec)]
        return sorted(usable, key=lambda spec: abs(sizes[spec] - parameters))[:12]

    @abstractmethod
    def resolve(self, group: Group, options: Options) -> Spec:
        """The spec that explicit recipe options mean for this group's shape.

        Raises:
            InputError: the options do not fit the shape, or name too few factors.
        """

    @abstractmethod
    def check(self, group: Group, spec: Spec) -> None:
        """Raises InputError if ``spec`` does not fit the group's shape or saves no parameters."""

    @abstractmethod
    def cost(self, group: Group, spec: Spec, tokens: int = COST_TOKENS) -> Cost:
        """Parameters, and FLOPs for ``tokens`` tokens through every target of the group."""

    def time(self, group: Group, spec: Spec, tokens: int = COST_TOKENS) -> float:
        """Estimated time of a forward pass, in units of a large matrix product's FLOP. Default: the FLOPs."""
        return float(self.cost(group, spec, tokens).flops)

    def faster(self, group: Group, spec: Spec) -> Spec:
        """The fastest spec with as many parameters as ``spec``. Default: ``spec`` itself."""
        return spec

    @abstractmethod
    def errors(self, group: Group, specs: Sequence[Spec], source: Source) -> list[float]:
        """The relative Frobenius error each spec will have, from spectra, without factorising.

        Exact for one spec (of weights with 32 bits to about 5e-4); of several a close upper bound will do where exact
        figures would take too long.
        """

    def output_errors(self, group: Group, specs: Sequence[Spec], source: Source, statistics: Statistics) -> list[float]:
        """The relative error that each spec's outputs will have on the text of the calibration, ||(W - W') X||_F /
        ||W X||_F, root mean square over the group's matrices (of an embedding: of its rows, weighted by how often they
        occur).

        Here by factorising; a method that knows a shorter way overrides it.
        """
        return [self._output_error(group, spec, source, statistics) for spec in specs]

    @torch.no_grad()
    def _output_error(self, group: Group, spec: Spec, source: Source, statistics: Statistics) -> float:
        with torch.device("meta"):
            layers = self.layers(group, spec)
        for name, factor in self.factorise(group, spec, source, statistics).items():
            path, _, attribute = name.rpartition(".")
            frozen = nn.Parameter(factor, requires_grad=False) if factor.is_floating_point() else factor
            setattr(layers[path], attribute, frozen)
        matrices = []
        for target in group.targets:
            layer = layers[target.name]
            assert isinstance(layer, FactorisedLinear | FactorisedEmbedding)
            matrices.append((target, source.read(target), layer.dense_weight()))
        return output_error(matrices, statistics)

    @abstractmethod
    def factorise(
        self, group: Group, spec: Spec, source: Source, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """The factors, named as the state dict will name them (``<target name>.<factor>``), in the weight's dtype.

        Whole numbers, such as row numbers, are buffers of the layer. A decomposer that cannot use ``statistics``
        ignores them.
        """

    @abstractmethod
    def layers(self, group: Group, spec: Spec) -> dict[str, nn.Module]:
        """The modules to put in place, by module path; parameters uninitialised, so the meta device works.

        A path that is no target is the group's own name: its :class:`SharedFactors`, mounted on the base model.
        """

    def parse_spec(self, data: dict[str, Any]) -> Spec:
        """A spec from plain data (``config.json``). Raises InputError on unknown keys or wrong types."""
        spec: Spec = validate(self.spec_type, data, f"{self.name} spec")
        return spec
