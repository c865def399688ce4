"""The nearest sum of Kronecker products, to the weight or, where inputs are known, to the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.decomposers import (
    Statistics,
    Target,
    WeightSource,
    counts_of,
    least_squares,
    linalg,
    moment_of,
    row_blocks,
)
from compresskit.decomposers.kronecker.shapes import Shape
from compresskit.decomposers.kronecker.spec import KroneckerSpec

#: Rounds of alternating least squares where inputs are known: after fifteen the error of real matrices falls by less
#: than 0.1 % a round. To compare shapes a few will do.
ROUNDS, FEW_ROUNDS = 15, 3

#: Unknowns up to which a factor's system is solved directly.
DIRECT = 1536


def factors(
    target: Target, spec: KroneckerSpec, source: WeightSource, statistics: Statistics | None
) -> tuple[Tensor, Tensor]:
    """A (terms, m1, n1) and b (terms, m2, n2); of an embedding a (v, n1, terms) and b (terms, n2)."""
    a, b = nearest(target, spec, source, counts_of(target, statistics))
    moment = moment_of(target, statistics)
    if moment is None:
        return a, b
    a, b, _ = alternate(least_squares.seen(source.read(target), moment), a, b, ROUNDS)
    return a, b


def nearest(
    target: Target, spec: KroneckerSpec, source: WeightSource, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest sum of Kronecker products; of an embedding with rows weighted by ``counts``.

    Shapes: as of :func:`factors`.
    """
    shape, terms = Shape.of(spec), spec.terms
    rows = blocks(source, target, shape)
    if counts is not None:
        vectors, images = least_squares.weighted_svd(rows, _row_weights(counts, shape), terms)
        values = torch.linalg.vector_norm(images, dim=0)
    else:
        values, vectors, images = linalg.truncated_svd(rows, terms)
    root = values.sqrt()  # each factor takes the square root of the singular value
    long, short = images * linalg.safe_inverse(root), vectors * root
    if target.kind == "embedding":
        return long.view(shape.m1, shape.n1, terms), short.T
    a, b = (long, short) if shape.a_is_long else (short, long)  # (m1*n1, terms), (m2*n2, terms)
    return a.T.reshape(terms, shape.m1, shape.n1), b.T.reshape(terms, shape.m2, shape.n2)


def blocks(source: WeightSource, target: Target, shape: Shape, counts: Tensor | None = None) -> linalg.Blocks:
    """The blocks of :func:`_tall_blocks`: a linear's are a rearranged copy, made once, an embedding's are views, or
    copies with rows weighted by ``counts``.
    """
    if target.kind == "embedding":
        if counts is None:
            return lambda: _tall_blocks(source, target, shape)
        weights = _row_weights(counts, shape)
        return lambda: linalg.scaled_rows(lambda: _tall_blocks(source, target, shape), weights)
    once = list(_tall_blocks(source, target, shape))
    return lambda: once


def _row_weights(counts: Tensor, shape: Shape) -> Tensor:
    """Of the rearranged rows of an embedding, (m n1,)."""
    return least_squares.row_weights(counts).repeat_interleave(shape.n1)


def _tall_blocks(source: WeightSource, target: Target, shape: Shape) -> Iterator[Tensor]:
    """The rearranged matrix R, (m1*n1, m2*n2) or its transpose, so that columns are the short side."""
    if target.kind == "embedding":
        for rows in row_blocks(source, target):
            yield rows.reshape(-1, shape.n2)
        return
    weight = source.read(target).view(shape.m1, shape.m2, shape.n1, shape.n2)
    rearranged = weight.permute(0, 2, 1, 3).reshape(shape.m1 * shape.n1, shape.m2 * shape.n2)
    yield rearranged if shape.a_is_long else rearranged.T


