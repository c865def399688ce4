"""Factors that keep a layer's output, not its weight: least ||(W - W') X||_F over the inputs X that calibration saw.

X enters only through its second moment S = X^T X (n, n), with samples as rows of X, and through S = L L^T: the error is
||(W - W') L||_F. Everything is computed in float64, for S is often nearly singular. Rows of an embedding are weighted
by how often they are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.decomposers import linalg

#: Added to the diagonal of S, as a share of its mean: directions that calibration never saw still count a little.
DAMPING = 1e-3

#: What every row of an embedding counts at least, in multiples of the mean.
FLOOR = 0.1

#: Steps of conjugate gradients in each round for the outer cores of a tensor train.
_STEPS = 6


def damped(second_moment: Tensor) -> Tensor:
    """S with its diagonal lifted, scaled to a mean diagonal of 1, (n, n), float64. Zeros become the identity."""
    s = second_moment.double()
    mean = s.diagonal().mean()
    eye = torch.eye(len(s), dtype=s.dtype, device=s.device)
    return eye if mean <= 0 else s / mean + DAMPING * eye


def root(second_moment: Tensor) -> Tensor:
    """L with L L^T = damped S, lower triangular, (n, n), float64."""
    return torch.linalg.cholesky(damped(second_moment))


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
    scaled = weight.double(), weight.double() - approximation.double()
    if counts is not None:
        norm, residual = ((row_weights(counts)[:, None] * matrix).square().sum() for matrix in scaled)
    elif moment is not None:
        s = damped(moment)
        norm, residual = (((matrix @ s) * matrix).sum() for matrix in scaled)
    else:
        norm, residual = (matrix.square().sum() for matrix in scaled)
    return max(0.0, float(residual)), float(norm)


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


def kronecker(weight: Tensor, second_moment: Tensor, a: Tensor, b: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """A sum of Kronecker products from a start by alternating least squares; never worse than the start.

    Args:
        weight: (m1 m2, n1 n2).
        second_moment: (n, n).
        a: (terms, m1, n1), the start.
        b: (terms, m2, n2), the start.
        rounds: of alternation.
    """
    (terms, m1, n1), (_, m2, n2) = a.shape, b.shape
    a, b = a.double(), b.double()
    s = damped(second_moment)
    # P = W S, once: (i1, i2, k1, k2).
    product = (weight.double() @ s).view(m1, m2, n1, n2)
    s = s.view(n1, n2, n1, n2)
    for _ in range(rounds):
        # Rows of all A_t side by side, (m1, t k1), solve one system; then those of all B_t.
        gram = torch.einsum("sij,tik->sjtk", b, b)
        if n2 == 1:  # S cancels: every column of A has the system of the B_t alone
            right = torch.einsum("ija,tj->iat", weight.double().view(m1, m2, n1), b[..., 0])
            a = _solve(gram[:, 0, :, 0], right).movedim(2, 0)
        else:
            system = torch.einsum("sjtk,ajbk->satb", gram, s).reshape(terms * n1, terms * n1)
            right = torch.einsum("ijab,tjb->ita", product, b).reshape(m1, terms * n1)
            a = _solve(system, right).view(m1, terms, n1).transpose(0, 1)
        gram = torch.einsum("sij,tik->sjtk", a, a)
        system = torch.einsum("sjtk,jakb->satb", gram, s).reshape(terms * n2, terms * n2)
        right = torch.einsum("ijab,tia->jtb", product, a).reshape(m2, terms * n2)
        b = _solve(system, right).view(m2, terms, n2).transpose(0, 1)
    sizes = [torch.linalg.vector_norm(factor, dim=(1, 2)) for factor in (a, b)]
    share = (sizes[1] * linalg.safe_inverse(sizes[0])).sqrt()[:, None, None]
    return a * share, b * linalg.safe_inverse(share)


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
    moments = [damped(moment) for moment in second_moments]
    factor = torch.linalg.cholesky(torch.stack(moments).mean(0))
    a, b = bases([weight.double() @ factor for weight in weights])
    if b is not None:  # W L = A G B^T, so W = A G (L^-T B)^T
        b = torch.linalg.qr(torch.linalg.solve_triangular(factor.T, b.double(), upper=True))[0]
    cores = []
    for weight, moment in zip(weights, moments, strict=True):
        core = weight.double() if a is None else a.double().T @ weight.double()
        cores.append(core if b is None else _solve(b.T @ moment @ b, core @ moment @ b))
    return a, b, cores


def under_the_mean(weights: Sequence[Tensor], second_moments: Sequence[Tensor]) -> list[Tensor]:
    """W_l L (m, n), float64, with L of the mean of all second moments, each scaled to norm 1."""
    factor = torch.linalg.cholesky(torch.stack([damped(moment) for moment in second_moments]).mean(0))
    seen = [weight.double() @ factor for weight in weights]
    return [matrix * linalg.safe_inverse(torch.linalg.matrix_norm(matrix)) for matrix in seen]


def tensor_train(
    weight: Tensor,
    second_moment: Tensor,
    blocks: tuple[int, int],
    train: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cores a (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) by alternating least squares. b, which all blocks of
    columns share, starts under the mean of their own second moments; its system is solved by conjugate gradients.

    Args:
        weight: (m2 m1, n2 n3).
        second_moment: (n, n).
        blocks: (m2, n2).
        train: the cores of a matrix without weights.
        rounds: of alternation; one leaves errors about 2 % above those of five.
    """
    weight, s = weight.double(), damped(second_moment)
    (m2, n2), (m, n) = blocks, weight.shape
    n3 = n // n2
    own = torch.einsum("iaib->ab", s.view(n2, n3, n2, n3)) / n2
    shared = torch.linalg.cholesky(own)
    a, core, b = (factor.double() for factor in train((weight.view(m, n2, n3) @ shared).flatten(1)))
    b = torch.linalg.solve_triangular(shared, b, upper=False, left=False)
    product = weight @ s
    for turn in range(rounds):
        if turn:
            b = _right_core(product.view(m, n2, n3), s.view(n2, n3, n2, n3), a, core, b)
        inputs = torch.block_diag(*[b] * n2)  # (n2 r2, n)
        inner = inputs @ s @ inputs.T
        target = (product @ inputs.T).view(m2, -1, len(inner))  # (m2, m1, n2 r2): W_i S inputs^T
        for _ in range(3):
            a = torch.linalg.qr(a)[0]
            flat = _solve(inner, (a.T @ target).flatten(0, 1)).view(m2, -1, len(inner))
            a = _solve(torch.einsum("ipx,xy,iqy->pq", flat, inner, flat), torch.einsum("imx,ipx->mp", target, flat))
        core = flat.unflatten(2, (n2, -1))
    return a, core, b


