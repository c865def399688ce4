"""Layers that compute with trains of three cores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import FactorisedEmbedding, FactorisedLinear, add_bias
from compresskit.decomposers.tensor_train.spec import Pair


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
