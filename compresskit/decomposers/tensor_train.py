"""Tensor-train factorisation: a matrix as a tensor of order three, cut into a train of three cores (TT-SVD).

Rows are numbered i = i2 m1 + i1, columns j = j2 n3 + j3, so that W (m2 m1, n2 n3) is a tensor with the modes i1,
(i2, j2) and j3, a TT-matrix whose first core has no column and whose last core no row index:

    W[i, j] = sum over p, q of  A[i1, p] G[i2, p, j2, q] B[q, j3]

with a: (m1, r1), core: (m2, r1, n2, r2), b: (r2, n3). Every product with it is three plain matrix products. A
vocabulary that m2 does not divide is padded with rows of zeros, which look-up and tied head never show. TT-SVD
(Oseledets 2011) cuts the singular values bond by bond. In one shot a train of a linear is not nearer than low rank: A
and B serve m2 and n2 blocks alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import tensorly
import torch
from pydantic import Field
from tensorly.decomposition import tensor_train
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import linalg, weighted
from compresskit.decomposers.base import (
    COST_TOKENS,
    MAX_FLOPS_RATIO,
    SHRINKING,
    STEPS,
    Cost,
    Decomposer,
    FactorisedEmbedding,
    FactorisedLinear,
    Group,
    Options,
    Source,
    Spec,
    Statistics,
    Target,
    add_bias,
    counts_of,
    moment_of,
)
from compresskit.decomposers.registry import register
from compresskit.decomposers.weighted import Seen, SeenRows
from compresskit.errors import InputError

Pair = tuple[int, int]
Svd = Callable[..., tuple[Tensor, Tensor, Tensor]]

#: Blocks of an embedding, (rows, columns). The first is near low rank in one shot at 8x and 19x
#: (reports/minilm-shared-shapes); at low ratios only the second is as fast as dense under a tied head.
_EMBEDDING_BLOCKS = ((4, 2), (2, 2))


#: Rounds of alternating least squares where inputs are known: more of them gain less than 0.5 %.
_ROUNDS = 5


class TensorTrainSpec(Spec):
    """W in ``blocks`` = (m2, n2) blocks, with ``ranks`` = (r1, r2)."""

    method: Literal["tensor-train"] = "tensor-train"
    blocks: tuple[int, int]
    ranks: tuple[int, int]

    def describe(self) -> str:
        return f"{self.blocks[0]}x{self.blocks[1]} blocks, ranks {self.ranks[0]}, {self.ranks[1]}"


class TensorTrainOptions(Options):
    """Recipe options.

    Attributes:
        blocks: rows and columns of blocks that a matrix is cut into; default: what the planner offers.
        ranks: of the two bonds, output side first; needed.
    """

    blocks: tuple[int, int] | None = None
    ranks: tuple[int, int] | None = Field(default=None)


class TensorTrainLinear(FactorisedLinear):
    """y = W x + bias from the right end of the train to the left."""

    def __init__(self, in_features: int, out_features: int, blocks: Pair, ranks: Pair, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.blocks, self.ranks = blocks, ranks
        self.a, self.core, self.b = _empty_cores(out_features // blocks[0], in_features // blocks[1], blocks, ranks)

    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        y = _through(x, self.a, self.core, self.b)
        return add_bias(y, self.bias)

    def dense_weight(self) -> Tensor:
        return _dense(self.a, self.core, self.b)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}, ranks={self.ranks}"


class TensorTrainEmbedding(FactorisedEmbedding):
    """Row i of the padded table; rows from ``num_embeddings`` on do not exist for the outside."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, blocks: Pair, ranks: Pair, padding_idx: int | None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.blocks, self.ranks = blocks, ranks
        rows = math.ceil(num_embeddings / blocks[0])
        self.a, self.core, self.b = _empty_cores(rows, embedding_dim // blocks[1], blocks, ranks)

    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        (m2, n2), (_, r2) = self.blocks, self.ranks
        rows = F.embedding(ids % len(self.a), self.a)
        if self.padding_idx is not None:  # only this word, not the others that share its row of A
            rows = torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)
        every = F.linear(rows, self.core.transpose(1, 3).reshape(m2 * r2 * n2, -1)).unflatten(-1, (m2, r2 * n2))
        # A word beyond the vocabulary has no block: gather refuses it, as nn.Embedding does.
        block = torch.where(ids < self.num_embeddings, ids // len(self.a), m2)
        block = block[..., None, None].expand(*ids.shape, 1, r2 * n2)
        mine = every.gather(-2, block).squeeze(-2).unflatten(-1, (r2, n2))
        return F.linear(mine.transpose(-1, -2), self.b.T).flatten(-2)

    def project(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        return _through(hidden, self.a, self.core, self.b)[..., : self.num_embeddings]

    def dense_weight(self) -> Tensor:
        return _dense(self.a, self.core, self.b)[: self.num_embeddings]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}, ranks={self.ranks}"


@register
class TensorTrain(Decomposer):
    """Three cores from the TT-SVD."""

    name = "tensor-train"
    summary = "a train of three cores from the TT-SVD, outer ones shared by all blocks of a matrix"
    reference = "Oseledets 2011"
    spec_type = TensorTrainSpec
    options_type = TensorTrainOptions

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[Spec]:
        """Equal ranks and their neighbours. The fewest blocks for which both outer cores are about equally long: of
        equally large trains these are nearest to the original (reports/minilm-shared-shapes).
        """
        for share in SHRINKING:
            for blocks in _blocks(group):
                specs = dict.fromkeys(
                    TensorTrainSpec(blocks=blocks, ranks=ranks)
                    for step in STEPS
                    for ranks in _ranks_for(group, blocks, round(parameters * share * step))
                )
                found = self.offered(group, specs, round(parameters * share), allow_slow=allow_slow)
                if found:
                    return found
        return []

    def slow(self, group: Group, spec: Spec) -> bool:
        """An embedding is slow where its tied head would be."""
        if group.kind == "linear":
            return super().slow(group, spec)
        (m2, _), (r1, _) = _parts(spec)
        head = self.cost(group, spec, 1).flops + 2 * math.ceil(group.shape[0] / m2) * m2 * r1
        return head > MAX_FLOPS_RATIO * 2 * group.parameters

    def resolve(self, group: Group, options: Options) -> Spec:
        assert isinstance(options, TensorTrainOptions)
        if options.ranks is None:
            raise InputError(f"tensor-train for {group.name}: give ranks")
        blocks = options.blocks or next(iter(_blocks(group)), None)
        if blocks is None:
            raise InputError(f"tensor-train for {group.name}: a side of its shape has no divisor; give blocks")
        spec = TensorTrainSpec(blocks=blocks, ranks=options.ranks)
        self.check(group, spec)
        return spec

    def check(self, group: Group, spec: Spec) -> None:
        (m2, n2), (r1, r2) = _parts(spec)
        m, n = group.shape
        where = f"tensor-train for {group.name} ({m}x{n}): {spec.describe()}"
        if min(m2, n2, r1, r2) < 1 or n % n2 or (m % m2 and group.kind == "linear") or -m % m2 >= math.ceil(m / m2):
            raise InputError(f"{where}: blocks must divide the shape, ranks be at least 1")
        m1, n3 = math.ceil(m / m2), n // n2
        if r1 > min(m1, m2 * n2 * r2) or r2 > min(n3, m2 * n2 * r1):
            raise InputError(f"{where}: larger ranks than {m1} and {n3} (or than the core can join) add nothing")
        if self.cost(group, spec).parameters >= group.parameters:
            raise InputError(f"{where} saves no parameters")

    def cost(self, group: Group, spec: Spec, tokens: int = COST_TOKENS) -> Cost:
        (m2, n2), (r1, r2) = _parts(spec)
        m, n = group.shape
        m1, n3 = math.ceil(m / m2), n // n2
        core = m2 * r1 * n2 * r2
        # A look-up of A's rows costs nothing.
        per_token = n * r2 + core + (m1 * m2 * r1 if group.kind == "linear" else 0)
        return Cost(m1 * r1 + core + r2 * n3, 2 * tokens * per_token)

    def errors(self, group: Group, specs: Sequence[Spec], source: Source) -> list[float]:
        found: dict[Spec, float] = {}
        for blocks in {_parts(spec)[0] for spec in specs}:
            same = [spec for spec in specs if _parts(spec)[0] == blocks]
            tensor = _tensor(source.read(group.target), blocks)
            m1, joined, n3 = tensor.shape
            total = float(tensor.square().sum())
            left, values, _ = _svd(tensor.flatten(1), max(_parts(spec)[1][0] for spec in same))
            rest = left.T @ tensor.flatten(1)  # (largest r1, m2 n2 n3)
            for r1 in {_parts(spec)[1][0] for spec in same}:
                lost = total - float(values[:r1].square().sum())
                tail, right = linalg.leading(linalg.gram([rest[:r1].reshape(-1, n3)]), n3)
                # The train's own rows beyond the vocabulary are not there: their share is no error.
                padded = left[m1 - (-group.shape[0] % blocks[0]) :, :r1] @ rest[:r1]
                right = right.to(padded.dtype)
                beyond = (padded.unflatten(1, (joined, n3))[:, -blocks[1] :] @ right).square().sum((0, 1))
                for spec in (spec for spec in same if _parts(spec)[1][0] == r1):
                    r2 = _parts(spec)[1][1]
                    residual = max(0.0, lost) + float(tail[r2:].square().sum()) - float(beyond[:r2].sum())
                    found[spec] = math.sqrt(max(0.0, residual) / total) if total > 0 else 0.0
        return [found[spec] for spec in specs]

    def output_errors(self, group: Group, specs: Sequence[Spec], source: Source, statistics: Statistics) -> list[float]:
        """Of one spec exactly; of several an upper bound, about 2 % above it: with one round of alternation."""
        rounds = _ROUNDS if len(specs) == 1 else 1
        known = _seen(group.target, source, statistics)
        if known is None:
            return super().output_errors(group, specs, source, statistics)
        found: dict[Spec, float] = {}
        for blocks in {_parts(spec)[0] for spec in specs}:
            same = [spec for spec in specs if _parts(spec)[0] == blocks]
            svd = _shared_svd(max(_parts(spec)[1][0] for spec in same))
            found |= {spec: weighted.error(known.energy, _fit(known, spec, rounds, svd)[-1]) for spec in same}
        return [found[spec] for spec in specs]

    def factorise(
        self, group: Group, spec: Spec, source: Source, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        weight, name = source.read(group.target), group.target.name
        known = _seen(group.target, source, statistics)
        a, core, b = _balanced(*(_train(spec)(weight) if known is None else _fit(known, spec, _ROUNDS)[:3]))
        factors = {f"{name}.a": a, f"{name}.core": core, f"{name}.b": b}
        return {name: factor.to(weight.dtype).contiguous() for name, factor in factors.items()}

    def layers(self, group: Group, spec: Spec) -> dict[str, nn.Module]:
        target, (blocks, ranks) = group.target, _parts(spec)
        m, n = target.shape
        if target.kind == "embedding":
            return {target.name: TensorTrainEmbedding(m, n, blocks, ranks, target.padding_idx)}
        return {target.name: TensorTrainLinear(n, m, blocks, ranks, target.bias)}


def _seen(target: Target, source: Source, statistics: Statistics | None) -> Seen | SeenRows | None:
    """What calibration knows of a matrix; None if nothing."""
    moment, counts = moment_of(target, statistics), counts_of(target, statistics)
    if moment is not None:
        return weighted.seen(source.read(target), moment)
    return None if counts is None else weighted.seen_rows(source.read(target), counts)


def _fit(
    known: Seen | SeenRows, spec: Spec, rounds: int, svd: Svd | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """A (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) for the known inputs, and the energy that they capture."""
    blocks, train = _parts(spec)[0], _train(spec, svd)
    if isinstance(known, SeenRows):
        return weighted.tensor_train_rows(known, blocks, train, rounds)
    return weighted.tensor_train(known, blocks, train, rounds)


def _train(spec: Spec, svd: Svd | None = None) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The TT-SVD of matrices with a spec's blocks and ranks."""
    blocks, (r1, r2) = _parts(spec)

    def train(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            a, core, b = tensor_train(_tensor(matrix, blocks), rank=[1, r1, r2, 1], svd=svd or _svd).factors
        return a[0], core.unflatten(1, blocks).movedim(1, 0), b[..., 0]

    return train


def _shared_svd(largest: int) -> Svd:
    """``svd=`` for several trains of one matrix: the one at the first bond, the dearest, is found once, with the
    ``largest`` rank that any of them has there.
    """
    first: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}

    def svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not first:
            first[matrix.shape] = _svd(matrix, largest)
        if matrix.shape not in first:
            return _svd(matrix, n_eigenvecs)
        left, values, right = first[matrix.shape]
        return left[:, :n_eigenvecs], values[:n_eigenvecs], right[:n_eigenvecs]

    return svd


def _balanced(a: Tensor, core: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same train with the size of every rank shared evenly between both sides of its bond."""
    a, core, b = a.double(), core.double(), b.double()
    left, right = a.T @ a, b @ b.T
    after = torch.einsum("mpnq,qr,mpnr->p", core, right, core)  # of what follows rank p, squared
    before = torch.einsum("mpnq,pr,mrnq->q", core, left, core)
    first = (after * linalg.safe_inverse(left.diagonal())).clamp_min(0) ** 0.25
    second = (before * linalg.safe_inverse(right.diagonal())).clamp_min(0) ** 0.25
    core = core * linalg.safe_inverse(first)[:, None, None] * linalg.safe_inverse(second)
    return a * first, core, b * second[:, None]


def _parts(spec: Spec) -> tuple[Pair, Pair]:
    assert isinstance(spec, TensorTrainSpec)
    return spec.blocks, spec.ranks


def _empty_cores(m1: int, n3: int, blocks: Pair, ranks: Pair) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    (m2, n2), (r1, r2) = blocks, ranks
    shapes = ((m1, r1), (m2, r1, n2, r2), (r2, n3))
    a, core, b = (nn.Parameter(torch.empty(shape)) for shape in shapes)
    return a, core, b


def _through(x: Tensor, a: Tensor, core: Tensor, b: Tensor) -> Tensor:  # x: (..., n2 n3) -> (..., m2 m1)
    m2, r1, n2, r2 = core.shape
    inner = F.linear(x.unflatten(-1, (n2, -1)), b).flatten(-2)
    joined = F.linear(inner, core.reshape(m2 * r1, n2 * r2))
    return F.linear(joined.unflatten(-1, (m2, r1)), a).flatten(-2)


def _dense(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """W, (m2 m1, n2 n3)."""
    m2, _, n2, _ = core.shape
    right = core @ b  # (m2, r1, n2, n3)
    return torch.einsum("ip,mpnj->minj", a, right).reshape(m2 * len(a), n2 * b.shape[1])


def _tensor(weight: Tensor, blocks: Pair) -> Tensor:
    """The weight as a tensor (m1, m2 n2, n3), with rows of zeros at its end where m2 does not divide m."""
    m2, n2 = blocks
    m, n = weight.shape
    padded = F.pad(linalg.working(weight), (0, 0, 0, -m % m2))
    return padded.reshape(m2, -1, n2, n // n2).permute(1, 0, 2, 3).flatten(1, 2)


def _svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets through the Gram matrix of the short side, as tensorly's ``svd=`` takes it."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    values, right, images = linalg.truncated_svd(lambda: [tall], n_eigenvecs)
    left = (images.double() * linalg.safe_inverse(values)).to(images.dtype)  # 1e-40 has no inverse in 32 bits
    return (right, values, left.T) if wide else (left, values, right.T)


def _blocks(group: Group) -> list[Pair]:
    """(m2, n2) that are offered, preferred ones first; none where a side has no divisor above 1."""
    m, n = group.shape
    if group.kind == "embedding":
        return [(m2, n2 if n % n2 == 0 else 1) for m2, n2 in _EMBEDDING_BLOCKS if m > m2]
    pairs = [(m2, n2) for m2 in _divisors(m) for n2 in _divisors(n)]

    def preference(pair: Pair) -> tuple[float, int]:
        m2, n2 = pair
        return round(abs(math.log((m / m2) / (n / n2))), 3), m2 * n2

    return sorted(pairs, key=preference)[:1]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(2, number) if number % divisor == 0]


def _ranks_for(group: Group, blocks: Pair, parameters: int) -> Iterator[Pair]:
    """Ranks (r1, r2), about equal, that lead to about so many parameters."""
    (m, n), (m2, n2) = group.shape, blocks
    m1, n3 = math.ceil(m / m2), n // n2
    linear, square = m1 + n3, m2 * n2
    middle = (-linear + (linear**2 + 4 * square * max(0, parameters)) ** 0.5) / (2 * square)
    for r2 in {min(n3, max(1, round(middle) + shift)) for shift in (-1, 0, 1)}:
        r1 = max(1, round((parameters - n3 * r2) / (m1 + square * r2)))
        if r1 <= min(m1, square * r2) and r2 <= square * r1:
            yield r1, r2
