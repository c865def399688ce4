"""Factors that keep a layer's output, not its weight: least ||(W - W') X||_F over the inputs X that calibration saw.

X enters only through its second moment S = X^T X (n, n), with samples as rows of X, and through S = L L^T: the error is
||(W - W') L||_F. Everything is computed in float64, for S is often nearly singular. Rows of an embedding are weighted
by how often they are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.decomposers import linalg

#: Added to the diagonal of S, as a share of its mean: directions that calibration never saw still count a little.
DAMPING = 1e-3

#: What every row of an embedding counts at least, in multiples of the mean.
FLOOR = 0.1

#: Steps of conjugate gradients where a system is too large, or has too many right sides, to be solved directly.
_STEPS = 6

#: Rows of a matrix that are compared at a time.
_ROWS = 8192

#: Unknowns up to which a Kronecker factor's system is solved directly.
_DIRECT = 1536


def damped(second_moment: Tensor) -> Tensor:
    """S with its diagonal lifted, scaled to a mean diagonal of 1, (n, n), float64. Zeros become the identity."""
    s = second_moment.double()
    mean = s.diagonal().mean()
    eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
    return eye if mean <= 0 else s / mean + DAMPING * eye


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
    """What the fits below start from, of a weight (m, n) and the second moment (n, n) of its input."""
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
            sums[which] += float((matrix * (matrix if s is None else matrix @ s)).sum())
    return max(0.0, sums[0]), sums[1]


def low_rank(weight: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The optimum of that rank, a (m, rank) and b (rank, n): a spans the leading left singular vectors of W L, and b is
    a^T W (the whitened SVD of SVD-LLM, Wang et al. 2024, without an inverse of L).
    """
    weight = weight.double()
    tall = weight @ root(second_moment)
    m, n = tall.shape
    if m >= n:
        left = linalg.truncated_svd(lambda: [tall], rank).images
        left = torch.linalg.qr(left)[0]
    else:
        left = linalg.truncated_svd(lambda: [tall.T], rank).vectors
    b = left.T @ weight
    size = torch.linalg.vector_norm(b, dim=1).sqrt()  # both factors take a share of the product's size
    return left * size, b * linalg.safe_inverse(size)[:, None]


