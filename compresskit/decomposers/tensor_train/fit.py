"""Trains from the TT-SVD of a weight or, where inputs are known, from alternating least squares on the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorly
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor
from torch.nn import functional as F

from compresskit.decomposers import Statistics, Target, WeightSource, counts_of, least_squares, linalg, moment_of
from compresskit.decomposers.tensor_train.spec import Pair, TensorTrainSpec

Cores = tuple[Tensor, Tensor, Tensor]
Svd = Callable[..., tuple[Tensor, Tensor, Tensor]]

#: Rounds of alternating least squares where inputs are known: more of them gain less than 0.5 %.
ROUNDS = 5


class SeenRows(NamedTuple):
    """An embedding and how often its rows are looked up: made once for all factors that are tried. In float64, or to
    compare ranks in float32, which is twice as fast.

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


def seen(
    target: Target, source: WeightSource, statistics: Statistics | None, dtype: torch.dtype = torch.float64
) -> least_squares.Seen | SeenRows | None:
    """What calibration knows of a matrix; None if nothing. ``dtype`` is that of an embedding's work."""
    moment, counts = moment_of(target, statistics), counts_of(target, statistics)
    if moment is not None:
        return least_squares.seen(source.read(target), moment)
    return None if counts is None else _seen_rows(source.read(target).to(dtype), counts)


