"""How to multiply by a sum of Kronecker products: which factor first, and in which layout.

With X = x.view(n1, n2) one term of y = (A (x) B) x is A X B^T. One of the two products runs as one large matrix product
(GEMM) over all tokens and rows. The other one works on the middle index of the data, would need a transposed copy for
that, and so runs as a batched product (bmm), one small matrix for each token, on data as they lie. Terms are stacked
so that their sum is part of the second product. What is cheapest depends on shapes and tokens: fewest FLOPs do not help
where rows are two numbers long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Order = Literal["a-first", "b-first", "form"]
Batched = Literal["a", "b", ""]

#: Costs in multiples of a large GEMM's time for one FLOP, measured on one x86 core with AVX-512: a number read or
#: written; one written by a transposing copy; one of a result whose rows are shorter than a vector; the call of one
#: small product in a batch; a number of a gradient that is summed over the batch. experiments/contraction.py measures
#: how often they pick the fastest way, and fits them anew.
_MOVE, _TRANSPOSE, _SHORT_RESULT, _CALL, _GRADIENT = 6, 40, 120, 5000, 30
#: A gradient for every token may be so many times as large as the token's input and output.
_ROOM = 4

#: Results above this many numbers are more than an allocator keeps: the system hands out new pages for them, which
#: costs so much for each number.
_LARGE, _PAGES = 8_000_000, 150

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
    batched: Batched
    flops: int
    cost: float


@lru_cache(maxsize=4096)
def contractions(
    m1: int, n1: int, m2: int, n2: int, terms: int, tokens: int, gradients: bool = False
) -> tuple[Contraction, ...]:
    """Every way, cheapest first. A is (m1, n1), B is (m2, n2); ``gradients``: with the backward pass."""
    m, n, t = m1 * m2, n1 * n2, terms
    a_first = 2 * tokens * t * m1 * n2 * (n1 + m2)
    b_first = 2 * tokens * t * n1 * m2 * (n2 + m1)
    between_a, between_b = _pages(tokens * t * m1 * n2), _pages(tokens * t * n1 * m2)
    turn_input, turn_output = _TRANSPOSE * tokens * n, _TRANSPOSE * tokens * m
    ways: list[tuple[Order, Batched, int, float, float]] = [
        ("a-first", "a", a_first, between_a, _bmm(tokens, t * m1, n1, n2) + _gemm(tokens * m1, t * n2, m2)),
        (
            "a-first",
            "b",
            a_first,
            between_a,
            turn_input + _gemm(tokens * n2, n1, t * m1) + _bmm(tokens, m1, t * n2, m2, long_columns=True),
        ),
        ("b-first", "a", b_first, between_b, _gemm(tokens * n1, n2, t * m2) + _bmm(tokens, m1, t * n1, m2)),
        (
            "b-first",
            "b",
            b_first,
            between_b,
            _bmm(tokens, t * m2, n2, n1) + _gemm(tokens * m2, t * n1, m1) + turn_output,
        ),
        (
            "form",
            "",
            2 * t * m * n + 2 * tokens * m * n,
            0.0,
            _gemm(m1 * n1, t, m2 * n2) + _TRANSPOSE * m * n + _gemm(tokens, n, m),
        ),
    ]
    found = [Contraction(order, batched, flops, pages + cost) for order, batched, flops, pages, cost in ways]
    if gradients:  # two more products of the same sizes, and a batched factor has a gradient for every token
        sizes: dict[Batched, int] = {"a": t * m1 * n1, "b": t * m2 * n2, "": 0}
        found = [
            c._replace(cost=3 * c.cost + _GRADIENT * tokens * sizes[c.batched])
            for c in found
            if sizes[c.batched] <= _ROOM * (m + n)
        ]
    return tuple(sorted(found, key=lambda contraction: contraction.cost))


def _pages(numbers: int) -> float:
    return float(_PAGES * numbers) if numbers > _LARGE else 0.0


def _gemm(rows: int, inner: int, columns: int) -> float:
    short = columns < _VECTOR
    arithmetic = 2 * rows * inner * columns * (_SHORT_FACTOR if short else 1)
    return arithmetic + rows * (_MOVE * inner + (_SHORT_RESULT if short else _MOVE) * columns)


def _bmm(batch: int, rows: int, inner: int, columns: int, *, long_columns: bool = False) -> float:
    arithmetic: float = 2 * rows * inner * columns
    if columns < _VECTOR:  # a kernel may run along long columns of the result instead, where its data lie that way
        arithmetic *= _SHORT_FACTOR if long_columns else 2.5 * _VECTOR / columns
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
    (terms, m1, n1), (_, m2, n2), tokens = (
        a.shape,
        b.shape,
        x.shape[0],
    )  # len(x) would fix the size of an exported graph
    if torch.is_autocast_enabled(x.device.type):  # autocast would convert what is expanded, once for each token
        a, b = (factor.to(torch.get_autocast_dtype(x.device.type)) for factor in (a, b))
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
