"""Least squares that several methods share: factors that keep what a layer puts out, not its weight.

Sought is the least ||(W - W') X||_F over the inputs X that calibration saw. X enters only through its second moment
S = X^T X (n, n), with samples as rows of X, and through S = L L^T: the error is ||(W - W') L||_F. Everything is
computed in float64, for S is often nearly singular. Rows of an embedding are weighted by how often they are looked up.
The fit itself stands in each method's own file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.decomposers import linalg
from compresskit.decomposers.groups import Target
from compresskit.decomposers.sources import Statistics, counts_of, moment_of

#: Added to the diagonal of S, as a share of its mean: directions that calibration never saw still count a little.
DAMPING = 1e-3

#: What every row of an embedding counts at least, in multiples of the mean.
FLOOR = 0.1

#: Steps of conjugate gradients where a system is too large, or has too many right sides, to be solved directly.
_STEPS = 6

#: Rows of a matrix that are compared at a time.
_ROWS = 8192


def damped(second_moment: Tensor) -> Tensor:
    """S with its diagonal lifted, scaled to a mean diagonal of 1, (n, n), float64. Zeros become the identity."""
    s = second_moment.to(torch.float64, copy=True)
    mean = s.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(s), dtype=s.dtype, device=s.device)
    s /= mean
    s.diagonal().add_(DAMPING)
    return s


def root(second_moment: Tensor) -> Tensor:
    """L with L L^T = damped S, lower triangular, (n, n), float64."""
    return torch.linalg.cholesky(damped(second_moment))


class Seen(NamedTuple):
    """A linear's weight and what calibration knows of its inputs, in float64: made once for all factors that are tried.

    Attributes:
        weight: W, (m, n).
        moment: damped S, (n, n).
        product: W S, (m, n).
        energy: ||W L||_F^2.
    """

    weight: Tensor
    moment: Tensor
    product: Tensor
    energy: float


def seen(weight: Tensor, second_moment: Tensor) -> Seen:
    """What a fit starts from, of a weight (m, n) and the second moment (n, n) of its input."""
    weight, moment = weight.double(), damped(second_moment)
    product = weight @ moment
    return Seen(weight, moment, product, float((product * weight).sum()))


def error(energy: float, captured: float) -> float:
    """The relative error of factors that capture so much of the energy."""
    return max(0.0, 1 - captured / energy) ** 0.5 if energy > 0 else 0.0


def row_weights(counts: Tensor) -> Tensor:
    """Square roots of how much each row of an embedding counts, (m,): its frequency over the mean, lifted by
    :data:`FLOOR`, so that words that calibration never met are kept too.
    """
    counts = counts.double()
    return (counts / counts.mean().clamp_min(1e-12) + FLOOR).sqrt()


def energies(
    weight: Tensor, approximation: Tensor, moment: Tensor | None, counts: Tensor | None
) -> tuple[float, float]:
    """||(W - W') X||_F^2 and ||W X||_F^2 of a linear; of an embedding the same with weighted rows; plain without both.

    Args:
        weight: (m, n).
        approximation: (m, n).
        moment: (n, n) of a linear's input.
        counts: (m,) of an embedding.
    """
    weights = None if counts is None else row_weights(counts)[:, None]
    s = None if moment is None else damped(moment)
    sums = [0.0, 0.0]
    for start in range(0, len(weight), _ROWS):  # a vocabulary in 64 bits is large
        rows = slice(start, start + _ROWS)
        dense = weight[rows].double()
        for which, matrix in enumerate((dense - approximation[rows].double(), dense)):
            if weights is not None:
                matrix = matrix * weights[rows]
            sums[which] += float(matrix.square().sum()) if s is None else output_energy(matrix, s)
    return max(0.0, sums[0]), sums[1]


def output_energy(matrix: Tensor, moment: Tensor) -> float:
    """||M L||_F^2 of M (m, n), with L L^T = moment (n, n); of one dtype. Half of the symmetric moment is read."""
    found = 0.0
    for start in range(0, len(moment), linalg.SIDE):
        block, rest = matrix[:, start : start + linalg.SIDE], matrix[:, start:]
        beside = block @ moment[start : start + linalg.SIDE, start:]
        found += float(2 * (beside * rest).sum() - (beside[:, : block.shape[1]] * block).sum())
    return found


def weight_error(matrices: Iterable[tuple[Target, Tensor, Tensor]]) -> float:
    """||W - W'||_F / ||W||_F over all (target, W, W') together."""
    pairs = [energies(weight, made, None, None) for _, weight, made in matrices]
    residual, norm = (sum(column) for column in zip(*pairs, strict=True))
    return math.sqrt(residual / norm) if norm > 0 else 0.0


def output_error(matrices: Iterable[tuple[Target, Tensor, Tensor]], statistics: Statistics) -> float:
    """||(W - W') X||_F / ||W X||_F, root mean square over (target, W, W'); see
    :meth:`.interface.Decomposer.output_errors`.
    """
    squares = []
    for target, weight, made in matrices:
        moment, counts = moment_of(target, statistics), counts_of(target, statistics)
        residual, norm = energies(weight, made, moment, counts)
        squares.append(residual / norm if norm > 0 else 0.0)
    return math.sqrt(sum(squares) / len(squares))


def weighted_svd(blocks: linalg.Blocks, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors (k, count) of a matrix with weighted rows, and the images (rows, count) of its own rows.

    Args:
        blocks: gives the row blocks of the matrix, (rows, k) together, anew at every call.
        weights: (rows,).
        count: at most k.
    """
    vectors = linalg.truncated_svd(lambda: linalg.scaled_rows(blocks, weights), count).vectors
    return vectors, torch.cat([linalg.working(block) @ vectors for block in blocks()])


def conjugate_gradients(
    system: Callable[[Tensor], Tensor],
    right: Tensor,
    x: Tensor,
    dims: tuple[int, ...],
    precondition: Callable[[Tensor], Tensor] = lambda residual: residual,
) -> tuple[Tensor, Tensor]:
    """A better solution of ``system(x) = right`` than x by conjugate gradients, and what remains; never a worse one.

    Args:
        system: symmetric, positive semi-definite.
        right: of x's shape.
        x: the start.
        dims: of x that belong to one problem; the others number problems.
        precondition: an approximate inverse of the system.
    """
    residual = right - system(x)
    direction = step = precondition(residual)
    for _ in range(_STEPS):
        ahead = system(direction)
        size = (residual * step).sum(dims, keepdim=True)
        length = size * linalg.safe_inverse((direction * ahead).sum(dims, keepdim=True))
        x, residual = x + length * direction, residual - length * ahead
        step = precondition(residual)
        direction = step + (residual * step).sum(dims, keepdim=True) * linalg.safe_inverse(size) * direction
    return x, residual


def solve(system: Tensor, right: Tensor) -> Tensor:
    """X with X system = right (..., r, k), for symmetric systems (..., k, k) that may be singular."""
    k, dtype, lift = system.shape[-1], system.dtype, 1e-10
    if dtype == torch.float32:
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed.any():
            return torch.cholesky_solve(right.mT, factor).mT
        # In 32 bits a system that should be singular has small negative eigenvalues.
        system, right, lift = system.double(), right.double(), 100 * k * torch.finfo(dtype).eps
    mean = system.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(system.dtype).tiny)
    lifted = system + lift * mean[..., None, None] * torch.eye(k, dtype=system.dtype, device=system.device)
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(lifted)).mT.to(dtype)