def alternate(
    known: least_squares.Seen, a: Tensor, b: Tensor, rounds: int, direct: int = DIRECT
) -> tuple[Tensor, Tensor, float]:
    """A sum of Kronecker products from a start by alternating least squares; never worse than the start.

    Args:
        known: of W (m1 m2, n1 n2).
        a: (terms, m1, n1), the start.
        b: (terms, m2, n2), the start.
        rounds: of alternation.
        direct: unknowns up to which a factor's system is solved directly, not by conjugate gradients.

    Returns:
        Both factors, and how much of ``known.energy`` their sum captures.
    """
    a, b = a.double(), b.double()
    problem = _rearranged(known, a, b)
    for _ in range(rounds):
        a, _ = _factor(problem, a, b, direct)
        b, captured = _factor(problem.mirrored(), b, a, direct)
    sizes = [torch.linalg.vector_norm(factor, dim=(1, 2)) for factor in (a, b)]
    share = (sizes[1] * linalg.safe_inverse(sizes[0])).sqrt()[:, None, None]
    return a * share, b * linalg.safe_inverse(share), captured


class _Problem(NamedTuple):
    """:class:`~.least_squares.Seen`, its numbers in the order in which a sum of Kronecker products is a product of two
    matrices, a^T (m1 n1, terms) and b (terms, m2 n2).

    Attributes:
        weight: (m1 n1, m2 n2).
        product: (m1 n1, m2 n2).
        moment: (n1 n1, n2 n2).
    """

    weight: Tensor
    product: Tensor
    moment: Tensor

    def mirrored(self) -> _Problem:
        """The problem of the other factor."""
        return _Problem(*(matrix.T for matrix in self))


def _rearranged(known: least_squares.Seen, a: Tensor, b: Tensor) -> _Problem:
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape

    def blocks(matrix: Tensor, rows: tuple[int, int]) -> Tensor:
        return matrix.view(*rows, n1, n2).transpose(1, 2).reshape(rows[0] * n1, rows[1] * n2)

    weight, product = blocks(known.weight, (m1, m2)), blocks(known.product, (m1, m2))
    return _Problem(weight, product, blocks(known.moment, (n1, n2)))


def _factor(problem: _Problem, a: Tensor, b: Tensor, direct: int) -> tuple[Tensor, float]:
    """The least-squares a (terms, m1, n1) beside b (terms, m2, n2), and the energy that both capture."""
    (terms, m1, n1), n2 = a.shape, b.shape[2]
    seen = problem.product @ b.flatten(1).T  # (m1 n1, terms)
    if n2 == 1:  # S cancels: every column of a has the system of the b alone
        gram = torch.einsum("sij,tij->st", b, b)
        found = least_squares.solve(gram, problem.weight @ b.flatten(1).T)
        return found.T.reshape(a.shape), float((seen * found).sum())
    right = seen.view(m1, n1, terms).transpose(1, 2)
    if terms * n1 > direct:
        s = problem.moment.reshape(n1, n1, n2, n2).transpose(1, 2).reshape(n1 * n2, n1 * n2)
        found, residual = least_squares.conjugate_gradients(
            lambda x: _seen_by(b, x, s), right, a.transpose(0, 1), dims=(0, 1, 2)
        )
        return found.transpose(0, 1), float(((right + residual) * found).sum())
    # Rows of all a_t side by side, (m1, t k1), solve one system.
    gram = torch.einsum("sij,tik->jkst", b, b).flatten(0, 1).flatten(1)
    system = (problem.moment @ gram).view(n1, n1, terms, terms).permute(2, 0, 3, 1).reshape(terms * n1, terms * n1)
    found = least_squares.solve(system, right.flatten(1))
    return found.view(m1, terms, n1).transpose(0, 1), float((right.flatten(1) * found).sum())


def _seen_by(b: Tensor, a: Tensor, moment: Tensor) -> Tensor:
    """What the system of a factor makes of a (m1, terms, n1), without being formed."""
    (m1, _, n1), (_, m2, n2) = a.shape, b.shape
    made = torch.einsum("ita,tjb->ijab", a, b).reshape(m1 * m2, n1 * n2) @ moment
    return torch.einsum("ijab,tjb->ita", made.view(m1, m2, n1, n2), b)