def _right_core(product: Tensor, s: Tensor, a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """A better last core of a train, by conjugate gradients from b (r2, n3).

    product is W S (m, n2, n3), s is (n2, n3, n2, n3). With M_j (m, r2) what the other cores make of block j, the
    least-squares b has sum_jk M_j^T M_k b S_kj = sum_j M_j^T (W S)_j.
    """
    left = torch.einsum("ip,mpnr->minr", a, core).flatten(0, 1)  # (m, n2, r2)
    gram = torch.einsum("mjr,mks->jrks", left, left)

    def system(x: Tensor) -> Tensor:
        return torch.einsum("jrks,ksja->ra", gram, torch.einsum("sb,kbja->ksja", x, s))

    residual = torch.einsum("mjr,mja->ra", left, product) - system(b)
    direction, size = residual, residual.square().sum()
    for _ in range(_STEPS):
        seen = system(direction)
        curvature = (direction * seen).sum()
        if curvature <= 0:  # nothing left to gain
            break
        step = size / curvature
        b, residual = b + step * direction, residual - step * seen
        size, last = residual.square().sum(), size
        direction = residual + size / last * direction
    return b


def tensor_train_rows(
    weight: Tensor,
    counts: Tensor,
    blocks: tuple[int, int],
    train: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cores a (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) of an embedding whose rows are weighted. b stays that of
    the weighted matrix; rows of a, each shared by m2 words, and the blocks of core follow by alternating least squares.

    Args:
        weight: (m, n); rows up to m2 m1 count nothing.
        counts: (m,).
        blocks: (m2, n2).
        train: the cores of a matrix without weights.
        rounds: of alternation.
    """
    (m2, n2), weights = blocks, row_weights(counts)
    a, core, b = (factor.double() for factor in train(weight.double() * weights[:, None]))
    b, mixing = torch.linalg.qr(b.T)
    blank = m2 * len(a) - len(weight)
    square = F.pad(weights**2, (0, blank)).view(m2, -1)  # (m2, m1)
    padded = F.pad(weight.double(), (0, 0, 0, blank))
    target = (padded.view(m2, len(a), n2, -1) @ b).flatten(2)  # (m2, m1, n2 r2)
    flat = (core @ mixing.T).flatten(2)  # (m2, r1, n2 r2)
    for _ in range(rounds):
        a = _rows_of_train(flat @ flat.mT, target @ flat.mT, square, a)
        systems = (a.T * square[:, None]) @ a
        flat = _solve(systems, (target.mT * square[:, None]) @ a).mT
    return a, flat.unflatten(2, (n2, -1)), b.T


def _rows_of_train(gram: Tensor, seen: Tensor, square: Tensor, a: Tensor) -> Tensor:
    """A better first core of an embedding's train, by conjugate gradients from a (m1, r1), for all rows at once.

    The system of row i is sum_m square[m, i] gram[m], preconditioned by the one of equal weights. gram is (m2, r1, r1),
    seen (m2, m1, r1), square (m2, m1).
    """

    def system(x: Tensor) -> Tensor:
        return ((x @ gram) * square[..., None]).sum(0)

    mean, scale = gram.mean(0), square.sum(0)[:, None]
    right = (seen * square[..., None]).sum(0)
    residual = right - system(a)
    direction = step = _solve(mean, residual) / scale
    for _ in range(_STEPS):
        ahead = system(direction)
        size = (residual * step).sum(1, keepdim=True)
        length = size * linalg.safe_inverse((direction * ahead).sum(1, keepdim=True))
        a, residual = a + length * direction, residual - length * ahead
        step = _solve(mean, residual) / scale
        direction = step + (residual * step).sum(1, keepdim=True) * linalg.safe_inverse(size) * direction
    return a


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """X with X system = right (..., r, k), for symmetric systems (..., k, k) that may be singular."""
    mean = system.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(system.dtype).tiny)
    lift = 1e-10 * mean[..., None, None] * torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(system + lift)).mT
