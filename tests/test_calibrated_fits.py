"""Fits with known inputs: outputs are kept better than by the weights alone, whatever the method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compresskit.decomposers import Group, Spec, Target, least_squares, linalg
from compresskit.decomposers.kronecker import KroneckerSpec
from compresskit.decomposers.kronecker.fit import ROUNDS, alternate, nearest
from compresskit.decomposers.kronecker.layers import sum_of_products
from compresskit.decomposers.low_rank import LowRankSpec
from compresskit.decomposers.registry import get
from compresskit.decomposers.tensor_train import TensorTrainSpec
from compresskit.decomposers.tensor_train import fit as tensor_train_fit
from compresskit.decomposers.tucker import TuckerSpec

M, N, V = 24, 36, 90


LINEAR = tuple(Target(f"layer{i}", "linear", "ffn", (M, N)) for i in range(3))


TABLE = Target("words", "embedding", "embedding", (V, N))


SINGLE, SHARED, WORDS = Group("layer0", LINEAR[:1]), Group("tucker_ffn", LINEAR), Group("words", (TABLE,))


CASES: list[tuple[str, Group, Spec]] = [
    ("low-rank", SINGLE, LowRankSpec(rank=6)),
    ("low-rank", WORDS, LowRankSpec(rank=6)),
    ("kronecker", SINGLE, KroneckerSpec(a=(12, 9), b=(2, 4), terms=2)),
    ("kronecker", WORDS, KroneckerSpec(a=(V, 9), b=(1, 4), terms=2)),
    ("tucker", SHARED, TuckerSpec(rank_out=6, rank_in=8)),
    ("tucker", SHARED, TuckerSpec(rank_in=8)),
    ("tucker", SHARED, TuckerSpec(rank_out=6)),
    ("tucker", WORDS, TuckerSpec(rank_in=6)),
    ("tensor-train", SINGLE, TensorTrainSpec(blocks=(2, 3), ranks=(5, 6))),
    ("tensor-train", WORDS, TensorTrainSpec(blocks=(4, 3), ranks=(8, 8))),  # 4 does not divide 90
]


NAMES = [f"{name} {group.name} {spec.describe()}" for name, group, spec in CASES]


class Matrices:
    """Random weights, and inputs that lie near a few directions; a ``WeightSource`` and ``Statistics`` in one."""

    def __init__(self, seed: int = 0) -> None:
        chance = torch.Generator().manual_seed(seed)
        targets = [*LINEAR, TABLE]
        self.weights = {t.name: torch.randn(t.shape, generator=chance, dtype=torch.float64) for t in targets}
        spread = torch.logspace(0, -2, N, dtype=torch.float64)
        self.inputs = {
            t.name: torch.randn(200, N, generator=chance, dtype=torch.float64) * spread[None, :] @ basis
            for t in LINEAR
            for basis in [torch.linalg.qr(torch.randn(N, N, generator=chance, dtype=torch.float64))[0]]
        }
        self.counts = torch.randint(0, 50, (V,), generator=chance).float() ** 2

    def read(self, target: Target) -> Tensor:
        return self.weights[target.name]

    def rows(self, target: Target, start: int, stop: int) -> Tensor:
        return self.weights[target.name][start:stop]

    def second_moment(self, target: Target) -> Tensor | None:
        x = self.inputs[target.name]
        return x.T @ x

    def token_counts(self, target: Target) -> Tensor | None:
        return self.counts

    def sensitivity(self, target: Target) -> float | None:
        return None


def approximation(name: str, group: Group, spec: Spec, source: Matrices, *, calibrated: bool) -> dict[str, Tensor]:
    """W' of every matrix of the group."""
    layers = get(name).layers(group, spec)
    for key, factor in get(name).factorise(group, spec, source, source if calibrated else None).items():
        path, _, attribute = key.rpartition(".")
        setattr(layers[path], attribute, torch.nn.Parameter(factor) if factor.is_floating_point() else factor)
    return {target.name: layers[target.name].dense_weight().detach() for target in group.targets}


