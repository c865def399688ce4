"""Kronecker factorisation: W (m, n) = sum over terms of A_t (m1, n1) (x) B_t (m/m1, n/n1).

As in KroneckerBERT (Tahaei et al. 2021, arXiv 2109.06243). Rearranged so that every block of W becomes a row,
R = W.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1*n1, m2*n2), the best rank-T approximation of R is the
nearest sum of T Kronecker products (Van Loan & Pitsianis 1993). The matrix itself is not stored.

Embeddings are factorised on the hidden side only, as in the paper: A (v, d/n) stays a look-up table, B is a row (1, n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import linalg, weighted
from compresskit.decomposers.base import (
    COST_TOKENS,
    MAX_FLOPS_RATIO,
    NEAR,
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
    output_error,
    row_blocks,
)
from compresskit.decomposers.contraction import contractions, multiply
from compresskit.decomposers.registry import register
from compresskit.errors import InputError

Size = Annotated[int, Field(ge=1)]
Pair = tuple[Size, Size]

#: Candidates per group and parameter count asked for.
_CANDIDATES = 12


#: Rounds of alternating least squares where inputs are known: after fifteen the error of real matrices falls by less
#: than 0.1 % a round. To compare shapes a few will do.
_ROUNDS, _FEW_ROUNDS = 15, 3


class KroneckerSpec(Spec):
    """W (m, n) = sum over ``terms`` of A (a[0], a[1]) (x) B (b[0], b[1]), with a[0]*b[0] = m and a[1]*b[1] = n."""

    method: Literal["kronecker"] = "kronecker"
    a: Pair
    b: Pair
    terms: Size = 1

    def describe(self) -> str:
        text = f"{self.a[0]}x{self.a[1]} (x) {self.b[0]}x{self.b[1]}"
        return text if self.terms == 1 else f"{self.terms} of {text}"


class KroneckerOptions(Options):
    """Recipe options: one factor's shape (``a`` or ``b``, or ``n`` for a row B); the other follows by division.

    Attributes:
        a: rows and columns of A.
        b: rows and columns of B.
        n: columns of a B with one row, as for embeddings.
        terms: products that are summed.
        swap_for_output: transpose the given shape for matrices with fewer rows than columns (the second FFN linear), as
            the paper does.
    """

    a: Pair | None = None
    b: Pair | None = None
    n: Size | None = None
    terms: Size = 1
    swap_for_output: bool = False

    @model_validator(mode="after")
    def _some_factor(self) -> KroneckerOptions:
        if self.n is not None and (self.a or self.b):
            raise ValueError("n means b: [1, n]; give n, or a and b")
        if self.n is None and not (self.a or self.b):
            raise ValueError("give a, b or n; the other factor follows by division")
        return self


class KroneckerLinear(FactorisedLinear):
    """y = x W'^T + bias with a: (terms, m1, n1), b: (terms, m2, n2).

    Which factor comes first, and in which layout, is decided for each number of tokens (:mod:`.contraction`).
    """

    def __init__(self, a: Pair, b: Pair, terms: int, bias: bool) -> None:
        super().__init__(a[1] * b[1], a[0] * b[0], bias)
        self.a = nn.Parameter(torch.empty(terms, *a))
        self.b = nn.Parameter(torch.empty(terms, *b))
        self._fixed_ways = [contractions(*a, *b, terms, COST_TOKENS, gradients)[0] for gradients in (False, True)]

    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        (terms, m1, n1), (_, m2, n2) = self.a.shape, self.b.shape
        gradients = torch.is_grad_enabled() and self.a.requires_grad
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph serves any number of tokens
            way = self._fixed_ways[gradients]
        else:
            way = contractions(m1, n1, m2, n2, terms, x.shape[:-1].numel(), gradients)[0]
        if way.order == "form":
            return F.linear(x, self.dense_weight(), self.bias)
        y = multiply(x.reshape(-1, n1 * n2), self.a, self.b, way).view(*x.shape[:-1], m1 * m2)
        return add_bias(y, self.bias)

    def dense_weight(self) -> Tensor:
        return _dense(self.a, self.b)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, a={tuple(self.a.shape)}, b={tuple(self.b.shape)}"


class KroneckerEmbedding(FactorisedEmbedding):
    """Row i = sum over terms of a_i (x) b, with a: (v, n1, terms), kept as the look-up table, and b: (terms, n2)."""

    def __init__(self, v: int, n1: int, n2: int, terms: int, padding_idx: int | None) -> None:
        super().__init__(v, n1 * n2, padding_idx)
        self.a = nn.Parameter(torch.empty(v, n1, terms))
        self.b = nn.Parameter(torch.empty(terms, n2))

    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        v, n1, terms = self.a.shape
        rows = F.embedding(ids, self.a.view(v, n1 * terms), self.padding_idx)
        return F.linear(rows.view(*ids.shape, n1, terms), self.b.T).flatten(-2)

    def project(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        v, n1, terms = self.a.shape
        y = F.linear(hidden.unflatten(-1, (n1, self.b.shape[1])), self.b).flatten(-2)
        return F.linear(y, self.a.view(v, n1 * terms))

    def dense_weight(self) -> Tensor:
        return (self.a @ self.b).flatten(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, a={tuple(self.a.shape)}, b={tuple(self.b.shape)}"


class _Shape(NamedTuple):
    """A way to split (m, n): A is (m1, n1), B is (m2, n2)."""

    m1: int
    n1: int
    m2: int
    n2: int

    @property
    def per_term(self) -> int:
        return self.m1 * self.n1 + self.m2 * self.n2

    @property
    def rank(self) -> int:
        """The highest rank of one product."""
        return min(self.m1, self.n1) * min(self.m2, self.n2)

    @property
    def max_terms(self) -> int:
        """The rank of the rearranged matrix: more terms add nothing."""
        return min(self.m1 * self.n1, self.m2 * self.n2)


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


@cache
def _shapes(m: int, n: int, kind: str) -> list[_Shape]:
    """Every split worth offering. Outer products and one-column embeddings are low rank under another name."""
    if kind == "embedding":
        return [_Shape(m, n1, 1, n // n1) for n1 in _divisors(n) if 1 < n1 < n]
    shapes = [_Shape(m1, n1, m // m1, n // n1) for m1 in _divisors(m) for n1 in _divisors(n)]
    return [s for s in shapes if not (s.m1 == s.n2 == 1 or s.n1 == s.m2 == 1) and s.max_terms > 1]


@register
class Kronecker(Decomposer):
    """Sums of Kronecker products."""

    name = "kronecker"
    summary = "sum of Kronecker products from the nearest-Kronecker-product SVD"
    reference = "Van Loan & Pitsianis 1993; KroneckerBERT, Tahaei et al. 2021"
    spec_type = KroneckerSpec
    options_type = KroneckerOptions

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[Spec]:
        return list(_candidates(*group.shape, group.kind, parameters, allow_slow))

    def resolve(self, group: Group, options: Options) -> Spec:
        assert isinstance(options, KroneckerOptions)
        m, n = group.shape
        a, b = options.a, (1, options.n) if options.n is not None else options.b
        if options.swap_for_output and m < n:
            a, b = a and (a[1], a[0]), b and (b[1], b[0])
        for given in (a, b):
            if given is not None and (m % given[0] or n % given[1]):
                raise InputError(
                    f"kronecker for {group.name} ({m}x{n}): a factor {given[0]}x{given[1]} does not divide it"
                )
        if a is None:
            assert b is not None  # KroneckerOptions sees to it
            a = (m // b[0], n // b[1])
        b = b or (m // a[0], n // a[1])
        spec = KroneckerSpec(a=a, b=b, terms=options.terms)
        self.check(group, spec)
        return spec

    def check(self, group: Group, spec: Spec) -> None:
        shape, terms = _shape(spec), _terms(spec)
        m, n = group.shape
        where = f"kronecker for {group.name} ({m}x{n}): {spec.describe()}"
        if (shape.m1 * shape.m2, shape.n1 * shape.n2) != (m, n):
            raise InputError(f"{where} multiplies to {shape.m1 * shape.m2}x{shape.n1 * shape.n2}")
        if group.kind == "embedding" and shape.m2 != 1:
            raise InputError(f"{where}: an embedding is factorised on the hidden side only, B must be a row (1, n)")
        if terms * shape.per_term >= m * n:
            raise InputError(f"{where} has {terms * shape.per_term:,} parameters, no fewer than the dense {m * n:,}")
        if terms > shape.max_terms:
            raise InputError(f"{where}: more than {shape.max_terms} terms of this shape add nothing")

    def cost(self, group: Group, spec: Spec, tokens: int = COST_TOKENS) -> Cost:
        return _cost(group.kind, _shape(spec), _terms(spec), tokens)

    def time(self, group: Group, spec: Spec, tokens: int = COST_TOKENS) -> float:
        return _time(group.kind, _shape(spec), _terms(spec), tokens)

    def faster(self, group: Group, spec: Spec) -> Spec:
        """Among shapes with as many parameters, whose products can have at least the same rank."""
        shape, terms = _shape(spec), _terms(spec)
        alike = [s for s in _shapes(*group.shape, group.kind) if s.per_term == shape.per_term and s.max_terms >= terms]
        twins = [shape, *(twin for twin in alike if twin.rank >= shape.rank)]
        return _spec(min(twins, key=lambda twin: _time(group.kind, twin, terms)), terms)

    def errors(self, group: Group, specs: Sequence[Spec], source: Source) -> list[float]:
        found: dict[Spec, float] = {}
        for shape in {_shape(spec) for spec in specs}:
            same = [spec for spec in specs if _shape(spec) == shape]
            blocks = _blocks(source, group.target, shape)
            found |= dict(zip(same, linalg.tail_errors(blocks, [_terms(spec) for spec in same]), strict=True))
        return [found[spec] for spec in specs]

    def output_errors(self, group: Group, specs: Sequence[Spec], source: Source, statistics: Statistics) -> list[float]:
        """Of one spec exactly; of several an upper bound: with few rounds of alternation."""
        target, rounds = group.target, _ROUNDS if len(specs) == 1 else _FEW_ROUNDS
        moment = moment_of(target, statistics)
        if moment is not None:
            known = weighted.seen(source.read(target), moment)
            fits = (weighted.kronecker(known, *_nearest(target, spec, source), rounds) for spec in specs)
            return [weighted.error(known.energy, captured) for *_, captured in fits]
        pairs = (_factors(target, spec, source, statistics) for spec in specs)
        every = ((a @ b).flatten(1) if target.kind == "embedding" else _dense(a, b) for a, b in pairs)
        return [output_error([(target, source.read(target), made)], statistics) for made in every]

    def factorise(
        self, group: Group, spec: Spec, source: Source, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        target = group.target
        a, b = _factors(target, spec, source, statistics)
        dtype = source.rows(target, 0, 1).dtype
        return {f"{target.name}.a": a.to(dtype).contiguous(), f"{target.name}.b": b.to(dtype).contiguous()}

    def layers(self, group: Group, spec: Spec) -> dict[str, nn.Module]:
        target, shape, terms = group.target, _shape(spec), _terms(spec)
        if target.kind == "embedding":
            layer = KroneckerEmbedding(shape.m1, shape.n1, shape.n2, terms, target.padding_idx)
            return {target.name: layer}
        return {target.name: KroneckerLinear((shape.m1, shape.n1), (shape.m2, shape.n2), terms, target.bias)}


def _factors(target: Target, spec: Spec, source: Source, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
    """A (terms, m1, n1) and b (terms, m2, n2); of an embedding a (v, n1, terms) and b (terms, n2)."""
    a, b = _nearest(target, spec, source, counts_of(target, statistics))
    moment = moment_of(target, statistics)
    if moment is None:
        return a, b
    a, b, _ = weighted.kronecker(weighted.seen(source.read(target), moment), a, b, _ROUNDS)
    return a, b


def _nearest(target: Target, spec: Spec, source: Source, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest sum of Kronecker products; of an embedding with rows weighted by ``counts``. Shapes as above."""
    shape, terms = _shape(spec), _terms(spec)
    blocks = _blocks(source, target, shape)
    if counts is not None:
        vectors, images = weighted.rows(blocks, weighted.row_weights(counts).repeat_interleave(shape.n1), terms)
        values = torch.linalg.vector_norm(images, dim=0)
    else:
        values, vectors, images = linalg.truncated_svd(blocks, terms)
    root = values.sqrt()  # each factor takes the square root of the singular value
    long, short = images * linalg.safe_inverse(root), vectors * root
    if target.kind == "embedding":
        return long.view(shape.m1, shape.n1, terms), short.T
    a, b = (long, short) if _a_is_long(shape) else (short, long)  # (m1*n1, terms), (m2*n2, terms)
    return a.T.reshape(terms, shape.m1, shape.n1), b.T.reshape(terms, shape.m2, shape.n2)


