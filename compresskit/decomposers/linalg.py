"""Leading singular values and vectors of tall matrices, through the Gram matrix of the short side.

For a tall matrix R (rows x k, k the short side) the eigenvalues of R^T R are the squared singular values and its
eigenvectors the right singular vectors. Only a k x k problem is solved, only for the vectors that are kept, and R may
arrive in blocks of rows. Weights of 32 bits or fewer are multiplied in 32; one step of orthogonal iteration with R
itself then makes up for what squaring lost, so that the truncation error is that of a full SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """R^T R.

    Args:
        blocks: row blocks of R, each (rows, k), any float dtype.

    Returns:
        (k, k) on the blocks' device; float64 where the blocks are, else float32.
    """
    total: Tensor | None = None
    for block in blocks:
        block = working(block)
        part = block.T @ block
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("gram needs at least one block")
    return total


def spectrum(gram_matrix: Tensor) -> np.ndarray:
    """All eigenvalues of a Gram matrix, largest first: the squared singular values. Shape (k,), float64."""
    values = _eigh(gram_matrix, eigvals_only=True)
    return np.clip(values[::-1].astype(np.float64), 0.0, None)


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
    return torch.from_numpy(values).to(device).double(), torch.from_numpy(vectors).to(device).double()


class Truncated(NamedTuple):
    """The leading part of R = U S V^T.

    Attributes:
        values: S, (count,), largest first, float64.
        vectors: V, (k, count).
        images: U S = R V, (rows, count).
    """

    values: Tensor
    vectors: Tensor
    images: Tensor


def truncated_svd(blocks: Callable[[], Iterable[Tensor]], count: int) -> Truncated:
    """The ``count`` largest singular values of R with their vectors, in the precision that :func:`gram` works in.

    Args:
        blocks: gives the row blocks of R anew at every call.
        count: at most the number of R's columns.
    """
    approximate = gram(blocks())
    vectors = leading(approximate, count)[1].to(approximate.dtype)
    power = torch.zeros_like(vectors)
    for block in blocks():
        block = working(block)
        power += block.T @ (block @ vectors)
    basis = torch.linalg.qr(power)[0]
    images = torch.cat([working(block) @ basis for block in blocks()])
    values, rotation = leading(gram([images.double()]), count)
    rotation = rotation.to(basis.dtype)
    return Truncated(values, basis @ rotation, images @ rotation)


def working(block: Tensor) -> Tensor:
    """The block in the precision to compute in: float64 where it is, else float32."""
    return block if block.dtype == torch.float64 else block.float()


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _eigh(gram_matrix: Tensor, **kwargs: Any) -> Any:
    # One thread: these problems are small, and scipy's threads beside torch's made them 10 times slower on a busy
    # machine. It also makes the result independent of the number of threads.
    with _threads().limit(limits=1, user_api="blas"):
        return scipy.linalg.eigh(gram_matrix.cpu().numpy(), check_finite=False, **kwargs)


def tail_errors(gram_matrix: Tensor, counts: Sequence[int]) -> list[float]:
    """Relative Frobenius error of keeping the first ``count`` singular values, one figure per count.

    The squared residual is the sum of the squared singular values left out (Eckart & Young 1936): the trace of the Gram
    matrix less those that are kept, so the others are not computed. Of a float32 Gram matrix, errors below 5e-4 are not
    told apart.
    """
    k, most = gram_matrix.shape[0], max(counts)
    if 2 * most > k:
        values = spectrum(gram_matrix)
    else:
        found = _eigh(gram_matrix, eigvals_only=True, subset_by_index=[k - most, k - 1])
        values = np.clip(found[::-1].astype(np.float64), 0.0, None)
    total = float(gram_matrix.diagonal().double().sum())
    kept = np.concatenate([[0.0], np.cumsum(values)])
    return [float(np.sqrt(max(0.0, 1 - kept[count] / total))) if total > 0 else 0.0 for count in counts]


def safe_inverse(values: Tensor) -> Tensor:
    """1 / values, with 0 where a value is 0 (a rank-deficient matrix has no vector there to scale)."""
    return torch.where(values > 0, 1.0 / values.clamp_min(torch.finfo(values.dtype).tiny), torch.zeros_like(values))
