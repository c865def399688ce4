"""Leading singular values and vectors of tall matrices, through the Gram matrix of the short side.

For a tall matrix R (rows x k, k the short side) the eigenvalues of R^T R are the squared singular values and its
eigenvectors the right singular vectors. Only a k x k problem is solved, only for the vectors that are kept, and R may
arrive in blocks of rows. Weights of 32 bits or fewer are multiplied in 32, and one step of orthogonal iteration with R
itself makes up for what squaring lost; where the singular values that are kept differ by more than :data:`_RANGE`, that
would not do, and everything is done in 64. So the truncation error is within 1e-6 of a full SVD's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


#: In float32, singular values below 3e-4 of the largest drown in the rounding of the Gram matrix.
_RANGE = 100.0

#: Largest weights between which squares neither overflow float32 nor vanish in it.
_LEAST, _MOST = 1e-6, 1e6

#: Side of the blocks in which half of a symmetric product is computed: smaller ones save more and take longer each.
SIDE = 256

Blocks = Callable[[], Iterable[Tensor]]


def exact_products(function: F) -> F:
    """The function without autocast, which would multiply in 16 bits."""
    for device in ("cpu", "cuda"):
        function = torch.autocast(device, enabled=False)(function)
    return function


@exact_products
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
        if total is None:
            total = block.new_zeros(block.shape[1], block.shape[1])
        add_square(total, block)
    if total is None:
        raise ValueError("gram needs at least one block")
    return whole_square(total)


def add_square(total: Tensor, rows: Tensor) -> None:
    """Add R^T R to ``total`` (k, k), of which only what is on and above the diagonal counts: half of the work. Of R
    (rows, k), in total's dtype. :func:`whole_square` makes the sum whole.
    """
    for start in range(0, len(total), SIDE):
        total[start : start + SIDE, start:].addmm_(rows[:, start : start + SIDE].T, rows[:, start:])


def whole_square(total: Tensor) -> Tensor:
    """The symmetric matrix with total's upper triangle, made in place."""
    return total.triu_().add_(total.triu(1).T)


def normalised(blocks: Blocks) -> tuple[Blocks, float]:
    """The blocks divided by one number where their squares would not fit into float32, and that number."""
    largest = max(float(block.abs().max()) for block in blocks())
    if largest == 0 or _LEAST < largest < _MOST:
        return blocks, 1.0
    return lambda: (block.double().div(largest).to(working(block).dtype) for block in blocks()), largest


def spectrum(gram_matrix: Tensor, count: int | None = None) -> np.ndarray:
    """The ``count`` largest eigenvalues of a Gram matrix (default: all), largest first: the squared singular values.
    Shape (count,), float64.
    """
    values = _eigh(gram_matrix, len(gram_matrix) if count is None else count, eigvals_only=True)
    return np.clip(values[::-1].astype(np.float64), 0.0, None)


def leading(gram_matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest singular values and their right singular vectors, from a (k, k) Gram matrix.

    Returns:
        (singular values (count,) largest first, vectors (k, count)), float64, on the Gram matrix's device.
    """
    values, vectors = _eigh(gram_matrix, count)
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


@exact_products
def truncated_svd(blocks: Blocks, count: int) -> Truncated:
    """The ``count`` largest singular values of R with their vectors, in the precision of :func:`working`.

    Args:
        blocks: gives the row blocks of R anew at every call.
        count: at most the number of R's columns.
    """
    blocks, scale = normalised(blocks)
    approximate = gram(blocks())
    values, vectors = leading(approximate, count)
    dtype = approximate.dtype
    if dtype == torch.float32 and values[0] > _RANGE * values[-1]:
        approximate = gram(block.double() for block in blocks())
        values, vectors = leading(approximate, count)
    vectors = vectors.to(approximate.dtype)
    power = torch.zeros_like(vectors)
    for block in blocks():
        block = block.to(vectors.dtype)
        power += block.T @ (block @ vectors)
    basis = torch.linalg.qr(power)[0]
    images = torch.cat([block.to(basis.dtype) @ basis for block in blocks()])
    values, rotation = leading(gram([images.double()]), count)
    rotation = rotation.to(basis.dtype)
    return Truncated(scale * values, (basis @ rotation).to(dtype), (scale * (images @ rotation)).to(dtype))


def scaled_rows(blocks: Blocks, weights: Tensor) -> Iterator[Tensor]:
    """The row blocks with each row multiplied by its weight; weights: (rows,) of all blocks together."""
    start = 0
    for block in blocks():
        rows = working(block)
        yield rows * weights[start : start + len(rows), None].to(rows.dtype)
        start += len(rows)


def working(block: Tensor) -> Tensor:
    """The block in the precision to compute in: float64 where it is, else float32."""
    return block if block.dtype == torch.float64 else block.float()


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _eigh(gram_matrix: Tensor, count: int, **options: Any) -> Any:
    """The ``count`` largest eigenvalues, smallest first, and with them their vectors unless options say otherwise."""
    matrix, k = gram_matrix.cpu().numpy(), len(gram_matrix)
    # One thread: these problems are small, and scipy's threads beside torch's made them 10 times slower on a busy
    # machine. It also makes the result independent of the number of threads.
    with _threads().limit(limits=1, user_api="blas"):
        if 2 * count <= k:
            with suppress(np.linalg.LinAlgError):
                found = scipy.linalg.eigh(matrix, check_finite=False, subset_by_index=[k - count, k - 1], **options)
                if (found if options else found[0]).size == count:
                    return found
            # LAPACK may lose some of many equal eigenvalues, or give up, when it looks for a part of them.
        found = scipy.linalg.eigh(matrix, check_finite=False, driver="evd", **options)
        return found[-count:] if options else (found[0][-count:], found[1][:, -count:])


def tail_errors(blocks: Blocks, counts: Sequence[int]) -> list[float]:
    """Relative Frobenius error of keeping the first ``count`` singular values, one figure per count.

    The squared residual is the sum of the squared singular values left out (Eckart & Young 1936): the trace of the Gram
    matrix less those that are kept, so the others are not computed. Of weights with 32 bits, errors below 5e-4 are not
    told apart.
    """
    blocks, _ = normalised(blocks)
    gram_matrix = gram(blocks())
    values = spectrum(gram_matrix, max(counts))
    total = float(gram_matrix.diagonal().double().sum())
    kept = np.concatenate([[0.0], np.cumsum(values)])
    return [float(np.sqrt(max(0.0, 1 - kept[count] / total))) if total > 0 else 0.0 for count in counts]


def safe_inverse(values: Tensor) -> Tensor:
    """1 / values, with 0 where a value is 0 (a rank-deficient matrix has no vector there to scale)."""
    return torch.where(values > 0, 1.0 / values.clamp_min(torch.finfo(values.dtype).tiny), torch.zeros_like(values))