def measured(made: dict[str, Tensor], source: Matrices) -> float:
    """The relative error, root mean square over the group, from the inputs themselves, as the definition says it."""
    squares = []
    for name, matrix in made.items():
        weight = source.weights[name]
        if name == "words":
            scale = (source.counts.double() / source.counts.double().mean() + least_squares.FLOOR).sqrt()[:, None]
            pair = [scale * (weight - matrix), scale * weight]
        else:
            x = source.inputs[name]
            unit = x.square().mean().sqrt() * len(x) ** 0.5  # every matrix's inputs count the same
            pair = [x @ (weight - matrix).T / unit, x @ weight.T / unit]
            lift = least_squares.DAMPING**0.5
            pair = [torch.cat([part, lift * d.T]) for part, d in zip(pair, (weight - matrix, weight), strict=True)]
        squares.append(float(pair[0].square().sum() / pair[1].square().sum()))
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize(("name", "group", "spec"), CASES, ids=NAMES)
def test_outputs_are_kept_better_than_by_the_weights_alone(name: str, group: Group, spec: Spec) -> None:
    source = Matrices()
    plain, calibrated = (
        measured(approximation(name, group, spec, source, calibrated=flag), source) for flag in (False, True)
    )
    assert calibrated < 0.99 * plain
    (predicted,) = get(name).output_errors(group, [spec], source, source)
    assert predicted == pytest.approx(calibrated, rel=1e-6)


