"""Kronecker factorisation: W (m, n) = sum over terms of A_t (m1, n1) (x) B_t (m/m1, n/n1).

As in KroneckerBERT (Tahaei et al. 2021, arXiv 2109.06243). Rearranged so that every block of W becomes a row,
R = W.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1*n1, m2*n2), the best rank-T approximation of R is the
nearest sum of T Kronecker products (Van Loan & Pitsianis 1993). The matrix itself is not stored.

Embeddings are factorised on the hidden side only, as in the paper: A (v, d/n) stays a look-up table, B is a row (1, n).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from compresskit.decomposers import (
    COST_TOKENS,
    Cost,
    Decomposer,
    Group,
    Statistics,
    WeightSource,
    counts_of,
    least_squares,
    linalg,
    moment_of,
)
from compresskit.decomposers.kronecker import fit, shapes
from compresskit.decomposers.kronecker.layers import KroneckerEmbedding, KroneckerLinear
from compresskit.decomposers.kronecker.shapes import Shape
from compresskit.decomposers.kronecker.spec import KroneckerOptions, KroneckerSpec
from compresskit.decomposers.registry import register
from compresskit.errors import InputError


@register
class Kronecker(Decomposer[KroneckerSpec, KroneckerOptions]):
    """Sums of Kronecker products."""

    name = "kronecker"
    summary = "sum of Kronecker products from the nearest-Kronecker-product SVD"
    reference = "Van Loan & Pitsianis 1993; KroneckerBERT, Tahaei et al. 2021"
    spec_type = KroneckerSpec
    options_type = KroneckerOptions
    gains_by_calibration = False  # docs/results.md: untrained students lose by it

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[KroneckerSpec]:
        return list(shapes.candidates(*group.shape, group.kind, parameters, allow_slow))

    def resolve(self, group: Group, options: KroneckerOptions) -> KroneckerSpec:
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

    def check(self, group: Group, spec: KroneckerSpec) -> None:
        shape, terms = Shape.of(spec), spec.terms
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

    def cost(self, group: Group, spec: KroneckerSpec, tokens: int = COST_TOKENS) -> Cost:
        return shapes.cost(group.kind, Shape.of(spec), spec.terms, tokens)

    def time(self, group: Group, spec: KroneckerSpec, tokens: int = COST_TOKENS) -> float:
        return shapes.time(group.kind, Shape.of(spec), spec.terms, tokens)

    def faster(self, group: Group, spec: KroneckerSpec) -> KroneckerSpec:
        """Among shapes with as many parameters, whose products can have at least the same rank."""
        shape, terms = Shape.of(spec), spec.terms
        alike = [
            s for s in shapes.splits(*group.shape, group.kind) if s.per_term == shape.per_term and s.max_terms >= terms
        ]
        twins = [shape, *(twin for twin in alike if twin.rank >= shape.rank)]
        return min(twins, key=lambda twin: shapes.time(group.kind, twin, terms)).spec(terms)

    def errors(self, group: Group, specs: Sequence[KroneckerSpec], source: WeightSource) -> list[float]:
        return self._tail_errors(group, specs, source, None)

    def _tail_errors(
        self, group: Group, specs: Sequence[KroneckerSpec], source: WeightSource, counts: Tensor | None
    ) -> list[float]:
        """Of the nearest products; of an embedding with rows weighted by ``counts``."""
        found: dict[KroneckerSpec, float] = {}
        for shape in {Shape.of(spec) for spec in specs}:
            same = [spec for spec in specs if Shape.of(spec) == shape]
            blocks = fit.blocks(source, group.target, shape, counts)
            found |= dict(zip(same, linalg.tail_errors(blocks, [spec.terms for spec in same]), strict=True))
        return [found[spec] for spec in specs]

    def output_errors(
        self, group: Group, specs: Sequence[KroneckerSpec], source: WeightSource, statistics: Statistics
    ) -> list[float]:
        """Of one spec exactly; of several an upper bound: with few rounds of alternation."""
        target, rounds = group.target, fit.ROUNDS if len(specs) == 1 else fit.FEW_ROUNDS
        moment = moment_of(target, statistics)
        if moment is not None:
            known = least_squares.seen(source.read(target), moment)
            fits = (fit.alternate(known, *fit.nearest(target, spec, source), rounds) for spec in specs)
            return [least_squares.error(known.energy, captured) for *_, captured in fits]
        return self._tail_errors(group, specs, source, counts_of(target, statistics))

    def factorise(
        self, group: Group, spec: KroneckerSpec, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        target = group.target
        a, b = fit.factors(target, spec, source, statistics)
        dtype = source.rows(target, 0, 1).dtype
        return {f"{target.name}.a": a.to(dtype).contiguous(), f"{target.name}.b": b.to(dtype).contiguous()}

    def layers(self, group: Group, spec: KroneckerSpec) -> dict[str, nn.Module]:
        target, shape, terms = group.target, Shape.of(spec), spec.terms
        if target.kind == "embedding":
            layer = KroneckerEmbedding(shape.m1, shape.n1, shape.n2, terms, target.padding_idx)
            return {target.name: layer}
        return {target.name: KroneckerLinear((shape.m1, shape.n1), (shape.m2, shape.n2), terms, target.bias)}
