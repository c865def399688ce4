"""Low-rank factorisation through the truncated SVD: W (m, n) = A (m, r) B (r, n).

The rank-r truncation of the SVD is the best rank-r approximation in the Frobenius norm (Eckart & Young 1936). The
singular values are shared evenly between both factors, so that neither dominates a gradient step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import (
    COST_TOKENS,
    Cost,
    Decomposer,
    FactorisedEmbedding,
    FactorisedLinear,
    Group,
    RuleOptions,
    Spec,
    Statistics,
    Target,
    WeightSource,
    counts_of,
    least_squares,
    linalg,
    moment_of,
    row_blocks,
)
from compresskit.decomposers.registry import register
from compresskit.errors import InputError

#: Ranks offered around the asked number of parameters, as factors of the nearest one.
_STEPS = (0.85, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.15)


class LowRankSpec(Spec):
    """W (m, n) = A (m, rank) B (rank, n)."""

    method: str = "low-rank"  # methods derived from this one write their own name here
    rank: int = Field(ge=1)

    def describe(self) -> str:
        return f"rank {self.rank}"


class LowRankOptions(RuleOptions):
    """Recipe options.

    Attributes:
        rank: columns of A, rows of B.
    """

    rank: int | None = Field(default=None, ge=1)


class LowRankLinear(FactorisedLinear):
    """y = (x B^T) A^T + bias, with a: (m, r), b: (r, n)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.rank = rank
        self.a = nn.Parameter(torch.empty(out_features, rank))
        self.b = nn.Parameter(torch.empty(rank, in_features))

    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        return F.linear(F.linear(x, self.b), self.a, self.bias)

    def dense_weight(self) -> Tensor:
        return self.a @ self.b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class LowRankEmbedding(FactorisedEmbedding):
    """Row i = a_i B, with a: (v, r), kept as the look-up table, and b: (r, d)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.rank = rank
        self.a = nn.Parameter(torch.empty(num_embeddings, rank))
        self.b = nn.Parameter(torch.empty(rank, embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        return F.linear(F.embedding(ids, self.a, self.padding_idx), self.b.T)

    def project(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        return F.linear(F.linear(hidden, self.b), self.a)

    def dense_weight(self) -> Tensor:
        return self.a @ self.b

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


@register
class LowRank(Decomposer[LowRankSpec, LowRankOptions]):
    """Truncated SVD."""

    name = "low-rank"
    summary = "product of two thin matrices from the truncated SVD"
    reference = "Eckart & Young 1936"
    spec_type = LowRankSpec
    options_type = LowRankOptions

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[LowRankSpec]:
        m, n = group.shape
        largest = (m * n - 1) // (m + n)  # the largest rank that saves parameters; FLOPs follow the parameters
        if largest < 1:
            return []
        nearest = parameters / (m + n)
        ranks = {min(largest, max(1, round(nearest * step))) for step in _STEPS}
        ranks |= {min(largest, max(1, int(nearest) + step)) for step in (0, 1)}
        return [
            self.spec_type(method=self.name, rank=rank) for rank in sorted(ranks, key=lambda rank: abs(rank - nearest))
        ]

    def resolve(self, group: Group, options: LowRankOptions) -> LowRankSpec:
        if options.rank is None:
            raise InputError(f"{self.name} for {group.name}: give rank")
        spec = self.spec_type(method=self.name, rank=options.rank)
        self.check(group, spec)
        return spec

    def check(self, group: Group, spec: LowRankSpec) -> None:
        m, n = group.shape
        if spec.rank * (m + n) >= m * n:
            raise InputError(
                f"{self.name} for {group.name} ({m}x{n}): rank {spec.rank} saves no parameters; "
                f"the largest that does is {(m * n - 1) // (m + n)}"
            )

    def cost(self, group: Group, spec: LowRankSpec, tokens: int = COST_TOKENS) -> Cost:
        m, n = group.shape
        # A look-up of A's rows costs nothing, only the product with B does.
        per_token = n if group.kind == "embedding" else m + n
        return Cost(spec.rank * (m + n), 2 * tokens * spec.rank * per_token)

    def errors(self, group: Group, specs: Sequence[LowRankSpec], source: WeightSource) -> list[float]:
        return linalg.tail_errors(lambda: _tall_blocks(source, group.target), [spec.rank for spec in specs])

    def output_errors(
        self, group: Group, specs: Sequence[LowRankSpec], source: WeightSource, statistics: Statistics
    ) -> list[float]:
        target, ranks = group.target, [spec.rank for spec in specs]
        moment, counts = moment_of(target, statistics), counts_of(target, statistics)
        if counts is not None:
            weights = least_squares.row_weights(counts)
            return linalg.tail_errors(lambda: linalg.scaled_rows(lambda: row_blocks(source, target), weights), ranks)
        if moment is None:
            return self.errors(group, specs, source)
        seen = source.read(target).double() @ least_squares.root(moment)
        return linalg.tail_errors(lambda: [seen if len(seen) >= seen.shape[1] else seen.T], ranks)

    def factorise(
        self, group: Group, spec: LowRankSpec, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        target, rank = group.target, spec.rank
        m, n = target.shape
        moment, counts = moment_of(target, statistics), counts_of(target, statistics)
        if moment is not None:
            a, b = fit_outputs(source.read(target), moment, rank)
        elif counts is not None:
            short, long = least_squares.weighted_svd(
                lambda: row_blocks(source, target), least_squares.row_weights(counts), rank
            )
            root = torch.linalg.vector_norm(long, dim=0).sqrt()
            a, b = long * linalg.safe_inverse(root), (short * root).T
        else:
            values, vectors, images = linalg.truncated_svd(lambda: _tall_blocks(source, target), rank)
            root = values.sqrt()  # each factor takes the square root of the singular value
            long, short = images * linalg.safe_inverse(root), vectors * root
            a, b = (long, short.T) if m >= n else (short, long.T)
        dtype = source.rows(target, 0, 1).dtype
        return {f"{target.name}.a": a.to(dtype).contiguous(), f"{target.name}.b": b.to(dtype).contiguous()}

    def layers(self, group: Group, spec: LowRankSpec) -> dict[str, nn.Module]:
        target, rank = group.target, spec.rank
        m, n = target.shape
        if target.kind == "embedding":
            return {target.name: LowRankEmbedding(m, n, rank, target.padding_idx)}
        return {target.name: LowRankLinear(n, m, rank, target.bias)}


def _tall_blocks(source: WeightSource, target: Target) -> Iterator[Tensor]:
    """Row blocks of W, or W^T in one block where W is wide, so that columns are the short side."""
    m, n = target.shape
    if m >= n:
        yield from row_blocks(source, target)
    else:
        yield source.read(target).T


def fit_outputs(weight: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The optimum of that rank, a (m, rank) and b (rank, n): a spans the leading left singular vectors of W L, and b is
    a^T W (the whitened SVD of SVD-LLM, Wang et al. 2024, without an inverse of L).
    """
    weight = weight.double()
    tall = weight @ least_squares.root(second_moment)
    m, n = tall.shape
    if m >= n:
        left = linalg.truncated_svd(lambda: [tall], rank).images
        left = torch.linalg.qr(left)[0]
    else:
        left = linalg.truncated_svd(lambda: [tall.T], rank).vectors
    b = left.T @ weight
    size = torch.linalg.vector_norm(b, dim=1).sqrt()  # both factors take a share of the product's size
    return left * size, b * linalg.safe_inverse(size)[:, None]