def test_low_rank_is_the_optimum() -> None:
    source = Matrices()
    x = source.inputs["layer0"]
    s = least_squares.damped(x.T @ x)
    values = torch.linalg.svdvals(source.weights["layer0"] @ torch.linalg.cholesky(s))
    best = float(values[6:].square().sum() / values.square().sum()) ** 0.5
    made = approximation("low-rank", SINGLE, LowRankSpec(rank=6), source, calibrated=True)
    assert measured(made, source) == pytest.approx(best, rel=1e-9)
    assert get("low-rank").output_errors(SINGLE, [LowRankSpec(rank=r) for r in (6, 3)], source, source) == [
        pytest.approx(best, rel=1e-6),
        pytest.approx(float(values[3:].square().sum() / values.square().sum()) ** 0.5, rel=1e-6),
    ]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("kronecker", KroneckerSpec(a=(12, 9), b=(2, 4))),
        ("low-rank", LowRankSpec(rank=3)),
        ("tensor-train", TensorTrainSpec(blocks=(2, 3), ranks=(4, 4))),
    ],
)
def test_structure_under_the_inputs_is_recovered(name: str, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix has the method's structure only for inputs that occur; what it does to others must not disturb."""
    monkeypatch.setattr(least_squares, "DAMPING", 1e-12)
    monkeypatch.setattr(tensor_train_fit, "ROUNDS", 60)
    source = Matrices()
    chance = torch.Generator().manual_seed(3)
    (layer,) = get(name).layers(SINGLE, spec).values()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
    planted = layer.dense_weight().detach()
    # Inputs that no block of columns favours: half of all directions never occur.
    basis = torch.linalg.qr(torch.randn(N, N, generator=chance, dtype=torch.float64))[0]
    occurring, never = basis[:, : N // 2], basis[:, N // 2 :]
    source.inputs["layer0"] = torch.randn(300, N // 2, generator=chance, dtype=torch.float64) @ occurring.T
    disturbance = torch.randn(M, N // 2, generator=chance, dtype=torch.float64) @ never.T
    source.weights["layer0"] = planted + 0.05 * float(planted.norm() / disturbance.norm()) * disturbance
    x = source.inputs["layer0"]
    expected = x @ source.weights["layer0"].T

    def off(calibrated: bool) -> float:
        made = approximation(name, SINGLE, spec, source, calibrated=calibrated)["layer0"]
        return float((x @ made.T - expected).norm() / expected.norm())

    assert off(False) > 1e-3
    assert off(True) < 1e-4


@pytest.mark.parametrize("spec", [KroneckerSpec(a=(12, 9), b=(2, 4), terms=2), KroneckerSpec(a=(4, 6), b=(6, 6))])
def test_large_systems_are_solved_step_by_step(spec: KroneckerSpec) -> None:
    source = Matrices()
    x = source.inputs["layer0"]
    known = least_squares.seen(source.weights["layer0"], x.T @ x)
    start = nearest(LINEAR[0], spec, source)

    def lost(a: Tensor, b: Tensor) -> float:
        gap = sum_of_products(a, b) - known.weight
        return float(((gap @ known.moment) * gap).sum())

    exact = lost(*alternate(known, *start, ROUNDS)[:2])
    a, b, captured = alternate(known, *start, ROUNDS, direct=1)
    assert lost(*start) - lost(a, b) > 0.8 * (lost(*start) - exact) > 0
    assert known.energy - captured == pytest.approx(lost(a, b), rel=1e-6)


@pytest.mark.parametrize("spec", [KroneckerSpec(a=(4, 1), b=(6, 36)), KroneckerSpec(a=(12, 36), b=(2, 1))])
def test_single_columns_are_fitted_exactly(spec: KroneckerSpec) -> None:
    """The last factor is the least-squares one beside the other, and the energy that both leave is told right."""
    source = Matrices()
    x = source.inputs["layer0"]
    known = least_squares.seen(source.weights["layer0"], x.T @ x)
    (terms, (m1, n1), (m2, n2)), chance = (spec.terms, spec.a, spec.b), torch.Generator().manual_seed(1)
    a = torch.randn(terms, m1, n1, generator=chance, dtype=torch.float64)
    b = torch.randn(terms, m2, n2, generator=chance, dtype=torch.float64)
    a, b, captured = alternate(known, a, b, 1)
    gap = torch.einsum("tia,tjb->ijab", a, b.requires_grad_()).reshape(M, N) - known.weight
    residual = ((gap @ known.moment) * gap).sum()
    residual.backward()
    assert b.grad.abs().max() < 1e-8 * known.energy  # no better b beside this a
    assert known.energy - captured == pytest.approx(residual.item(), rel=1e-6)


def test_no_inputs_at_all_is_no_harm() -> None:
    source = Matrices()
    source.inputs = {name: torch.zeros_like(x) for name, x in source.inputs.items()}
    spec = LowRankSpec(rank=6)
    plain, calibrated = (
        approximation("low-rank", SINGLE, spec, source, calibrated=flag)["layer0"] for flag in (False, True)
    )
    assert torch.allclose(plain, calibrated, atol=1e-6)
    for name, group, spec_ in CASES[::2]:
        source.weights = {key: torch.zeros_like(weight) for key, weight in source.weights.items()}
        made = approximation(name, group, spec_, source, calibrated=True)
        assert all(torch.equal(matrix, torch.zeros_like(matrix)) for matrix in made.values())
        assert get(name).output_errors(group, [spec_], source, source) == [0.0]


def test_scaled_rows_go_on_from_block_to_block() -> None:
    matrix, scales = torch.randn(7, 3), torch.rand(7)
    blocks = linalg.scaled_rows(lambda: matrix.split(3), scales)
    assert torch.equal(torch.cat(list(blocks)), matrix * scales[:, None])


def test_the_energy_of_outputs_reads_half_of_the_moment() -> None:
    generator, n = torch.Generator().manual_seed(0), 2 * linalg.SIDE + 3
    weight, made, x = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for rows in (6, 6, 40))
    root = least_squares.root(x.T @ x)
    residual, norm = least_squares.energies(weight, made, x.T @ x, None)
    assert residual == pytest.approx(float(((weight - made) @ root).square().sum()), rel=1e-9)
    assert norm == pytest.approx(float((weight @ root).square().sum()), rel=1e-9)


def test_several_trains_of_an_embedding_are_compared_by_close_upper_bounds() -> None:
    source = Matrices()
    specs = [TensorTrainSpec(blocks=(4, 2), ranks=ranks) for ranks in ((6, 5), (6, 4), (3, 3))]
    single = [get("tensor-train").output_errors(WORDS, [spec], source, source)[0] for spec in specs]
    for bound, exact in zip(get("tensor-train").output_errors(WORDS, specs, source, source), single, strict=True):
        assert exact * (1 - 1e-5) <= bound <= exact * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_systems_are_solved(dtype: torch.dtype) -> None:
    thin = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    system, x = thin @ thin.T, torch.ones(2, 30, dtype=dtype)
    found = least_squares.solve(system, x @ system)
    torch.testing.assert_close(found @ system, x @ system, rtol=1e-3, atol=1e-3)