def _dense(a: Tensor, b: Tensor) -> Tensor:
    """W' (m1 m2, n1 n2) of a (terms, m1, n1) and b (terms, m2, n2)."""
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    blocks = a.reshape(terms, m1 * n1).T @ b.reshape(terms, m2 * n2)
    return blocks.view(m1, n1, m2, n2).permute(0, 2, 1, 3).reshape(m1 * m2, n1 * n2)


class _Candidate(NamedTuple):
    """A shape with a number of terms, and what decides whether it is offered."""

    shape: _Shape
    terms: int
    parameters: int
    flops: int

    def preference(self) -> tuple[Any, ...]:
        """Smallest first, among equally large ones with as many terms: fewest uses of each parameter (FLOPs), highest
        rank that the product can have, large factor first, whole rows before shared ones.

        One-shot errors of such shapes hardly differ; how they train does (reports/minilm-kronecker-shapes).
        """
        uses = round(self.flops / (2 * COST_TOKENS * self.parameters))
        return uses, -self.shape.rank, -self.shape.m1 * self.shape.n1, self.shape.n2

    def rank(self, wanted: int) -> tuple[int, int, float]:
        """Smallest first: a step of NEAR away from the wanted parameters weighs as much as doubling the terms."""
        distance = abs(math.log(self.parameters / wanted))
        return int(distance / NEAR) + (self.terms - 1).bit_length(), self.terms, distance


