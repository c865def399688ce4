"""Truncated singular value decompositions against full ones, and contractions against dense products."""

from __future__ import annotations

import pytest
import torch

from compresskit.decomposers import linalg
from compresskit.decomposers.kronecker.contraction import contractions, multiply


def _spectra() -> dict[str, torch.Tensor]:
    """Singular values, (256,), of every awkward kind."""
    steps = torch.arange(256, dtype=torch.float64)
    return {
        "flat": torch.ones(256, dtype=torch.float64),
        "one giant": torch.where(steps < 1, 300.0, (1 + steps).rsqrt()),
        "two decades": torch.where(steps < 2, 60.0, (1 + steps).rsqrt()),
        "steep tail": (1 + steps) ** -2,
        "pairs": 2.0 ** -(steps // 2),
        "fast": 0.5**steps,
        "slow": 1 / (1 + steps),
        "cliff": torch.where(steps < 7, 1.0, 1e-6),
        "tiny": 1e-24 / (1 + steps),
        "huge": 1e20 / (1 + steps),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", list(_spectra()))
@pytest.mark.parametrize("count", [1, 8, 64, 128])
def test_truncation_is_that_of_a_full_svd(kind: str, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, 256, generator=generator, dtype=torch.float64))[0] for size in (600, 256)
    )
    matrix = ((left * _spectra()[kind]) @ right.T).to(dtype)
    found = linalg.truncated_svd(lambda: matrix.split(128), count)
    values = torch.linalg.svdvals(matrix.double())
    optimum = float(values[count:].square().sum().sqrt() / values.norm())
    product = found.images.double() @ found.vectors.T.double()
    error = float((matrix.double() - product).norm() / matrix.double().norm())
    # Nothing can be told below the rounding of the weights, or in float64 below that of their squares.
    rounding = 3e-7 if dtype == torch.float32 else 1e-9
    assert error <= optimum * (1 + 1e-6) + rounding
    torch.testing.assert_close(found.values, values[:count], rtol=1e-5, atol=1e-6 * float(values[0]))
    predicted = linalg.tail_errors(lambda: matrix.split(128), [count])[0]
    assert predicted == pytest.approx(optimum, abs=1e-3 if dtype == torch.float32 else 1e-6)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(count, dtype=dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [5, linalg.SIDE, 2 * linalg.SIDE + 3])
def test_half_of_a_symmetric_product_is_the_whole(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, k, generator=generator, dtype=torch.float64)
    found = linalg.gram(rows.split(16))
    torch.testing.assert_close(found, rows.T @ rows)
    assert torch.equal(found, found.T)


def test_every_contraction_path_is_used() -> None:
    ways = {
        contractions(*shape, tokens)[0][:2]
        for shape in (
            (24, 4, 2, 12, 1),
            (4, 24, 12, 2, 1),
            (2, 16, 24, 24, 1),
            (24, 24, 16, 2, 1),
            (8, 2, 24, 24, 1),
            (6, 12, 8, 8, 5),
        )
        for tokens in (1, 2048)
    }
    assert ways == {("a-first", "a"), ("a-first", "b"), ("b-first", "a"), ("b-first", "b"), ("form", "")}


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (24, 2, 2, 12), (1, 6, 8, 3), (6, 1, 3, 8)], ids=str)
def test_contractions_are_exact_in_value_and_gradient(shape: tuple[int, int, int, int], terms: int) -> None:
    m1, n1, m2, n2 = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, n1 * n2), (terms, m1, n1), (terms, m2, n2))
    x, a, b = (torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes)
    weight = sum(torch.kron(one, other) for one, other in zip(a, b, strict=True))
    dense = torch.nn.functional.linear(x, weight)
    expected = torch.autograd.grad(dense.sin().sum(), (x, a, b))
    ways = [way for way in contractions(*shape, terms, 7) if way.order != "form"]
    assert len(ways) == 4
    for way in ways:
        y = multiply(x, a, b, way)
        torch.testing.assert_close(y, dense)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), (x, a, b)), expected)
        assert multiply(x[:0], a, b, way).shape == (0, m1 * m2)


def test_batched_gradients_stay_small() -> None:
    """A way whose gradients would be far larger than the data is not taken for training."""
    for shape, terms in (((2, 1024, 512, 1), 34), ((2, 512, 512, 2), 8), ((24, 24, 32, 32), 12)):
        m1, n1, m2, n2 = shape
        for tokens in (128, 2048):
            way = contractions(*shape, terms, tokens, True)[0]
            size = {"a": terms * m1 * n1, "b": terms * m2 * n2, "": 0}[way.batched]
            assert size <= 4 * (m1 * m2 + n1 * n2)
