"""Low rank through a randomized SVD (Halko, Martinsson & Tropp 2011): a method of another package.

It computes like compresskit's low-rank method and differs in how the factors are found: W is multiplied with a few
random vectors, and only the space they span is decomposed. So it takes over the layers and the shapes, and replaces
the factorisation. A method with layers of its own defines those too: see compresskit/decomposers/low_rank.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.decomposers import Decomposer, Group, Statistics, WeightSource
from compresskit.decomposers.low_rank import LowRank, LowRankSpec

#: Random vectors beyond the rank, and multiplications with W W^T that make large singular values stand out.
OVERSAMPLING, POWER_ITERATIONS = 8, 2


class RandomizedSvd(LowRank):
    """Low rank from a random sketch of the matrix."""

    name = "randomized-svd"
    summary = "low rank through a randomized SVD: nearly as near, without an eigenvalue problem of full size"
    reference = "Halko, Martinsson & Tropp 2011"

    # Low rank reads errors from spectra; a sketch has none, so they are found by factorising, as for any method.
    errors = Decomposer.errors
    output_errors = Decomposer.output_errors

    def factorise(
        self, group: Group, spec: LowRankSpec, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        """The same factors with statistics and without."""
        weight = source.read(group.target)
        a, b = sketch(weight.double(), spec.rank)
        return {f"{group.name}.a": a.to(weight.dtype).contiguous(), f"{group.name}.b": b.to(weight.dtype).contiguous()}


def sketch(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors a (m, rank) and b (rank, n); the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    vectors = min(rank + OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], vectors, generator=generator, dtype=weight.dtype)
    seen = weight @ start.to(weight.device)
    for _ in range(POWER_ITERATIONS):
        seen = weight @ (weight.T @ torch.linalg.qr(seen)[0])
    basis = torch.linalg.qr(seen)[0]
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    root = values[:rank].sqrt()
    return basis @ left[:, :rank] * root, root[:, None] * right[:rank]
