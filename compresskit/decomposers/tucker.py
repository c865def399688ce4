"""Tucker decomposition over layers: W_l (m, n) = A (m, r_out) G_l (r_out, r_in) B (r_in, n), A and B shared.

The same-shaped matrices of a role in all layers are the slices of one third-order tensor. Its first two modes are
reduced (partial Tucker, also called Tucker2), the one over the matrices is not: each has a core slice of its own.
Bases come from the truncated higher-order SVD, refined by higher-order orthogonal iteration (De Lathauwer, De Moor &
Vandewalle 2000). Either side may stay full: then it has no shared factor. A matrix without companions, such as the word
embedding, has no mode to share over: its Tucker form is the truncated SVD.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import (
    COST_TOKENS,
    NEAR,
    SHRINKING,
    STEPS,
    Cost,
    Decomposer,
    FactorisedLinear,
    Group,
    RuleOptions,
    SharedFactors,
    Spec,
    Statistics,
    Target,
    WeightSource,
    least_squares,
    linalg,
    moment_of,
)
from compresskit.decomposers.low_rank import LowRank, LowRankSpec
from compresskit.decomposers.registry import register
from compresskit.errors import InputError

#: Sweeps of orthogonal iteration: on real attention and FFN matrices the third one gains less than 0.1 %.
_SWEEPS = 3


class TuckerSpec(Spec):
    """Ranks of the shared factors; None: that side stays full and has none."""

    method: Literal["tucker"] = "tucker"
    rank_out: int | None = Field(default=None, ge=1)
    rank_in: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_side(self) -> TuckerSpec:
        if self.rank_out is None and self.rank_in is None:
            raise ValueError("give rank_out, rank_in or both")
        return self

    def describe(self) -> str:
        return f"core {self.rank_out or 'm'}x{self.rank_in or 'n'}"


class TuckerOptions(RuleOptions):
    """Recipe options: one rank or both; a side without one keeps its full size.

    Attributes:
        rank_out: of the factor on the output side.
        rank_in: of the factor on the input side.
    """

    rank_out: int | None = Field(default=None, ge=1)
    rank_in: int | None = Field(default=None, ge=1)


class TuckerFactors(SharedFactors):
    """The factors that all matrices of a group share: a (m, r_out), b (r_in, n); None on a full side."""

    def __init__(self, shape: tuple[int, int], rank_out: int | None, rank_in: int | None) -> None:
        super().__init__()
        m, n = shape
        self.a = nn.Parameter(torch.empty(m, rank_out)) if rank_out is not None else None
        self.b = nn.Parameter(torch.empty(rank_in, n)) if rank_in is not None else None

    def forward(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The factors; called, so that hooks which bring parameters from elsewhere run (offloading)."""
        return self.a, self.b

    def extra_repr(self) -> str:
        shapes = {name: tuple(factor.shape) for name, factor in (("a", self.a), ("b", self.b)) if factor is not None}
        return ", ".join(f"{name}={shape}" for name, shape in shapes.items())