def rows(blocks: linalg.Blocks, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors (k, count) of a matrix with weighted rows, and the images (rows, count) of its own rows.

    Args:
        blocks: gives the row blocks of the matrix, (rows, k) together, anew at every call.
        weights: (rows,).
        count: at most k.
    """
    vectors = linalg.truncated_svd(lambda: linalg.scaled_rows(blocks, weights), count).vectors
    return vectors, torch.cat([linalg.working(block) @ vectors for block in blocks()])


def kronecker(known: Seen, a: Tensor, b: Tensor, rounds: int) -> tuple[Tensor, Tensor, float]:
    """A sum of Kronecker products from a start by alternating least squares; never worse than the start.

    Args:
        known: of W (m1 m2, n1 n2).
        a: (terms, m1, n1), the start.
        b: (terms, m2, n2), the start.
        rounds: of alternation.

    Returns:
        Both factors, and how much of ``known.energy`` their sum captures.
    """
    a, b = a.double(), b.double()
    for _ in range(rounds):
        a, _ = _factor(known, a, b)
        # The other factor's problem is the same with rows and columns of W numbered the other way round.
        b, captured = _factor(_mirrored(known, a, b), b, a)
    sizes = [torch.linalg.vector_norm(factor, dim=(1, 2)) for factor in (a, b)]
    share = (sizes[1] * linalg.safe_inverse(sizes[0])).sqrt()[:, None, None]
    return a * share, b * linalg.safe_inverse(share), captured


def _mirrored(known: Seen, a: Tensor, b: Tensor) -> Seen:
    """The same for the matrix whose factors stand in the other order: sum of b_t (x) a_t."""
    (_, m1, n1), (_, m2, n2) = a.shape, b.shape

    def swapped(matrix: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
        return matrix.view(sizes).permute(1, 0, 3, 2).flatten(2).flatten(0, 1)

    weight, product = (swapped(matrix, (m1, m2, n1, n2)) for matrix in (known.weight, known.product))
    moment = swapped(known.moment, (n1, n2, n1, n2))
    return Seen(weight, moment, product, known.energy)


def _factor(known: Seen, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """The least-squares a (terms, m1, n1) beside b (terms, m2, n2), and the energy that both capture."""
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    if n2 == 1:  # S cancels: every column of a has the system of the b alone
        gram = torch.einsum("sij,tij->st", b, b)
        right = torch.einsum("ijk,tj->ikt", known.weight.view(m1, m2, n1), b[..., 0])
        a = _solve(gram, right).movedim(2, 0)
        made = torch.einsum("tik,tj->ijk", a, b[..., 0]).reshape(m1 * m2, n1)
        return a, float((known.product * made).sum())
    s = known.moment.view(n1, n2, n1, n2)
    right = torch.einsum("ijab,tjb->ita", known.product.view(m1, m2, n1, n2), b)
    if terms * n1 > _DIRECT:
        found, residual = _descend(lambda x: _seen_by(b, x, known.moment), right, a.transpose(0, 1), dims=(0, 1, 2))
        return found.transpose(0, 1), float(((right + residual) * found).sum())
    # Rows of all a_t side by side, (m1, t k1), solve one system.
    gram = torch.einsum("sij,tik->sjtk", b, b)
    system = torch.einsum("sjtk,ajbk->satb", gram, s).reshape(terms * n1, terms * n1)
    found = _solve(system, right.flatten(1))
    return found.view(m1, terms, n1).transpose(0, 1), float((right.flatten(1) * found).sum())


def _seen_by(b: Tensor, a: Tensor, moment: Tensor) -> Tensor:
    """What the system of a factor makes of a (m1, terms, n1), without being formed."""
    (m1, _, n1), (_, m2, n2) = a.shape, b.shape
    made = torch.einsum("ita,tjb->ijab", a, b).reshape(m1 * m2, n1 * n2) @ moment
    return torch.einsum("ijab,tjb->ita", made.view(m1, m2, n1, n2), b)


def tucker(
    weights: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    bases: Callable[[Sequence[Tensor]], tuple[Tensor | None, Tensor | None]],
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Shared factors and cores of W_l = A G_l B^T. The shared ones are found under the mean of the second moments, as
    one B cannot suit all of them; every core is then the least-squares one under its own.

    Args:
        weights: (m, n) each.
        second_moments: (n, n) each.
        bases: orthonormal A (m, r_out) and B (n, r_in) for matrices without weights; None for a full side.
    """
    factor, matrices = under_the_mean(weights, second_moments)
    a, b = bases(matrices)
    if b is not None:  # W L = A G B^T, so W = A G (L^-T B)^T
        b = torch.linalg.qr(torch.linalg.solve_triangular(factor.T, b.double(), upper=True))[0]
    cores = []
    for weight, second_moment in zip(weights, second_moments, strict=True):
        moment = damped(second_moment)
        core = weight.double() if a is None else a.double().T @ weight.double()
        cores.append(core if b is None else _solve(b.T @ moment @ b, core @ moment @ b))
    return a, b, cores


def under_the_mean(weights: Sequence[Tensor], second_moments: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """L (n, n) of the mean of all damped second moments, and every W_l L (m, n) over the norm of its own outputs, so
    that no matrix counts more than another; float64.
    """
    mean = sum((damped(moment) for moment in second_moments), torch.zeros(())) / len(second_moments)
    factor = torch.linalg.cholesky(mean)
    matrices = []
    for weight, moment in zip(weights, second_moments, strict=True):
        size = torch.tensor(seen(weight, moment).energy, dtype=torch.float64).clamp_min(0).sqrt()
        matrices.append(weight.double() @ factor * linalg.safe_inverse(size))
    return factor, matrices


def tensor_train(
    known: Seen,
    blocks: tuple[int, int],
    train: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Cores a (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) by alternating least squares. b, which all blocks of
    columns share, starts under the mean of their own second moments; its system is solved by conjugate gradients.

    Args:
        known: of W (m2 m1, n2 n3).
        blocks: (m2, n2).
        train: the cores of a matrix without weights.
        rounds: of alternation; one leaves errors about 2 % above those of five.

    Returns:
        The cores, and how much of ``known.energy`` they capture.
    """
    weight, s, product, _ = known
    (m2, n2), (m, n) = blocks, weight.shape
    n3 = n // n2
    own = torch.einsum("iaib->ab", s.view(n2, n3, n2, n3)) / n2
    shared = torch.linalg.cholesky(own)
    a, core, b = (factor.double() for factor in train((weight.view(m, n2, n3) @ shared).flatten(1)))
    b = torch.linalg.solve_triangular(shared, b, upper=False, left=False)
    for turn in range(rounds):
        if turn:
            b = _right_core(product.view(m, n2, n3), s.view(n2, n3, n2, n3), a, core, b)
        inputs = torch.block_diag(*[b] * n2)  # (n2 r2, n)
        inner = inputs @ s @ inputs.T
        target = (product @ inputs.T).view(m2, -1, len(inner))  # (m2, m1, n2 r2): W_i S inputs^T
        for _ in range(3):
            a = torch.linalg.qr(a)[0]
            flat = _solve(inner, (a.T @ target).flatten(0, 1)).view(m2, -1, len(inner))
            right = torch.einsum("imx,ipx->mp", target, flat)
            a = _solve(torch.einsum("ipx,xy,iqy->pq", flat, inner, flat), right)
        core = flat.unflatten(2, (n2, -1))
    return a, core, b, float((right * a).sum())


def _right_core(product: Tensor, s: Tensor, a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """A better last core of a train, by conjugate gradients from b (r2, n3).

    product is W S (m, n2, n3), s is (n2, n3, n2, n3). With M_j (m, r2) what the other cores make of block j, the
    least-squares b has sum_jk M_j^T M_k b S_kj = sum_j M_j^T (W S)_j.
    """
    left = torch.einsum("ip,mpnr->minr", a, core).flatten(0, 1)  # (m, n2, r2)
    gram = torch.einsum("mjr,mks->jrks", left, left)

    def system(x: Tensor) -> Tensor:
        return torch.einsum("jrks,ksja->ra", gram, torch.einsum("sb,kbja->ksja", x, s))

    return _descend(system, torch.einsum("mjr,mja->ra", left, product), b, dims=(0, 1))[0]


class SeenRows(NamedTuple):
    """An embedding and how often its rows are looked up, in float64: made once for all factors that are tried.

    Attributes:
        weight: (m, n).
        scaled: the same with its rows multiplied by their weights.
        squares: the squared weights, (m,).
        energy: ||scaled||_F^2.
    """

    weight: Tensor
    scaled: Tensor
    squares: Tensor
    energy: float


def seen_rows(weight: Tensor, counts: Tensor) -> SeenRows:
    """What :func:`tensor_train_rows` starts from, of an embedding (m, n) and the counts (m,) of its rows."""
    weight, weights = weight.double(), row_weights(counts)
    scaled = weight * weights[:, None]
    return SeenRows(weight, scaled, weights**2, float(torch.linalg.matrix_norm(scaled)) ** 2)


def tensor_train_rows(
    known: SeenRows,
    blocks: tuple[int, int],
    train: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Cores a (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) of an embedding whose rows are weighted. b stays that of
    the weighted matrix; rows of a, each shared by m2 words, and the blocks of core follow by alternating least squares.

    Args:
        known: of W (m, n); rows up to m2 m1 count nothing.
        blocks: (m2, n2).
        train: the cores of a matrix without weights.
        rounds: of alternation.

    Returns:
        The cores, and how much of ``known.energy`` they capture.
    """
    m2, n2 = blocks
    a, core, b = (factor.double() for factor in train(known.scaled))
    b, mixing = torch.linalg.qr(b.T)
    blank = m2 * len(a) - len(known.weight)
    square = F.pad(known.squares, (0, blank)).view(m2, -1)  # (m2, m1)
    inside = known.weight.view(len(known.weight), n2, -1) @ b
    target = F.pad(inside.flatten(1), (0, 0, 0, blank)).view(m2, len(a), -1)  # (m2, m1, n2 r2)
    flat = (core @ mixing.T).flatten(2)  # (m2, r1, n2 r2)
    for _ in range(rounds):
        a = _rows_of_train(flat @ flat.mT, target @ flat.mT, square, a)
        systems = (a.T * square[:, None]) @ a
        right = (target.mT * square[:, None]) @ a
        flat = _solve(systems, right).mT
    return a, flat.unflatten(2, (n2, -1)), b.T, float((right.mT * flat).sum())


def _rows_of_train(gram: Tensor, seen: Tensor, square: Tensor, a: Tensor) -> Tensor:
    """A better first core of an embedding's train, by conjugate gradients from a (m1, r1), for all rows at once.

    The system of row i is sum_m square[m, i] gram[m], preconditioned by the one of equal weights. gram is (m2, r1, r1),
    seen (m2, m1, r1), square (m2, m1).
    """

    def system(x: Tensor) -> Tensor:
        return ((x @ gram) * square[..., None]).sum(0)

    mean, scale = gram.mean(0), square.sum(0)[:, None]
    right = (seen * square[..., None]).sum(0)
    return _descend(system, right, a, dims=(1,), precondition=lambda x: _solve(mean, x) / scale)[0]


def _descend(
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


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """X with X system = right (..., r, k), for symmetric systems (..., k, k) that may be singular."""
    mean = system.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(system.dtype).tiny)
    lift = 1e-10 * mean[..., None, None] * torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(system + lift)).mT
