"""One shared case that every registered decomposer passes, and what is particular to each."""

from __future__ import annotations

import pytest
import torch

from compresskit.decomposers import AnyDecomposer, FactorisedLayer, Group, Spec, Target
from compresskit.decomposers.kronecker import KroneckerSpec
from compresskit.decomposers.low_rank import LowRankSpec
from compresskit.decomposers.registry import METHODS, get, register
from compresskit.decomposers.tensor_train import TensorTrainSpec
from compresskit.decomposers.tucker import TuckerSpec
from compresskit.errors import InputError
from compresskit.testing import Case, DecomposerChecks, Matrices, cases

SHAPES = {
    "square": Target("layer", "linear", "attention", (48, 48), bias=True),
    "wide": Target("layer", "linear", "ffn", (48, 96), bias=True),
    "tall": Target("layer", "linear", "ffn", (96, 48), bias=False),
    "embedding": Target("layer", "embedding", "embedding", (499, 48), padding_idx=0),
}


def alone(kind: str) -> Group:
    return Group("layer", (SHAPES[kind],))


def random_weight(kind: str) -> torch.Tensor:
    return torch.randn(SHAPES[kind].shape, generator=torch.Generator().manual_seed(0))


def build(decomposer: AnyDecomposer, group: Group, spec: Spec, weight: torch.Tensor) -> FactorisedLayer:
    """The layer of a group of one, with the factors of ``weight`` and a random bias."""
    (layer,) = Case(decomposer, group, spec).layers(Matrices({group.target.name: weight})).values()
    return layer


MORE = [
    Case(get("kronecker"), alone("square"), KroneckerSpec(a=(4, 4), b=(12, 12))),
    Case(get("kronecker"), alone("wide"), KroneckerSpec(a=(6, 12), b=(8, 8), terms=5)),
    Case(get("kronecker"), alone("tall"), KroneckerSpec(a=(4, 2), b=(24, 24), terms=3)),
]
EVERY = [*(case for decomposer in METHODS.all().values() for case in cases(decomposer)), *MORE]


@pytest.mark.parametrize("case", EVERY, ids=str)
class TestEveryDecomposer(DecomposerChecks):
    pass


def test_methods_share_factors_where_they_say_so() -> None:
    """The shared case would pass without any group of several matrices."""
    assert {case.decomposer.name for case in EVERY if len(case.group.targets) > 1} == {"tucker"}


def test_low_rank_is_the_truncated_svd() -> None:
    weight = random_weight("tall").double()
    layer = build(get("low-rank"), alone("tall"), LowRankSpec(rank=7), weight)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(layer.dense_weight(), u[:, :7] * s[:7] @ v[:7], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("m1", "n1", "terms"), [(8, 4, 1), (8, 4, 6), (2, 48, 3), (48, 3, 2), (1, 16, 4), (3, 1, 2)])
def test_kronecker_is_the_optimum_of_van_loan_and_pitsianis(m1: int, n1: int, terms: int) -> None:
    weight = random_weight("square").double()
    m2, n2 = 48 // m1, 48 // n1
    spec = KroneckerSpec(a=(m1, n1), b=(m2, n2), terms=terms)
    layer = build(get("kronecker"), alone("square"), spec, weight)
    product = sum(torch.kron(a, b) for a, b in zip(layer.a, layer.b, strict=True))
    torch.testing.assert_close(layer.dense_weight(), product)
    rearranged = torch.stack(
        [weight[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].flatten() for i in range(m1) for j in range(n1)]
    )
    tail = torch.linalg.svdvals(rearranged)[terms:].square().sum()
    torch.testing.assert_close((weight - product).square().sum(), tail, rtol=1e-9, atol=1e-9)


def test_a_kronecker_product_is_recovered_exactly() -> None:
    a, b = torch.randn(8, 4, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    weight = torch.kron(a, b)
    group = alone("square")
    layer = build(get("kronecker"), group, KroneckerSpec(a=(8, 4), b=(6, 12)), weight)
    torch.testing.assert_close(layer.dense_weight(), weight)


def test_embedding_rows_are_kronecker_products_on_the_hidden_side() -> None:
    group = alone("embedding")
    weight = random_weight("embedding").double()
    layer = build(get("kronecker"), group, KroneckerSpec(a=(499, 12), b=(1, 4), terms=2), weight)
    row = sum(torch.kron(layer.a[17, :, t], layer.b[t]) for t in range(2))
    torch.testing.assert_close(layer(torch.tensor(17)), row)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_and_zero_matrices_stay_finite(rank: int) -> None:
    weight = torch.randn(48, rank) @ torch.randn(rank, 48)
    group = alone("square")
    for method, spec, exact in (
        ("low-rank", LowRankSpec(rank=8), True),
        ("tucker", TuckerSpec(rank_out=8), True),
        ("tensor-train", TensorTrainSpec(blocks=(2, 2), ranks=(8, 8)), True),
        ("kronecker", KroneckerSpec(a=(24, 4), b=(2, 12), terms=9), False),
    ):
        layer = build(get(method), group, spec, weight)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
        error = get(method).errors(group, [spec], Matrices({"layer": weight}))[0]
        assert 0 <= error < (1e-3 if exact or rank == 0 else 1)  # predicted in float32
        if exact or rank == 0:
            torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-4, atol=1e-4)


