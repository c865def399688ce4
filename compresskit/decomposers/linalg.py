"""Leading singular values and vectors of tall matrices, through the Gram matrix of the short side.

For a tall matrix R (rows x k, k the short side) the eigenvalues of R^T R are the squared singular values and its
eigenvectors the right singular vectors. Only a k x k problem is solved, in double precision, so the truncation
error is that of a full SVD, and R itself may arrive in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """R^T R in float64.

    Args:
        blocks: row blocks of R, each (rows, k), any float dtype.

    Returns:
        (k, k) float64, on the blocks' device.
    """
    total: Tensor | None = None
    for block in blocks:
        block = block.double()
        part = block.T @ block
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("gram needs at least one block")
    return total


def spectrum(gram_matrix: Tensor) -> np.ndarray:
    """All eigenvalues of a Gram matrix, largest first: the squared singular values. Shape (k,)."""
    values = _eigh(gram_matrix, eigvals_only=True)
    return np.clip(values[::-1], 0.0, None)


def leading(gram_matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest singular values and their right singular vectors, from a (k, k) Gram matrix.

    Returns:
        (singular values (count,) largest first, vectors (k, count)), float64, on the Gram matrix's device.
    """
    k = gram_matrix.shape[0]
    values, vectors = _eigh(gram_matrix, subset_by_index=[k - count, k - 1])
    values = np.sqrt(np.clip(values[::-1], 0.0, None))
    vectors = vectors[:, ::-1].copy()
    device = gram_matrix.device
    return torch.from_numpy(values).to(device), torch.from_numpy(vectors).to(device)


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _eigh(gram_matrix: Tensor, **kwargs: Any) -> Any:
    # One thread: these problems are small, and scipy's threads beside torch's made them 10 times slower on a busy
    # machine. It also makes the result independent of the number of threads.
    with _threads().limit(limits=1, user_api="blas"):
        return scipy.linalg.eigh(gram_matrix.cpu().numpy(), check_finite=False, **kwargs)


def tail_errors(squared_singular_values: np.ndarray, counts: Iterable[int]) -> list[float]:
    """Relative Frobenius error of keeping the first ``count`` singular values, one figure per count.

    The squared residual is the sum of the squared singular values left out (Eckart & Young 1936).
    """
    tails = np.concatenate([np.cumsum(squared_singular_values[::-1])[::-1], [0.0]])
    total = tails[0]
    return [float(np.sqrt(tails[count] / total)) if total > 0 else 0.0 for count in counts]


def safe_inverse(values: Tensor) -> Tensor:
    """1 / values, with 0 where a value is 0 (a rank-deficient matrix has no vector there to scale)."""
    return torch.where(values > 0, 1.0 / values.clamp_min(torch.finfo(values.dtype).tiny), torch.zeros_like(values))
