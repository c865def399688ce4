"""Low rank with more of it for frequent words: row i = a_i B, and for a frequent word f_j C more.

Word frequencies fall off like 1 / rank (Zipf), so most look-ups go to few rows of an embedding, and a rank that serves
all rows alike spends nearly everything on words that hardly occur. GroupReduce (Chen, Si, Li, Chelba & Hsieh 2018) cuts
the vocabulary into groups by frequency with a basis and a rank for each. Here there are two, nested: all words share
one basis of low rank, fitted to those that are not frequent; the frequent ones have a second basis for what it leaves.
Which words are frequent says calibration; without it the first rows are taken, since most vocabularies list frequent
pieces first.

Every matrix that is no embedding gets the plain low rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import (
    COST_TOKENS,
    Cost,
    Decomposer,
    FactorisedEmbedding,
    Group,
    RuleOptions,
    Spec,
    Statistics,
    Target,
    WeightSource,
    counts_of,
    least_squares,
    linalg,
    row_blocks,
)
from compresskit.decomposers.low_rank import LowRank, LowRankSpec
from compresskit.decomposers.registry import register
from compresskit.errors import InputError

#: Share of the parameters that goes into what all words have, and how many words are frequent, as a factor of the usual
#: number; preferred ones first, by what a task keeps when its embedding alone is replaced (docs/results.md, students of
#: the teacher). By the error of look-ups alone fewer words, with more rank, would win.
_FORMS = (
    (1 / 2, 1.5),
    (3 / 8, 2.0),
    (1 / 2, 2.0),
    (3 / 8, 1.5),
    (1 / 4, 2.0),
    (1 / 4, 1.5),
    (5 / 8, 1.5),
    (5 / 8, 2.0),
)


class GroupReduceSpec(Spec):
    """Row i = a_i B, a (m, rank) and B (rank, n); ``words`` rows get f_j C more, f (words, extra) and C (extra, n).
    Without ``words`` and ``extra`` plain low rank.
    """

    method: Literal["group-reduce"] = "group-reduce"
    rank: int = Field(ge=1)
    words: int | None = Field(default=None, ge=1)
    extra: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _both(self) -> GroupReduceSpec:
        if (self.words is None) != (self.extra is None):
            raise ValueError("give words and extra, or neither")
        return self

    def describe(self) -> str:
        return f"rank {self.rank}" + (f", {self.words} words +{self.extra}" if self.words else "")


class GroupReduceOptions(RuleOptions):
    """Recipe options. An embedding takes all three, any other matrix ``rank`` alone.

    Attributes:
        rank: of all words.
        words: how many are frequent.
        extra: rank that those have more.
    """

    rank: int | None = Field(default=None, ge=1)
    words: int | None = Field(default=None, ge=1)
    extra: int | None = Field(default=None, ge=1)


class GroupReduceEmbedding(FactorisedEmbedding):
    """Row i = a_i B + [i is frequent] f_j C, with a: (v, r), b: (r, d), frequent_a: (w, x), frequent_b: (x, d) and
    ``frequent``: (w,) int32, the j-th frequent row's number. That list is a buffer: stored, but no parameter.
    """

    frequent: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, spec: GroupReduceSpec, padding_idx: int | None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        words, extra = spec.words or 0, spec.extra or 0
        self.a = nn.Parameter(torch.empty(num_embeddings, spec.rank))
        self.b = nn.Parameter(torch.empty(spec.rank, embedding_dim))
        self.frequent_a = nn.Parameter(torch.empty(words, extra))
        self.frequent_b = nn.Parameter(torch.empty(extra, embedding_dim))
        self.register_buffer("frequent", torch.empty(words, dtype=torch.int32))

    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        # The padding's row is never among the frequent ones.
        place = F.embedding(ids, self._place()[:, None])[..., 0]
        more = F.embedding(place.clamp_min(0), self.frequent_a) * (place >= 0).unsqueeze(-1)
        rows = F.linear(F.embedding(ids, self.a, self.padding_idx), self.b.T)
        return rows + F.linear(more, self.frequent_b.T)

    def _place(self) -> Tensor:
        """For every row its place among the frequent ones, -1 for the others, (v,)."""
        rows = self.frequent.long()
        place = torch.full((self.num_embeddings,), -1, dtype=torch.long, device=rows.device)
        return place.scatter(0, rows, torch.arange(len(rows), device=rows.device))

    def project(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        logits = F.linear(F.linear(hidden, self.b), self.a)
        more = F.linear(F.linear(hidden, self.frequent_b), self.frequent_a)
        return logits.index_add(-1, self.frequent.long(), more.to(logits.dtype))

    def dense_weight(self) -> Tensor:
        return (self.a @ self.b).index_add(0, self.frequent.long(), self.frequent_a @ self.frequent_b)

    def extra_repr(self) -> str:
        (words, extra), rank = self.frequent_a.shape, self.a.shape[1]
        return f"{super().extra_repr()}, rank={rank}, words={words}, extra={extra}"


@register
class GroupReduce(Decomposer[GroupReduceSpec, GroupReduceOptions]):
    """Two truncated SVDs of an embedding: of the rows that are not frequent, whose basis serves all rows, and of what
    it leaves of the frequent ones.
    """

    name = "group-reduce"
    summary = "low rank, with more of it for frequent words"
    reference = "Chen et al. 2018"
    spec_type = GroupReduceSpec
    options_type = GroupReduceOptions
    best_first = True

    def has_own_form(self, group: Group) -> bool:
        return group.kind == "embedding"

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[GroupReduceSpec]:
        specs: list[GroupReduceSpec] = []
        m, n = group.shape
        if group.kind == "embedding":
            usual = m / 2 * (parameters / (m * n)) ** (2 / 3)
            for share, factor in _FORMS:
                words = min(m - 1, max(1, round(factor * usual)))
                rank = max(1, round(share * parameters / (m + n)))
                extra = min((parameters - rank * (m + n)) // (words + n), min(words, n - rank))
                if extra >= 1:
                    specs.append(GroupReduceSpec(rank=rank, words=words, extra=extra))
        if not specs:  # another kind, or too few parameters for two bases
            plain = _plain.candidates(group, parameters, allow_slow=allow_slow)
            specs = [GroupReduceSpec(rank=spec.rank) for spec in plain]
        return [spec for spec in dict.fromkeys(specs) if self.cost(group, spec).parameters < group.parameters]

    def resolve(self, group: Group, options: GroupReduceOptions) -> GroupReduceSpec:
        if options.rank is None or (options.words is None) != (options.extra is None):
            raise InputError(f"group-reduce for {group.name}: give rank, of an embedding also words and extra")
        spec = GroupReduceSpec(rank=options.rank, words=options.words, extra=options.extra)
        self.check(group, spec)
        return spec

    def check(self, group: Group, spec: GroupReduceSpec) -> None:
        words, extra = _extra(spec)
        if not words:
            _plain.check(group, _low_rank(spec))
            return
        rank, (m, n) = _low_rank(spec).rank, group.shape
        what = f"group-reduce for {group.name} ({m}x{n})"
        if group.kind != "embedding":
            raise InputError(f"{what}: words and extra are for embeddings; give rank alone")
        if words >= m:
            raise InputError(f"{what}: words {words} must be below {m}")
        if rank + extra > n or extra > words:
            raise InputError(f"{what}: rank {rank} + extra {extra} must be at most {n}, and extra at most words")
        if self.cost(group, spec).parameters >= group.parameters:
            raise InputError(f"{what}: {spec.describe()} saves no parameters")

    def cost(self, group: Group, spec: GroupReduceSpec, tokens: int = COST_TOKENS) -> Cost:
        words, extra = _extra(spec)
        n = group.shape[1]
        plain = _plain.cost(group, _low_rank(spec), tokens)
        return Cost(plain.parameters + extra * (words + n), plain.flops + 2 * tokens * extra * n)

    def errors(self, group: Group, specs: Sequence[GroupReduceSpec], source: WeightSource) -> list[float]:
        return self._errors(group, specs, source, None)

    def output_errors(
        self, group: Group, specs: Sequence[GroupReduceSpec], source: WeightSource, statistics: Statistics
    ) -> list[float]:
        return self._errors(group, specs, source, statistics)

    def _errors(
        self, group: Group, specs: Sequence[GroupReduceSpec], source: WeightSource, statistics: Statistics | None
    ) -> list[float]:
        plain = [_low_rank(spec) for spec in specs if not _extra(spec)[0]]
        found: dict[LowRankSpec, float] = {}
        if plain:
            known = _plain.errors(group, plain, source)
            if statistics is not None:
                known = _plain.output_errors(group, plain, source, statistics)
            found = dict(zip(plain, known, strict=True))
        if len(plain) < len(specs):
            table = _Table(group.target, source, statistics)
            return [table.error(spec) if _extra(spec)[0] else found[_low_rank(spec)] for spec in specs]
        return [found[_low_rank(spec)] for spec in specs]

    def factorise(
        self, group: Group, spec: GroupReduceSpec, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        words, _ = _extra(spec)
        if not words:
            return _plain.factorise(group, _low_rank(spec), source, statistics)
        target, table = group.target, _Table(group.target, source, statistics)
        common, own, _ = table.bases(spec)
        frequent = table.frequent(words)
        dtype = source.rows(target, 0, 1).dtype
        a = torch.cat([block.double() @ common for block in row_blocks(source, target)])
        factors = {"frequent": frequent.int()}
        for prefix, long, basis in (("", a, common), ("frequent_", table.weight[frequent].double() @ own, own)):
            root = torch.linalg.vector_norm(long, dim=0).sqrt()  # both factors take a share of the product's size
            factors[f"{prefix}a"] = (long * linalg.safe_inverse(root)).to(dtype).contiguous()
            factors[f"{prefix}b"] = (basis * root).T.to(dtype).contiguous()
        return {f"{target.name}.{name}": factor for name, factor in factors.items()}

    def layers(self, group: Group, spec: GroupReduceSpec) -> dict[str, nn.Module]:
        if not _extra(spec)[0]:
            return _plain.layers(group, _low_rank(spec))
        target = group.target
        return {target.name: GroupReduceEmbedding(*target.shape, spec, target.padding_idx)}


#: What every matrix but an embedding gets.
_plain = LowRank()


def _low_rank(spec: GroupReduceSpec) -> LowRankSpec:
    return LowRankSpec(rank=spec.rank)


def _extra(spec: GroupReduceSpec) -> tuple[int, int]:
    """Frequent words and the rank that they have more; zeros for plain low rank."""
    return spec.words or 0, spec.extra or 0


class _Table:
    """An embedding with its weighted Gram matrices in float64: made once for all specs that are tried."""

    def __init__(self, target: Target, source: WeightSource, statistics: Statistics | None) -> None:
        counts = counts_of(target, statistics)
        self.weight = source.read(target)
        m = len(self.weight)
        device = self.weight.device
        self._weights = torch.ones(m, device=device).double() if counts is None else least_squares.row_weights(counts)
        seen = torch.zeros(m, device=device) if counts is None else counts.clone()
        if target.padding_idx is not None:
            seen[target.padding_idx] = -1
        self._order = seen.argsort(descending=True, stable=True)
        blocks = linalg.scaled_rows(lambda: row_blocks(source, target), self._weights)
        self._gram = linalg.gram(block.double() for block in blocks)
        self._grams: dict[int, Tensor] = {}

    def frequent(self, words: int) -> Tensor:
        """Numbers of the most frequent rows, ascending, (words,)."""
        return self._order[:words].sort().values

    def bases(self, spec: GroupReduceSpec) -> tuple[Tensor, Tensor, float]:
        """Orthonormal B^T (n, rank) and C^T (n, extra), orthogonal to it, and how much weighted energy they keep.

        Where less is left than ``extra`` directions, the others of C^T are noise, not of length 1.
        """
        (words, extra), rank = _extra(spec), _low_rank(spec).rank
        if words not in self._grams:
            rows = self.frequent(words)
            self._grams[words] = linalg.gram([self.weight[rows].double() * self._weights[rows, None]])
        gram = self._grams[words]
        common = linalg.leading(self._gram - gram, rank)[1]
        rest = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - common @ common.T
        left = rest @ gram @ rest
        own = linalg.leading((left + left.T) / 2, extra)[1]
        own = own - common @ (common.T @ own)  # where little is left, directions are rounding noise
        captured = sum(float((basis * (part @ basis)).sum()) for basis, part in ((common, self._gram), (own, left)))
        return common, own, captured

    def error(self, spec: GroupReduceSpec) -> float:
        """||W - W'||_F / ||W||_F with weighted rows."""
        energy = float(self._gram.diagonal().sum())
        return least_squares.error(energy, self.bases(spec)[2])