def test_matrices_of_zeros_and_low_rank_share_tucker_factors() -> None:
    targets = tuple(Target(f"layer{i}", "linear", "ffn", (48, 48)) for i in range(3))
    group = Group("tucker_ffn_48x48", targets)
    weights = [torch.zeros(48, 48), torch.randn(48, 1) @ torch.randn(1, 48), torch.zeros(48, 48)]

    spec = TuckerSpec(rank_out=6, rank_in=6)
    source = Matrices({target.name: weight for target, weight in zip(targets, weights, strict=True)})
    factors = get("tucker").factorise(group, spec, source)
    for target, weight in zip(targets, weights, strict=True):
        found = factors[f"{group.name}.a"] @ factors[f"{target.name}.core"] @ factors[f"{group.name}.b"]
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["kronecker", "low-rank", "tucker", "tensor-train"])
@pytest.mark.parametrize("shape", [(48, 48), (96, 48), (48, 96), (312, 312), (1200, 312)], ids=str)
def test_offered_shapes_cost_at_most_a_tenth_more_than_dense(method: str, shape: tuple[int, int]) -> None:
    targets = tuple(Target(f"layer{i}", "linear", "ffn", shape) for i in range(4))
    for group in get(method).groups(targets):
        for share in (1.2, 2, 4, 8, 20):
            for spec in get(method).candidates(group, round(group.parameters / share)):
                assert get(method).cost(group, spec).flops <= 1.1 * 2 * 128 * group.parameters
                assert get(method).cost(group, spec).parameters < group.parameters


def test_offered_shapes_save_parameters_and_are_not_low_rank_in_disguise() -> None:
    kronecker = get("kronecker")
    for kind, target in SHAPES.items():
        group = alone(kind)
        for budget in (0, 100, target.parameters // 9, target.parameters // 2, target.parameters):
            for method in ("kronecker", "low-rank"):
                specs = get(method).candidates(group, budget)
                assert specs
                assert all(get(method).cost(group, spec).parameters < target.parameters for spec in specs)
            for spec in kronecker.candidates(group, budget):
                assert isinstance(spec, KroneckerSpec)
                assert not spec.a[0] == spec.b[1] == 1
                assert not spec.a[1] == spec.b[0] == 1
                if target.kind == "embedding":
                    assert spec.a[1] > 1
                    assert spec.b[0] == 1
                else:
                    assert kronecker.cost(group, spec).flops <= 1.1 * 2 * 128 * target.parameters


def test_slow_shapes_are_offered_only_on_request() -> None:
    group, kronecker = Group("layer", (Target("layer", "linear", "attention", (384, 384)),)), get("kronecker")

    def slow(allow: bool) -> bool:
        specs = kronecker.candidates(group, group.parameters // 2, allow_slow=allow)
        return any(kronecker.cost(group, spec).flops > 1.1 * 2 * 128 * group.parameters for spec in specs)

    assert not slow(False)
    assert slow(True)


@pytest.mark.parametrize(
    ("method", "kind", "data", "message"),
    [
        ("kronecker", "square", {"a": [5, 4], "b": [12, 12]}, "multiplies to 60x48"),
        ("kronecker", "square", {"a": [24, 24], "b": [2, 2], "terms": 4}, "no fewer than the dense"),
        ("kronecker", "tall", {"a": [4, 1], "b": [24, 48], "terms": 5}, "no fewer than the dense"),
        ("kronecker", "square", {"a": [2, 1], "b": [24, 48], "terms": 3}, "no fewer than the dense"),
        ("kronecker", "embedding", {"a": [1, 4], "b": [499, 12]}, "hidden side only"),
        ("low-rank", "square", {"rank": 24}, "largest that does is 23"),
    ],
)
def test_specs_that_do_not_fit_are_refused(method: str, kind: str, data: dict, message: str) -> None:
    decomposer = get(method)
    with pytest.raises(InputError, match=message):
        decomposer.check(alone(kind), decomposer.parse_spec({"method": method, **data}))


@pytest.mark.parametrize("data", [{"rank": 0}, {"rank": "x"}, {"rank": 3, "extra": 1}, {}])
def test_spec_data_is_validated(data: dict) -> None:
    with pytest.raises(InputError, match="low-rank spec"):
        get("low-rank").parse_spec({"method": "low-rank", **data})


def test_registry_names_the_nearest_and_refuses_duplicates() -> None:
    with pytest.raises(InputError, match="did you mean 'kronecker'"):
        get("kroneker")
    with pytest.raises(InputError, match="already registered"):
        register(type(get("low-rank")))


def test_autocast_does_not_reach_the_factors() -> None:
    group, source = alone("square"), Matrices({"layer": random_weight("square")})
    plain = get("low-rank").factorise(group, LowRankSpec(rank=8), source)
    with torch.autocast("cpu", torch.bfloat16):
        other = get("low-rank").factorise(group, LowRankSpec(rank=8), source)
    assert all(torch.equal(plain[name], factor) for name, factor in other.items())