def to_outputs(
    known: least_squares.Seen | SeenRows, spec: TensorTrainSpec, rounds: int, svd: Svd | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """A (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) for the known inputs, and the energy that they capture."""
    blocks, train = spec.blocks, tt_svd(spec, svd)
    if isinstance(known, SeenRows):
        a, core, b, captured = _fit_rows(known, blocks, train, rounds)
        return a, core, b, float(captured.sum())
    return _fit_linear(known, blocks, train, rounds)


def row_energies(known: SeenRows, specs: Sequence[TensorTrainSpec], svd: Svd) -> dict[TensorTrainSpec, float]:
    """How much of an embedding's energy trains of the same blocks capture after one round, at least. Of equal first
    ranks the largest one is fitted: its last core begins with those of the others.
    """
    found: dict[TensorTrainSpec, float] = {}
    for first in {spec.ranks[0] for spec in specs}:
        alike = [spec for spec in specs if spec.ranks[0] == first]
        largest = max(alike, key=lambda spec: spec.ranks[1])
        captured = _fit_rows(known, largest.blocks, tt_svd(largest, svd), 1)[-1].cumsum(0)
        found |= {spec: float(captured[spec.ranks[1] - 1]) for spec in alike}
    return found


def tt_svd(spec: TensorTrainSpec, svd: Svd | None = None) -> Callable[[Tensor], Cores]:
    """The TT-SVD of matrices with a spec's blocks and ranks."""
    blocks, (r1, r2) = spec.blocks, spec.ranks

    def train(matrix: Tensor) -> Cores:
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            a, core, b = tensor_train(as_tensor(matrix, blocks), rank=[1, r1, r2, 1], svd=svd or leading_svd).factors
        return a[0], core.unflatten(1, blocks).movedim(1, 0), b[..., 0]

    return train


def shared_svd(largest: int) -> Svd:
    """``svd=`` for several trains of one matrix: the one at the first bond, the dearest, is found once, with the
    ``largest`` rank that any of them has there.
    """
    first: dict[torch.Size, tuple[Tensor, Tensor, Tensor]] = {}

    def svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not first:
            first[matrix.shape] = leading_svd(matrix, largest)
        if matrix.shape not in first:
            return leading_svd(matrix, n_eigenvecs)
        left, values, right = first[matrix.shape]
        return left[:, :n_eigenvecs], values[:n_eigenvecs], right[:n_eigenvecs]

    return svd


def balanced(a: Tensor, core: Tensor, b: Tensor) -> Cores:
    """The same train with the size of every rank shared evenly between both sides of its bond."""
    a, core, b = a.double(), core.double(), b.double()
    left, right = a.T @ a, b @ b.T
    after = torch.einsum("mpnq,qr,mpnr->p", core, right, core)  # of what follows rank p, squared
    before = torch.einsum("mpnq,pr,mrnq->q", core, left, core)
    first = (after * linalg.safe_inverse(left.diagonal())).clamp_min(0) ** 0.25
    second = (before * linalg.safe_inverse(right.diagonal())).clamp_min(0) ** 0.25
    core = core * linalg.safe_inverse(first)[:, None, None] * linalg.safe_inverse(second)
    return a * first, core, b * second[:, None]


def as_tensor(weight: Tensor, blocks: Pair) -> Tensor:
    """The weight as a tensor (m1, m2 n2, n3), with rows of zeros at its end where m2 does not divide m."""
    m2, n2 = blocks
    m, n = weight.shape
    padded = F.pad(linalg.working(weight), (0, 0, 0, -m % m2))
    return padded.reshape(m2, -1, n2, n // n2).permute(1, 0, 2, 3).flatten(1, 2)


def leading_svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets through the Gram matrix of the short side, as tensorly's ``svd=`` takes it."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    values, right, images = linalg.truncated_svd(lambda: [tall], n_eigenvecs)
    left = (images.double() * linalg.safe_inverse(values)).to(images.dtype)  # 1e-40 has no inverse in 32 bits
    return (right, values, left.T) if wide else (left, values, right.T)


def _fit_linear(
    known: least_squares.Seen,
    blocks: Pair,
    train: Callable[[Tensor], Cores],
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
        # b stands before every block of columns: what follows is inputs S inputs^T and W_i S inputs^T with inputs
        # (n2 r2, n) of n2 b on a diagonal.
        half = (b @ s.view(n2, n3, n)).view(-1, n2, n3)  # (n2 r2, n2, n3)
        inner = (half @ b.T).flatten(1)
        target = (product.view(m, n2, n3) @ b.T).view(m2, -1, len(inner))  # (m2, m1, n2 r2)
        for _ in range(3):
            a = torch.linalg.qr(a)[0]
            flat = least_squares.solve(inner, (a.T @ target).flatten(0, 1)).view(m2, -1, len(inner))
            right = torch.einsum("imx,ipx->mp", target, flat)
            a = least_squares.solve(torch.einsum("ipx,xy,iqy->pq", flat, inner, flat), right)
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

    return least_squares.conjugate_gradients(system, torch.einsum("mjr,mja->ra", left, product), b, dims=(0, 1))[0]


def _seen_rows(weight: Tensor, counts: Tensor) -> SeenRows:
    """What :func:`_fit_rows` starts from, of an embedding (m, n) and the counts (m,) of its rows."""
    weights = least_squares.row_weights(counts)
    scaled = weight * weights[:, None].to(weight.dtype)
    energy = float(torch.linalg.vector_norm(scaled, dim=1).double().square().sum())
    return SeenRows(weight, scaled, (weights**2).to(weight.dtype), energy)


def _fit_rows(
    known: SeenRows,
    blocks: Pair,
    train: Callable[[Tensor], Cores],
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cores a (m1, r1), core (m2, r1, n2, r2) and b (r2, n3) of an embedding whose rows are weighted. b stays that of
    the weighted matrix; rows of a, each shared by m2 words, and the blocks of core follow by alternating least squares.

    Args:
        known: of W (m, n); rows up to m2 m1 count nothing.
        blocks: (m2, n2).
        train: the cores of a matrix without weights.
        rounds: of alternation.

    Returns:
        The cores, and how much of ``known.energy`` each row of b captures, (r2,).
    """
    m2, n2 = blocks
    a, core, b = (factor.to(known.weight.dtype) for factor in train(known.scaled))
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
        flat = least_squares.solve(systems, right).mT
    core = flat.unflatten(2, (n2, -1))
    captured = flat * (2 * right.mT - systems @ flat)  # also of a flat that is not quite the least-squares one
    return a, core, b.T, captured.double().unflatten(2, (n2, -1)).sum((0, 1, 2))


def _rows_of_train(gram: Tensor, seen: Tensor, square: Tensor, a: Tensor) -> Tensor:
    """A better first core of an embedding's train, by conjugate gradients from a (m1, r1), for all rows at once.

    The system of row i is sum_m square[m, i] gram[m], preconditioned by the one of equal weights. gram is (m2, r1, r1),
    seen (m2, m1, r1), square (m2, m1).
    """

    def system(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for weights, inner in zip(square, gram, strict=True):
            total.addmm_(x * weights[:, None], inner)
        return total

    mean, scale = gram.mean(0), square.sum(0)[:, None]
    inverse = least_squares.solve(mean, torch.eye(len(mean), dtype=mean.dtype, device=mean.device))
    right = (seen * square[..., None]).sum(0)
    return least_squares.conjugate_gradients(system, right, a, dims=(1,), precondition=lambda x: x @ inverse / scale)[0]
