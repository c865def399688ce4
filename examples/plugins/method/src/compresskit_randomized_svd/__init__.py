"""Low rank through a randomized SVD (Halko, Martinsson & Tropp 2011): a method of another package.

It computes like compresskit's low-rank method and differs in how the factors are found: W is multiplied with a few
random vectors, and only the space they span is decomposed. So it takes over the layers and the shapes, and replaces
the factorisation. A method with layers of its own defines those too: see compresskit/decomposers/low_rank.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compresskit.decomposers.base import Group, Options, Source, Spec, Statistics
from compresskit.decomposers.low_rank import LowRank, LowRankSpec

#: Random vectors beyond the rank, and multiplications with W W^T that make large singular values stand out.
OVERSAMPLING, POWER_ITERATIONS = 8, 2


class RandomizedSvdSpec(LowRankSpec):
    """As low-rank's; ``config.json`` says which method a spec belongs to."""

    method: Literal["randomized-svd"] = "randomized-svd"


class RandomizedSvd(LowRank):
    """Low rank from a random sketch of the matrix."""

    name = "randomized-svd"
    summary = "low rank through a randomized SVD: nearly as near, without an eigenvalue problem of full size"
    reference = "Halko, Martinsson & Tropp 2011"
    spec_type = RandomizedSvdSpec

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[Spec]:
        found = super().candidates(group, parameters, allow_slow=allow_slow)
        return [RandomizedSvdSpec(rank=spec.rank) for spec in found if isinstance(spec, LowRankSpec)]

    def resolve(self, group: Group, options: Options) -> Spec:
        spec = super().resolve(group, options)
        assert isinstance(spec, LowRankSpec)
        return RandomizedSvdSpec(rank=spec.rank)

    def errors(self, group: Group, specs: Sequence[Spec], source: Source) -> list[float]:
        weight = source.read(group.target).double()
        norm = weight.norm()
        if norm == 0:
            return [0.0] * len(specs)
        found = []
        for spec in specs:
            a, b = sketch(weight, spec)
            found.append(float((weight - a @ b).norm() / norm))
        return found

    def factorise(
        self, group: Group, spec: Spec, source: Source, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        weight = source.read(group.target)
        a, b = (factor.to(weight.dtype).contiguous() for factor in sketch(weight.double(), spec))
        return {f"{group.name}.a": a, f"{group.name}.b": b}


def sketch(weight: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Factors a (m, rank) and b (rank, n); the same ones at every call."""
    assert isinstance(spec, LowRankSpec)
    generator = torch.Generator().manual_seed(0)
    vectors = min(spec.rank + OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], vectors, generator=generator, dtype=weight.dtype)
    seen = weight @ start.to(weight.device)
    for _ in range(POWER_ITERATIONS):
        seen = weight @ (weight.T @ torch.linalg.qr(seen)[0])
    basis = torch.linalg.qr(seen)[0]
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    root = values[: spec.rank].sqrt()
    return basis @ left[:, : spec.rank] * root, root[:, None] * right[: spec.rank]
