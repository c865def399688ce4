"""How to multiply by a sum of Kronecker products: which factor first, and in which layout.

With X = x.view(n1, n2) one term of y = (A (x) B) x is A X B^T. One of the two products runs as one large matrix product
(GEMM) over all tokens and rows. The other one works on the middle index of the data, would need a transposed copy for
that, and so runs as a batched product (bmm), one small matrix for each token, on data as they lie. Terms are stacked
so that their sum is part of the second product. What is cheapest depends on shapes and tokens: fewest FLOPs do not help
where rows are two numbers long.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Order = Literal["a-first", "b-first", "form"]

#: Costs in multiples of a large GEMM's time for one FLOP, measured on one x86 core with AVX-512: a number read or
#: written; one written by a transposing copy; one of a result whose rows are shorter than a vector; the call of one
#: small product in a batch; a number of a gradient that is summed over the batch.
_MOVE, _TRANSPOSE, _SHORT_RESULT, _CALL, _GRADIENT = 6, 40, 120, 5000, 30
#: How much slower arithmetic on short rows is.
_SHORT_FACTOR = 3
#: Floats in a vector register.
_VECTOR = 16


class Contraction(NamedTuple):
    """One way to multiply by a sum of Kronecker products.

    Attributes:
        order: which factor multiplies first; ``form`` multiplies by the dense matrix.
        batched: the factor that is applied token by token; the other one is one GEMM. Nothing for ``form``.
        flops: 2 x multiply-adds.
        cost: estimated time, in units of a large GEMM's FLOP.
    """

    order: Order
    batched: Literal["a", "b", ""]
    flops: int
    cost: float


@cache
def contractions(
    m1: int, n1: int, m2: int, n2: int, terms: int, tokens: int, gradients: bool = False
) -> tuple[Contraction, ...]:
    """Every way, cheapest first. A is (m1, n1), B is (m2, n2); ``gradients``: with the backward pass."""
    m, n, t = m1 * m2, n1 * n2, terms
    a_first = 2 * tokens * t * m1 * n2 * (n1 + m2)
    b_first = 2 * tokens * t * n1 * m2 * (n2 + m1)
    # Rows of the result of a bmm that reads its data transposed are as long as B's side; else as the other factor's.
    found = [
        Contraction("a-first", "a", a_first, _bmm(tokens, t * m1, n1, n2) + _gemm(tokens * m1, t * n2, m2)),
        Contraction(
            "a-first",
            "b",
            a_first,
            _TRANSPOSE * tokens * n + _gemm(tokens * n2, n1, t * m1) + _bmm(tokens, m1, t * n2, m2, transposed=True),
        ),
        Contraction("b-first", "a", b_first, _gemm(tokens * n1, n2, t * m2) + _bmm(tokens, m1, t * n1, m2)),
        Contraction(
            "b-first",
            "b",
            b_first,
            _bmm(tokens, t * m2, n2, n1) + _gemm(tokens * m2, t * n1, m1) + _TRANSPOSE * tokens * m,
        ),
        Contraction(
            "form",
            "",
            2 * t * m * n + 2 * tokens * m * n,
            _gemm(m1 * n1, t, m2 * n2) + _TRANSPOSE * m * n + _gemm(tokens, n, m),
        ),
    ]
    if gradients:  # two more products of the same sizes, and a batched factor has a gradient for every token
        sizes = {"a": t * m1 * n1, "b": t * m2 * n2, "": 0}
        found = [c._replace(cost=3 * c.cost + _GRADIENT * tokens * sizes[c.batched]) for c in found]
    return tuple(sorted(found, key=lambda contraction: contraction.cost))


def _gemm(rows: int, inner: int, columns: int) -> float:
    short = columns < _VECTOR
    arithmetic = 2 * rows * inner * columns * (_SHORT_FACTOR if short else 1)
    return arithmetic + rows * (_MOVE * inner + (_SHORT_RESULT if short else _MOVE) * columns)


def _bmm(batch: int, rows: int, inner: int, columns: int, *, transposed: bool = False) -> float:
    arithmetic: float = 2 * rows * inner * columns
    if columns < _VECTOR:  # of a transposed product the long columns are vectors too
        arithmetic *= _SHORT_FACTOR if transposed else 40 / columns
    per_result = _SHORT_RESULT if columns < _VECTOR else 2 * _MOVE
    return batch * (_CALL + arithmetic + 2 * _MOVE * inner * columns + per_result * rows * columns)


def multiply(x: Tensor, a: Tensor, b: Tensor, contraction: Contraction) -> Tensor:
    """Sum over terms of (A_t (x) B_t) x for every row x.

    Args:
        x: (tokens, n1 * n2).
        a: (terms, m1, n1).
        b: (terms, m2, n2).
        contraction: one of :func:`contractions`, not ``form``.

    Returns:
        (tokens, m1 * m2).
    """
    (terms, m1, n1), (_, m2, n2), tokens = a.shape, b.shape, len(x)
    x = x.reshape(tokens, n1, n2)
    # Batches are spelt out: torch.matmul would copy where gradients are needed.
    if contraction.order == "a-first":
        if contraction.batched == "a":
            y = torch.bmm(_batch(a.transpose(0, 1).reshape(m1 * terms, n1), tokens), x)
            y = F.linear(y.view(tokens * m1, terms * n2), b.transpose(0, 1).reshape(m2, terms * n2))
        else:
            y = F.linear(x.transpose(1, 2).reshape(tokens * n2, n1), a.reshape(terms * m1, n1))
            stacked = b.permute(2, 0, 1).reshape(n2 * terms, m2)
            y = torch.bmm(y.view(tokens, n2 * terms, m1).transpose(1, 2), _batch(stacked, tokens))
    elif contraction.batched == "a":
        y = F.linear(x.reshape(tokens * n1, n2), b.reshape(terms * m2, n2))
        stacked = a.permute(1, 2, 0).reshape(m1, n1 * terms)
        y = torch.bmm(_batch(stacked, tokens), y.view(tokens, n1 * terms, m2))
    else:
        y = torch.bmm(_batch(b.transpose(0, 1).reshape(m2 * terms, n2), tokens), x.transpose(1, 2))
        y = F.linear(y.view(tokens * m2, terms * n1), a.transpose(0, 1).reshape(m1, terms * n1))
        y = y.view(tokens, m2, m1).transpose(1, 2)
    return y.reshape(tokens, m1 * m2)


def _batch(matrix: Tensor, size: int) -> Tensor:
    return matrix.expand(size, *matrix.shape)
