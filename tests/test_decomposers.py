"""One shared case that every registered decomposer passes, and what is particular to each."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compresskit.decomposers import kronecker as kronecker_module
from compresskit.decomposers.base import Decomposer, Group, Spec, Target, TiedHead
from compresskit.decomposers.kronecker import KroneckerSpec
from compresskit.decomposers.low_rank import LowRankSpec
from compresskit.decomposers.registry import METHODS, get, register
from compresskit.decomposers.tensor_train import TensorTrainSpec
from compresskit.decomposers.tucker import TuckerSpec
from compresskit.errors import InputError

TARGETS = {
    "square": Target("layer", "linear", "attention", (48, 48), bias=True),
    "wide": Target("layer", "linear", "ffn", (48, 96), bias=True),
    "tall": Target("layer", "linear", "ffn", (96, 48), bias=False),
    "embedding": Target("layer", "embedding", "embedding", (499, 48), padding_idx=0),
}


class OneWeight:
    """A source with a single matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def read(self, target: Target) -> torch.Tensor:
        return self.weight

    def rows(self, target: Target, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop]


def random_weight(target: Target, seed: int = 0) -> torch.Tensor:
    return torch.randn(target.shape, generator=torch.Generator().manual_seed(seed))


def build(decomposer: Decomposer, group: Group, spec: Spec, weight: torch.Tensor) -> torch.nn.Module:
    """The layer of a group of one, with the factors of ``weight`` and a random bias."""
    (layer,) = decomposer.layers(group, spec).values()
    layer = layer.to(weight.dtype)
    for name, factor in decomposer.factorise(group, spec, OneWeight(weight)).items():
        assert getattr(layer, name.rpartition(".")[2]).shape == factor.shape
        setattr(layer, name.rpartition(".")[2], torch.nn.Parameter(factor) if factor.is_floating_point() else factor)
    if getattr(layer, "bias", None) is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def cases() -> list[tuple[str, str, Spec]]:
    """(method, target, spec): the candidates at three budgets, and a few more shapes."""
    found = []
    for name, decomposer in METHODS.all().items():
        for kind, target in TARGETS.items():
            group = Group("layer", (target,))
            specs: dict[Spec, None] = {}
            for share in (2, 5, 12):
                offered = decomposer.candidates(group, target.parameters // share, allow_slow=True)
                specs |= dict.fromkeys(offered[:: max(1, len(offered) // 3)])
            found += [(name, kind, spec) for spec in specs]
    found += [
        ("kronecker", "square", KroneckerSpec(a=(4, 4), b=(12, 12))),
        ("kronecker", "wide", KroneckerSpec(a=(6, 12), b=(8, 8), terms=5)),
        ("kronecker", "tall", KroneckerSpec(a=(4, 2), b=(24, 24), terms=3)),
    ]
    return found


def label(value: object) -> str:
    return value.describe() if isinstance(value, Spec) else str(value)


@pytest.mark.parametrize(("method", "kind", "spec"), cases(), ids=label)
class TestEveryDecomposer:
    def setup(self, method: str, kind: str, spec: Spec) -> tuple[Decomposer, Group, torch.Tensor, torch.nn.Module]:
        decomposer, target = get(method), TARGETS[kind]
        group = Group("layer", (target,))
        weight = random_weight(target).double()
        return decomposer, group, weight, build(decomposer, group, spec, weight)

    def inputs(self, kind: str, tokens: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        if kind == "embedding":
            return torch.randint(0, 499, tokens, generator=generator)
        return torch.randn(*tokens, TARGETS[kind].shape[1], generator=generator, dtype=torch.float64)

    def test_forward_equals_the_dense_one(self, method: str, kind: str, spec: Spec) -> None:
        *_, layer = self.setup(method, kind, spec)
        dense = layer.to_dense()
        assert type(dense) in (torch.nn.Linear, torch.nn.Embedding)
        for tokens in ((1,), (2, 5), (3, 130), (0, 4)):  # few and many: every contraction path
            x = self.inputs(kind, tokens)
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)

    def test_gradients_are_those_of_the_dense_product(self, method: str, kind: str, spec: Spec) -> None:
        *_, layer = self.setup(method, kind, spec)
        x = self.inputs(kind, (2, 70))
        factors = [parameter for name, parameter in layer.named_parameters() if name != "bias"]

        def dense(x: torch.Tensor) -> torch.Tensor:
            if kind == "embedding":
                return torch.nn.functional.embedding(x, layer.dense_weight(), layer.padding_idx)
            return torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)

        got = torch.autograd.grad(layer(x).sin().sum(), factors)
        expected = torch.autograd.grad(dense(x).sin().sum(), factors)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.abs().sum() > 0
            if kind != "embedding":  # the look-up's padding row blocks A's gradient, not B's
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)

    def test_parameters_and_flops_are_as_the_cost_says(self, method: str, kind: str, spec: Spec) -> None:
        decomposer, group, _, layer = self.setup(method, kind, spec)
        factors = sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias")
        assert decomposer.cost(group, spec).parameters == factors < group.parameters
        for tokens in (1, 128, 3000):
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                layer(self.inputs(kind, (tokens,)))
            assert decomposer.cost(group, spec, tokens).flops == counter.get_total_flops()

    def test_error_is_predicted_exactly(self, method: str, kind: str, spec: Spec) -> None:
        decomposer, group, weight, layer = self.setup(method, kind, spec)
        measured = float((weight - layer.dense_weight().detach()).norm() / weight.norm())
        assert decomposer.errors(group, [spec], OneWeight(weight)) == pytest.approx([measured], rel=1e-6)

    def test_spec_survives_plain_data(self, method: str, kind: str, spec: Spec) -> None:
        decomposer, group, *_ = self.setup(method, kind, spec)
        again = decomposer.parse_spec(spec.model_dump(mode="json"))
        assert again == spec
        decomposer.check(group, again)
        options = decomposer.options_type.model_validate(spec.model_dump(mode="json", exclude={"method"}))
        assert decomposer.resolve(group, options) == spec

    def test_dtype_device_and_state_are_kept(self, method: str, kind: str, spec: Spec) -> None:
        decomposer, target = get(method), TARGETS[kind]
        group = Group("layer", (target,))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            factors = decomposer.factorise(group, spec, OneWeight(random_weight(target).to(dtype)))
            assert {factor.dtype for factor in factors.values() if factor.is_floating_point()} == {dtype}
        with torch.device("meta"):
            (layer,) = decomposer.layers(group, spec).values()
        assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
        assert set(factors) == {f"layer.{name}" for name in layer.state_dict() if name != "bias"}


@pytest.mark.parametrize(("method", "kind", "spec"), [case for case in cases() if case[1] == "embedding"], ids=label)
def test_tied_head_equals_the_dense_one(method: str, kind: str, spec: Spec) -> None:
    target = TARGETS[kind]
    layer = build(get(method), Group("layer", (target,)), spec, random_weight(target).double())
    hidden = torch.randn(2, 7, 48, dtype=torch.float64)
    bias = torch.nn.Parameter(torch.randn(499, dtype=torch.float64))
    expected = torch.nn.functional.linear(hidden, layer.dense_weight(), bias)
    torch.testing.assert_close(TiedHead(layer, bias)(hidden), expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in TiedHead(layer, bias).parameters()) == 499


def test_low_rank_is_the_truncated_svd() -> None:
    target = TARGETS["tall"]
    weight = random_weight(target).double()
    layer = build(get("low-rank"), Group("layer", (target,)), LowRankSpec(rank=7), weight)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(layer.dense_weight(), u[:, :7] * s[:7] @ v[:7], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("m1", "n1", "terms"), [(8, 4, 1), (8, 4, 6), (2, 48, 3), (48, 3, 2), (1, 16, 4), (3, 1, 2)])
def test_kronecker_is_the_optimum_of_van_loan_and_pitsianis(m1: int, n1: int, terms: int) -> None:
    target = TARGETS["square"]
    weight = random_weight(target).double()
    m2, n2 = 48 // m1, 48 // n1
    spec = KroneckerSpec(a=(m1, n1), b=(m2, n2), terms=terms)
    layer = build(get("kronecker"), Group("layer", (target,)), spec, weight)
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
    group = Group("layer", (TARGETS["square"],))
    layer = build(get("kronecker"), group, KroneckerSpec(a=(8, 4), b=(6, 12)), weight)
    torch.testing.assert_close(layer.dense_weight(), weight)


def test_embedding_rows_are_kronecker_products_on_the_hidden_side() -> None:
    group = Group("layer", (TARGETS["embedding"],))
    weight = random_weight(TARGETS["embedding"]).double()
    layer = build(get("kronecker"), group, KroneckerSpec(a=(499, 12), b=(1, 4), terms=2), weight)
    row = sum(torch.kron(layer.a[17, :, t], layer.b[t]) for t in range(2))
    torch.testing.assert_close(layer(torch.tensor(17)), row)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_and_zero_matrices_stay_finite(rank: int) -> None:
    target = TARGETS["square"]
    weight = torch.randn(48, rank) @ torch.randn(rank, 48)
    group = Group("layer", (target,))
    for method, spec, exact in (
        ("low-rank", LowRankSpec(rank=8), True),
        ("tucker", TuckerSpec(rank_out=8), True),
        ("tensor-train", TensorTrainSpec(blocks=(2, 2), ranks=(8, 8)), True),
        ("kronecker", KroneckerSpec(a=(24, 4), b=(2, 12), terms=9), False),
    ):
        layer = build(get(method), group, spec, weight)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
        error = get(method).errors(group, [spec], OneWeight(weight))[0]
        assert 0 <= error < (1e-3 if exact or rank == 0 else 1)  # predicted in float32
        if exact or rank == 0:
            torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-4, atol=1e-4)


def test_matrices_of_zeros_and_low_rank_share_tucker_factors() -> None:
    targets = tuple(Target(f"layer{i}", "linear", "ffn", (48, 48)) for i in range(3))
    group = Group("tucker_ffn_48x48", targets)
    weights = [torch.zeros(48, 48), torch.randn(48, 1) @ torch.randn(1, 48), torch.zeros(48, 48)]

    class Several(OneWeight):
        def read(self, target: Target) -> torch.Tensor:
            return weights[targets.index(target)]

    spec = TuckerSpec(rank_out=6, rank_in=6)
    factors = get("tucker").factorise(group, spec, Several(weights[0]))
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
    for target in TARGETS.values():
        group = Group("layer", (target,))
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


def test_slow_shapes_are_offered_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_module, "MAX_FLOPS_RATIO", 0.3)
    group = Group("layer", (Target("layer", "linear", "attention", (60, 60)),))  # a size no other test caches
    dense = 2 * 128 * group.parameters
    kronecker = get("kronecker")

    def slow(allow: bool) -> bool:
        specs = kronecker.candidates(group, group.parameters // 2, allow_slow=allow)
        return any(kronecker.cost(group, spec).flops > 0.3 * dense for spec in specs)

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
        decomposer.check(Group("layer", (TARGETS[kind],)), decomposer.parse_spec({"method": method, **data}))


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
    target = TARGETS["square"]
    group, source = Group("layer", (target,)), OneWeight(random_weight(target))
    plain = get("low-rank").factorise(group, LowRankSpec(rank=8), source)
    with torch.autocast("cpu", torch.bfloat16):
        other = get("low-rank").factorise(group, LowRankSpec(rank=8), source)
    assert all(torch.equal(plain[name], factor) for name, factor in other.items())