class TuckerLinear(FactorisedLinear):
    """y = ((x B^T) G^T) A^T + bias, with its own core g: (r_out, r_in)."""

    def __init__(self, in_features: int, out_features: int, shared: TuckerFactors, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.__dict__["shared"] = shared  # not registered: stored, counted and trained once
        rank_out = shared.a.shape[1] if shared.a is not None else out_features
        rank_in = shared.b.shape[0] if shared.b is not None else in_features
        self.core = nn.Parameter(torch.empty(rank_out, rank_in))

    @property
    def shared_factors(self) -> tuple[SharedFactors, ...]:
        return (self.shared,)

    @property
    def shared(self) -> TuckerFactors:
        """The owner of the outer factors."""
        found: TuckerFactors = self.__dict__["shared"]
        return found

    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        a, b = self.shared()
        if b is not None:
            x = F.linear(x, b)
        if a is None:
            return F.linear(x, self.core, self.bias)
        return F.linear(F.linear(x, self.core), a, self.bias)

    def dense_weight(self) -> Tensor:
        a, b = self.shared()
        weight = self.core if a is None else a @ self.core
        return weight if b is None else weight @ b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, core={tuple(self.core.shape)}"


@register
class Tucker(Decomposer[TuckerSpec, TuckerOptions]):
    """Shared outer factors over all layers of a role, one core per matrix."""

    name = "tucker"
    summary = "outer factors shared by all layers of a role, one small core per matrix"
    reference = "Tucker 1966; De Lathauwer et al. 2000"
    spec_type = TuckerSpec
    options_type = TuckerOptions

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        """Attention and FFN matrices of one shape together; everything else on its own (a head may be missing)."""
        alike: dict[tuple[str, int, int], list[Target]] = defaultdict(list)
        found = []
        for target in targets:
            if target.kind == "linear" and target.role in ("attention", "ffn"):
                alike[target.role, *target.shape].append(target)
            else:
                found.append(Group(target.name, (target,)))
        for (role, m, n), members in alike.items():
            name = f"tucker_{role}_{m}x{n}" if len(members) > 1 else members[0].name
            found.append(Group(name, tuple(members)))
        return found

    def has_own_form(self, group: Group) -> bool:
        return len(group.targets) > 1

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[TuckerSpec]:
        """Both sides reduced where that is not slower than dense, else only the shorter one.

        Of equally large cores of square matrices those with twice the rank on the output side are nearer to the
        original, of others those with equal ranks (reports/minilm-shared-shapes).
        """
        if len(group.targets) == 1:
            return [_single(group, spec) for spec in _alone.candidates(group, parameters, allow_slow=allow_slow)]
        for share in SHRINKING:
            for form in (_two_sided, _one_sided):
                wanted = round(parameters * share)
                specs = dict.fromkeys(spec for step in STEPS for spec in form(group, round(wanted * step)))
                found = self.offered(group, specs, wanted, allow_slow=allow_slow)
                if found and max(self.cost(group, spec).parameters for spec in found) >= wanted / (1 + NEAR):
                    return found
        return []

    def resolve(self, group: Group, options: TuckerOptions) -> TuckerSpec:
        if options.rank_out is None and options.rank_in is None:
            raise InputError(f"tucker for {group.name}: give rank_out, rank_in or both")
        spec = TuckerSpec(rank_out=options.rank_out, rank_in=options.rank_in)
        self.check(group, spec)
        return spec

    def check(self, group: Group, spec: TuckerSpec) -> None:
        m, n = group.shape
        for rank, size, side in ((spec.rank_out, m, "rank_out"), (spec.rank_in, n, "rank_in")):
            if rank is not None and rank >= size:
                raise InputError(f"tucker for {group.name} ({m}x{n}): {side} {rank} must be below {size}")
        count, (rank_out, rank_in) = len(group.targets), _ranks(spec)
        if rank_out is not None and rank_in is not None:
            if count == 1:
                raise InputError(f"tucker for {group.name}: a single matrix takes one rank: rank_out or rank_in")
            if rank_out > count * rank_in or rank_in > count * rank_out:
                raise InputError(f"tucker for {group.name}: {count} cores {rank_out}x{rank_in} cannot fill both sides")
        if self.cost(group, spec).parameters >= group.parameters:
            raise InputError(f"tucker for {group.name} ({m}x{n}): {spec.describe()} saves no parameters")

    def cost(self, group: Group, spec: TuckerSpec, tokens: int = COST_TOKENS) -> Cost:
        (m, n), count = group.shape, len(group.targets)
        rank_out, rank_in = spec.rank_out or m, spec.rank_in or n
        outer = m * rank_out * (spec.rank_out is not None) + n * rank_in * (spec.rank_in is not None)
        core = rank_out * rank_in
        if group.kind == "embedding":  # a look-up, and one product with the short factor
            return Cost(outer + core, 2 * tokens * n * min(rank_out, rank_in))
        return Cost(outer + count * core, 2 * tokens * count * (outer + core))

    def errors(self, group: Group, specs: Sequence[TuckerSpec], source: WeightSource) -> list[float]:
        """Of one spec exactly; of several an upper bound, about 1 % above it: without the sweeps of iteration."""
        if len(group.targets) == 1:
            return _alone.errors(group, [_low_rank(spec) for spec in specs], source)
        weights = [linalg.working(source.read(target)) for target in group.targets]
        total = sum(float(weight.square().sum()) for weight in weights)
        if len(specs) == 1 and total > 0:
            a, b = _bases(weights, *_ranks(specs[0]))
            captured = sum(float(_core(weight, a, b).square().sum()) for weight in weights)
            return [max(0.0, 1 - captured / total) ** 0.5]
        return _bounds(weights, specs)

    def output_errors(
        self, group: Group, specs: Sequence[TuckerSpec], source: WeightSource, statistics: Statistics
    ) -> list[float]:
        """Of one spec exactly; of several about, under the mean second moment that the bases are found with."""
        if len(group.targets) == 1:
            return _alone.output_errors(group, [_low_rank(spec) for spec in specs], source, statistics)
        moments = [moment_of(target, statistics) for target in group.targets]
        known = [moment for moment in moments if moment is not None]
        if len(specs) == 1 or len(known) < len(moments):
            return super().output_errors(group, specs, source, statistics)
        matrices = _under_the_mean([source.read(target) for target in group.targets], known)[1]
        return _bounds(matrices, specs)

    def factorise(
        self, group: Group, spec: TuckerSpec, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        if len(group.targets) == 1:
            return _alone.factorise(group, _low_rank(spec), source, statistics)
        weights = [source.read(target) for target in group.targets]
        dtype = weights[0].dtype
        weights = [linalg.working(weight) for weight in weights]
        moments = [moment_of(target, statistics) for target in group.targets]
        known = [moment for moment in moments if moment is not None]
        if len(known) == len(weights):
            a, b, cores = _fit(weights, known, spec)
        else:
            a, b = _bases(weights, *_ranks(spec))
            cores = [_core(weight, a, b) for weight in weights]
        factors = {
            f"{target.name}.core": core.to(dtype).contiguous()
            for target, core in zip(group.targets, cores, strict=True)
        }
        if a is not None:
            factors[f"{group.name}.a"] = a.to(dtype).contiguous()
        if b is not None:
            factors[f"{group.name}.b"] = b.T.to(dtype).contiguous()
        return factors

    def layers(self, group: Group, spec: TuckerSpec) -> dict[str, nn.Module]:
        if len(group.targets) == 1:
            return _alone.layers(group, _low_rank(spec))
        rank_out, rank_in = _ranks(spec)
        m, n = group.shape
        owner = TuckerFactors((m, n), rank_out, rank_in)
        linears = {target.name: TuckerLinear(n, m, owner, target.bias) for target in group.targets}
        return {group.name: owner, **linears}


#: What a matrix without companions gets.
_alone = LowRank()


def _low_rank(spec: TuckerSpec) -> LowRankSpec:
    """The low-rank spec that is meant for a single matrix."""
    rank_out, rank_in = _ranks(spec)
    return LowRankSpec(rank=rank_out or rank_in or 0)


def _single(group: Group, spec: LowRankSpec) -> TuckerSpec:
    """A low-rank spec in Tucker's words: the longer side is full."""
    m, n = group.shape
    return TuckerSpec(rank_in=spec.rank) if m >= n else TuckerSpec(rank_out=spec.rank)


def _ranks(spec: TuckerSpec) -> tuple[int | None, int | None]:
    return spec.rank_out, spec.rank_in


def _bounds(weights: Sequence[Tensor], specs: Sequence[TuckerSpec]) -> list[float]:
    """Upper bounds of the relative errors of several specs, about 1 % above them: without the sweeps of iteration."""
    total = sum(float(weight.square().sum()) for weight in weights)
    if total == 0:
        return [0.0] * len(specs)
    # Energy of every corner of the cores between the largest bases, from which each spec's follows by cumulative sums.
    # A full side needs no basis: its last row or column is what is left to the whole.
    picked = [_ranks(spec) for spec in specs]
    left = _largest([weight.T for weight in weights], [rank_out for rank_out, _ in picked])
    right = _largest(weights, [rank_in for _, rank_in in picked])
    energy = np.zeros((left.shape[1] + 1, right.shape[1] + 1))
    for weight in weights:
        rows, columns = left.T @ weight, weight @ right
        core = rows @ right
        energy[:-1, :-1] += core.square().cpu().numpy()
        energy[:-1, -1] += (rows.square().sum(1) - core.square().sum(1)).cpu().numpy()
        energy[-1, :-1] += (columns.square().sum(0) - core.square().sum(0)).cpu().numpy()
    corners = energy.cumsum(0).cumsum(1)
    found = [corners[(rank_out or 0) - 1, (rank_in or 0) - 1] for rank_out, rank_in in picked]
    return [float(max(0.0, 1 - captured / total) ** 0.5) for captured in found]


def _largest(blocks: Sequence[Tensor], ranks: Sequence[int | None]) -> Tensor:
    """Leading right singular vectors (k, largest rank) of the blocks (rows, k) stacked; (k, 0) without any rank."""
    largest = max(rank or 0 for rank in ranks)
    if not largest:
        return blocks[0].new_zeros(blocks[0].shape[1], 0)
    return linalg.leading(linalg.gram(blocks), largest)[1].to(blocks[0].dtype)


def _two_sided(group: Group, parameters: int) -> Iterator[TuckerSpec]:
    """Cores of about the wanted size whose ranks stand in the preferred proportion, and its neighbours."""
    (m, n), count = group.shape, len(group.targets)
    proportion = 2.0 if m == n else 1.0
    square, linear = count * proportion, m * proportion + n
    middle = (-linear + (linear**2 + 4 * square * max(parameters, 0)) ** 0.5) / (2 * square)
    for rank_in in {max(1, round(middle) + shift) for shift in (-1, 0, 1)}:
        rank_out = max(1, round((parameters - n * rank_in) / (count * rank_in + m)))
        rank_out = min(rank_out, count * rank_in)  # more columns of A than the cores can fill
        if rank_in < n and rank_out < m and rank_in <= count * rank_out:
            yield TuckerSpec(rank_out=rank_out, rank_in=rank_in)


def _one_sided(group: Group, parameters: int) -> Iterator[TuckerSpec]:
    """Cores that are full on the longer side (on the output side of square ones)."""
    (m, n), count = group.shape, len(group.targets)
    short, long = min(m, n), max(m, n)
    rank = min(short - 1, max(1, round(parameters / (count * long + short))))
    if rank >= 1:
        yield TuckerSpec(rank_in=rank) if m >= n else TuckerSpec(rank_out=rank)


def _core(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The slice of a matrix between orthonormal bases a (m, r_out) and b (n, r_in)."""
    core = weight if a is None else a.T @ weight
    return core if b is None else core @ b


def _bases(weights: Sequence[Tensor], rank_out: int | None, rank_in: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Orthonormal a (m, r_out) and b (n, r_in) that keep as much of the matrices as possible."""
    if rank_out is None or rank_in is None:
        a = None if rank_out is None else _basis([weight.T for weight in weights], rank_out)
        b = None if rank_in is None else _basis(weights, rank_in)
        return a, b
    m, n = weights[0].shape
    if m < n:  # begin on the short side: its Gram matrix is the small one
        b_, a_ = _bases([weight.T for weight in weights], rank_in, rank_out)
        return a_, b_
    b = _basis(weights, rank_in)
    for _ in range(_SWEEPS):
        a = _basis([(weight @ b).T for weight in weights], rank_out)
        b = _basis([a.T @ weight for weight in weights], rank_in)
    return a, b


def _basis(blocks: Sequence[Tensor], rank: int) -> Tensor:
    """Leading right singular vectors (k, rank) of the blocks (rows, k) stacked, through the smaller Gram matrix."""
    k, rows = blocks[0].shape[1], sum(len(block) for block in blocks)
    if rows >= k or rows < rank:
        return linalg.truncated_svd(lambda: blocks, rank).vectors
    stacked = torch.cat(list(blocks))  # (rows, k), rows < k
    values, _, images = linalg.truncated_svd(lambda: [stacked.T], rank)
    basis: Tensor = torch.linalg.qr(images * linalg.safe_inverse(values).to(images.dtype))[0]
    return basis


def _fit(
    weights: Sequence[Tensor], second_moments: Sequence[Tensor], spec: TuckerSpec
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Shared factors and cores of W_l = A G_l B^T that keep outputs. The shared ones are found under the mean of the
    second moments, as one B cannot suit all of them; every core is then the least-squares one under its own.

    Args:
        weights: (m, n) each.
        second_moments: (n, n) each.
        spec: its ranks.
    """
    factor, matrices = _under_the_mean(weights, second_moments)
    a, b = _bases(matrices, *_ranks(spec))
    if b is not None:  # W L = A G B^T, so W = A G (L^-T B)^T
        b = torch.linalg.qr(torch.linalg.solve_triangular(factor.T, b.double(), upper=True))[0]
    cores = []
    for weight, second_moment in zip(weights, second_moments, strict=True):
        moment = least_squares.damped(second_moment)
        core = weight.double() if a is None else a.double().T @ weight.double()
        cores.append(core if b is None else least_squares.solve(b.T @ moment @ b, core @ moment @ b))
    return a, b, cores


def _under_the_mean(weights: Sequence[Tensor], second_moments: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """L (n, n) of the mean of all damped second moments, and every W_l L (m, n) over the norm of its own outputs, so
    that no matrix counts more than another; float64.
    """
    mean = sum((least_squares.damped(moment) for moment in second_moments), torch.zeros(())) / len(second_moments)
    factor = torch.linalg.cholesky(mean)
    matrices = []
    for weight, moment in zip(weights, second_moments, strict=True):
        energy = least_squares.output_energy(weight.double(), least_squares.damped(moment))
        size = torch.tensor(max(0.0, energy), dtype=torch.float64).sqrt()
        matrices.append(weight.double() @ factor * linalg.safe_inverse(size))
    return factor, matrices
