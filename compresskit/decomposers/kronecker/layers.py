"""Layers that compute with sums of Kronecker products."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import COST_TOKENS, FactorisedEmbedding, FactorisedLinear, add_bias
from compresskit.decomposers.kronecker.contraction import contractions, multiply
from compresskit.decomposers.kronecker.spec import Pair


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
        return sum_of_products(self.a, self.b)

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


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """W' (m1 m2, n1 n2) of a (terms, m1, n1) and b (terms, m2, n2)."""
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    blocks = a.reshape(terms, m1 * n1).T @ b.reshape(terms, m2 * n2)
    return blocks.view(m1, n1, m2, n2).permute(0, 2, 1, 3).reshape(m1 * m2, n1 * n2)