@cache
def _candidates(m: int, n: int, kind: str, parameters: int, allow_slow: bool) -> tuple[KroneckerSpec, ...]:
    """The Pareto front of parameters and FLOPs around ``parameters``, preferred ones first."""
    wanted = max(parameters, 1)
    limit = math.inf if allow_slow else MAX_FLOPS_RATIO * 2 * COST_TOKENS * m * n
    best: dict[tuple[int, int], _Candidate] = {}
    for shape in _shapes(m, n, kind):
        largest = min(shape.max_terms, (m * n - 1) // shape.per_term)
        for terms in {min(largest, max(1, wanted // shape.per_term + step)) for step in (0, 1)} - {0}:
            if _cost(kind, shape, terms).flops <= limit:
                found = _Candidate(shape, terms, terms * shape.per_term, _fewest_flops(kind, shape, terms))
                key = (found.parameters, terms)
                best[key] = min(best.get(key, found), found, key=_Candidate.preference)
    nearest = sorted(best.values(), key=lambda candidate: candidate.rank(wanted))
    if not allow_slow:
        nearest = [c for c in nearest if not any(_outclasses(other, c) for other in nearest)]
    return tuple(_spec(c.shape, c.terms) for c in nearest[:_CANDIDATES])


def _outclasses(one: _Candidate, other: _Candidate) -> bool:
    """About as many parameters, at most half the FLOPs."""
    return 2 * one.flops <= other.flops and abs(math.log(one.parameters / other.parameters)) <= NEAR


def _shape(spec: Spec) -> _Shape:
    assert isinstance(spec, KroneckerSpec)
    return _Shape(*spec.a, *spec.b)


def _terms(spec: Spec) -> int:
    assert isinstance(spec, KroneckerSpec)
    return spec.terms


def _spec(shape: _Shape, terms: int) -> KroneckerSpec:
    return KroneckerSpec(a=(shape.m1, shape.n1), b=(shape.m2, shape.n2), terms=terms)


def _cost(kind: str, shape: _Shape, terms: int, tokens: int = COST_TOKENS) -> Cost:
    """With the FLOPs of the way that runs, the one estimated fastest."""
    if kind == "embedding":  # the look-up costs nothing, the product with B does
        return Cost(terms * shape.per_term, 2 * tokens * shape.n1 * terms * shape.n2)
    return Cost(terms * shape.per_term, contractions(*shape, terms, tokens)[0].flops)


def _fewest_flops(kind: str, shape: _Shape, terms: int) -> int:
    """What shapes are compared by: it depends on the shape alone, not on constants of a machine."""
    if kind == "embedding":
        return _cost(kind, shape, terms).flops
    return min(way.flops for way in contractions(*shape, terms, COST_TOKENS))


def _time(kind: str, shape: _Shape, terms: int, tokens: int = COST_TOKENS) -> float:
    if kind == "embedding":
        return float(_cost(kind, shape, terms, tokens).flops)
    return contractions(*shape, terms, tokens)[0].cost


def _a_is_long(shape: _Shape) -> bool:
    return shape.m1 * shape.n1 >= shape.m2 * shape.n2


def _blocks(source: Source, target: Target, shape: _Shape) -> linalg.Blocks:
    """The blocks of :func:`_tall_blocks`: a linear's are a rearranged copy, made once, an embedding's are views."""
    if target.kind == "embedding":
        return lambda: _tall_blocks(source, target, shape)
    once = list(_tall_blocks(source, target, shape))
    return lambda: once


def _tall_blocks(source: Source, target: Target, shape: _Shape) -> Iterator[Tensor]:
    """The rearranged matrix R, (m1*n1, m2*n2) or its transpose, so that columns are the short side."""
    if target.kind == "embedding":
        for rows in row_blocks(source, target):
            yield rows.reshape(-1, shape.n2)
        return
    weight = source.read(target).view(shape.m1, shape.m2, shape.n1, shape.n2)
    rearranged = weight.permute(0, 2, 1, 3).reshape(shape.m1 * shape.n1, shape.m2 * shape.n2)
    yield rearranged if _a_is_long(shape) else rearranged.T
