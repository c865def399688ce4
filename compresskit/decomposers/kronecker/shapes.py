"""Which shapes of Kronecker products are offered for a matrix, and what they cost."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from compresskit.decomposers import COST_TOKENS, MAX_FLOPS_RATIO, NEAR, Cost
from compresskit.decomposers.kronecker.contraction import contractions
from compresskit.decomposers.kronecker.spec import KroneckerSpec

#: Candidates per group and parameter count asked for.
_CANDIDATES = 12


class Shape(NamedTuple):
    """A way to split (m, n): A is (m1, n1), B is (m2, n2)."""

    m1: int
    n1: int
    m2: int
    n2: int

    @classmethod
    def of(cls, spec: KroneckerSpec) -> Shape:
        """The shape of a spec's products."""
        return cls(*spec.a, *spec.b)

    def spec(self, terms: int) -> KroneckerSpec:
        """So many products of this shape."""
        return KroneckerSpec(a=(self.m1, self.n1), b=(self.m2, self.n2), terms=terms)

    @property
    def per_term(self) -> int:
        """Parameters of one product."""
        return self.m1 * self.n1 + self.m2 * self.n2

    @property
    def a_is_long(self) -> bool:
        """Whether A has at least as many numbers as B."""
        return self.m1 * self.n1 >= self.m2 * self.n2

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
def splits(m: int, n: int, kind: str) -> list[Shape]:
    """Every split worth offering. Outer products and one-column embeddings are low rank under another name."""
    if kind == "embedding":
        return [Shape(m, n1, 1, n // n1) for n1 in _divisors(n) if 1 < n1 < n]
    every = [Shape(m1, n1, m // m1, n // n1) for m1 in _divisors(m) for n1 in _divisors(n)]
    return [s for s in every if not (s.m1 == s.n2 == 1 or s.n1 == s.m2 == 1) and s.max_terms > 1]


class _Candidate(NamedTuple):
    """A shape with a number of terms, and what decides whether it is offered."""

    shape: Shape
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
def candidates(m: int, n: int, kind: str, parameters: int, allow_slow: bool) -> tuple[KroneckerSpec, ...]:
    """The Pareto front of parameters and FLOPs around ``parameters``, preferred ones first."""
    wanted = max(parameters, 1)
    limit = math.inf if allow_slow else MAX_FLOPS_RATIO * 2 * COST_TOKENS * m * n
    best: dict[tuple[int, int], _Candidate] = {}
    for shape in splits(m, n, kind):
        largest = min(shape.max_terms, (m * n - 1) // shape.per_term)
        for terms in {min(largest, max(1, wanted // shape.per_term + step)) for step in (0, 1)} - {0}:
            if cost(kind, shape, terms).flops <= limit:
                found = _Candidate(shape, terms, terms * shape.per_term, _fewest_flops(kind, shape, terms))
                key = (found.parameters, terms)
                best[key] = min(best.get(key, found), found, key=_Candidate.preference)
    nearest = sorted(best.values(), key=lambda candidate: candidate.rank(wanted))
    if not allow_slow:
        nearest = [c for c in nearest if not any(_outclasses(other, c) for other in nearest)]
    return tuple(c.shape.spec(c.terms) for c in nearest[:_CANDIDATES])


def _outclasses(one: _Candidate, other: _Candidate) -> bool:
    """About as many parameters, at most half the FLOPs."""
    return 2 * one.flops <= other.flops and abs(math.log(one.parameters / other.parameters)) <= NEAR


def cost(kind: str, shape: Shape, terms: int, tokens: int = COST_TOKENS) -> Cost:
    """With the FLOPs of the way that runs, the one estimated fastest."""
    if kind == "embedding":  # the look-up costs nothing, the product with B does
        return Cost(terms * shape.per_term, 2 * tokens * shape.n1 * terms * shape.n2)
    return Cost(terms * shape.per_term, contractions(*shape, terms, tokens)[0].flops)


def _fewest_flops(kind: str, shape: Shape, terms: int) -> int:
    """What shapes are compared by: it depends on the shape alone, not on constants of a machine."""
    if kind == "embedding":
        return cost(kind, shape, terms).flops
    return min(way.flops for way in contractions(*shape, terms, COST_TOKENS))


def time(kind: str, shape: Shape, terms: int, tokens: int = COST_TOKENS) -> float:
    """Estimated time, in units of a large matrix product's FLOP."""
    if kind == "embedding":
        return float(cost(kind, shape, terms, tokens).flops)
    return contractions(*shape, terms, tokens)[0].cost
