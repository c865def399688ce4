"""What a factorised layer owes: it computes like ``nn.Linear`` or ``nn.Embedding``, and can be made one again."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from compresskit.decomposers.lazy import LazyWeight


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y + bias`` in y's dtype, as ``F.linear`` does it under autocast; into y itself where no gradient needs it."""
    if bias is None:
        return y
    bias = bias.to(y.dtype)
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


class SharedFactors(nn.Module):
    """Factors that several layers compute with. Mounted on the base model; the layers refer to it through ``__dict__``,
    unregistered, so that the factors are stored, counted and trained once.
    """


class FactorisedLayer(nn.Module, ABC):
    """What the linear and the embedding below have in common: W', (m, n), is computed from factors and never stored."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """W', multiplied out, (m, n)."""

    @property
    def weight(self) -> Tensor:
        """W', multiplied out anew wherever it is used: for code that reads a weight; it cannot be set."""
        return LazyWeight.of(self, self.weight_shape, self.dense_weight)

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def shared_factors(self) -> tuple[SharedFactors, ...]:
        """Modules outside the layer whose factors it computes with. Default: none."""
        return ()

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """An ordinary layer with the weight multiplied out, same dtype and device; it learns if a factor did."""

    def _product(self) -> nn.Parameter:
        """W' as a parameter of its own."""
        factors = [module.named_parameters() for module in (self, *self.shared_factors)]
        learns = any(factor.requires_grad for named in factors for name, factor in named if name != "bias")
        return nn.Parameter(self.dense_weight().detach().contiguous(), requires_grad=learns)


class FactorisedLinear(FactorisedLayer):
    """A linear layer computed from factors: y = x W'^T + bias, W' never stored.

    Args:
        in_features: n.
        out_features: m.
        bias: whether a bias parameter (m,) is held.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.out_features, self.in_features

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        ...

    def to_dense(self) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the weight multiplied out, same dtype, device and bias."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=False)
        dense.weight = self._product()
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FactorisedEmbedding(FactorisedLayer):
    """A word embedding computed from factors; also serves a tied output head through :meth:`project`.

    Args:
        num_embeddings: v.
        embedding_dim: d.
        padding_idx: row that gets no gradient through the look-up, as in ``nn.Embedding``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.num_embeddings, self.embedding_dim

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        ...

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        """``hidden`` times the transposed table, without forming the table."""

    def to_dense(self) -> nn.Embedding:
        """An ordinary ``nn.Embedding`` with the table multiplied out."""
        with torch.device("meta"):
            dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        dense.weight = self._product()
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


class TiedHead(nn.Module):
    """The output head of a masked-LM whose weight is tied to a factorised embedding: same factors, own bias.

    The embedding is referenced through ``__dict__``, not registered, so its factors are stored and counted once.
    """

    def __init__(self, embedding: FactorisedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        self.bias = bias

    @property
    def embedding(self) -> FactorisedEmbedding:
        """The embedding whose factors this head computes with."""
        found: FactorisedEmbedding = self.__dict__["embedding"]
        return found

    @property
    def weight(self) -> Tensor:
        """The embedding's table, multiplied out anew wherever it is used (some heads read it); it cannot be set."""
        return self.embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:  # hidden: (..., d) -> (..., v)
        logits = self.embedding.project(hidden)
        return logits if self.bias is None else logits + self.bias
