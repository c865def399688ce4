"""Checks that every decomposer passes, for the tests of this package and of plug-ins.

A plug-in's test file needs four lines (nothing here imports pytest):

    import pytest
    from compresskit.testing import DecomposerChecks, cases

    @pytest.mark.parametrize("case", cases(MyMethod()), ids=str)
    class TestMyMethod(DecomposerChecks):
        pass
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from compresskit.decomposers import (
    AnyDecomposer,
    FactorisedEmbedding,
    FactorisedLayer,
    FactorisedLinear,
    Group,
    Spec,
    Target,
    TiedHead,
    output_error,
)

#: Matrices that cases are made of: alone, and three of one role and shape, which a method may group.
TARGETS: dict[str, tuple[Target, ...]] = {
    "square": (Target("square", "linear", "attention", (48, 48), bias=True),),
    "wide": (Target("wide", "linear", "ffn", (48, 96), bias=True),),
    "tall": (Target("tall", "linear", "ffn", (96, 48)),),
    "embedding": (Target("embedding", "embedding", "embedding", (499, 48), padding_idx=0),),
    "three": tuple(Target(f"layer{i}", "linear", "ffn", (60, 48), bias=True) for i in range(3)),
}

#: Budgets that candidates are asked for, as parts of the dense parameters.
_SHARES = (2, 5, 12)


class Matrices:
    """Weights and what calibration knows of their inputs: a :class:`~compresskit.decomposers.WeightSource` and
    :class:`~compresskit.decomposers.Statistics` in one.

    Args:
        weights: (m, n) by the target's name.
        moments: X^T X of inputs, (n, n), by name; what is left out is not known.
        counts: how often rows are looked up, (m,), by name.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor] | None = None,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights, self.moments, self.counts = weights, moments or {}, counts or {}

    @classmethod
    def random(cls, targets: Iterable[Target], dtype: torch.dtype = torch.float64, seed: int = 0) -> Matrices:
        """Normally distributed weights, inputs that favour some directions, and rows of very different frequency."""
        chance = torch.Generator().manual_seed(seed)
        weights, moments, counts = {}, {}, {}
        for target in targets:
            m, n = target.shape
            weights[target.name] = torch.randn(m, n, generator=chance).to(dtype)
            inputs = torch.randn(4 * n, n, generator=chance) * torch.logspace(0, -2, n)
            inputs = inputs @ torch.linalg.qr(torch.randn(n, n, generator=chance))[0]
            moments[target.name] = inputs.T @ inputs
            counts[target.name] = torch.randint(0, 50, (m,), generator=chance).float() ** 2
        return cls(weights, moments, counts)

    def read(self, target: Target) -> Tensor:
        """The whole weight."""
        return self.weights[target.name]

    def rows(self, target: Target, start: int, stop: int) -> Tensor:
        """Rows of the weight."""
        return self.weights[target.name][start:stop]

    def second_moment(self, target: Target) -> Tensor | None:
        """X^T X of the input."""
        return self.moments.get(target.name)

    def token_counts(self, target: Target) -> Tensor | None:
        """How often each row was looked up."""
        return self.counts.get(target.name)

    def sensitivity(self, target: Target) -> float | None:
        """Not known."""
        return None


@dataclass(frozen=True)
class Case:
    """A method with a group of matrices and a spec for it."""

    decomposer: AnyDecomposer
    group: Group
    spec: Spec

    def __str__(self) -> str:
        return f"{self.decomposer.name}-{self.group.name}-{self.spec.describe()}"

    def layers(self, matrices: Matrices, *, calibrated: bool = False) -> dict[str, FactorisedLayer]:
        """The layer of every target by its name, with the factors of these matrices, random biases, and gradients."""
        layers = self.decomposer.build(self.group, self.spec, matrices, matrices if calibrated else None)
        for target in self.group.targets:
            layer = layers[target.name]
            if target.bias:
                layer.bias = nn.Parameter(torch.randn(target.shape[0], dtype=matrices.read(target).dtype))
            for module in (layer, *layer.shared_factors):
                module.requires_grad_()
        return layers

    def inputs(self, *tokens: int) -> Tensor:
        """Token ids, or hidden states (*tokens, n) in 64 bits."""
        chance, (m, n) = torch.Generator().manual_seed(3), self.group.shape
        if self.group.kind == "embedding":
            return torch.randint(0, m, tokens, generator=chance)
        return torch.randn(*tokens, n, generator=chance, dtype=torch.float64)


def cases(decomposer: AnyDecomposer) -> list[Case]:
    """A method's candidates for matrices of several kinds at three budgets, for ``pytest.mark.parametrize``."""
    found = []
    for targets in TARGETS.values():
        for group in decomposer.groups(targets):
            if len(group.targets) < len(targets):  # the method takes each alone, as it does elsewhere
                continue
            specs: dict[Spec, None] = {}
            for share in _SHARES:
                offered = decomposer.candidates(group, group.parameters // share, allow_slow=True)
                specs |= dict.fromkeys(offered[:: max(1, (len(offered) + 1) // 2)])
            found += [Case(decomposer, group, spec) for spec in specs]
    return found


class DecomposerChecks:
    """What a decomposer owes, one test each. Subclass it and parametrize the subclass with ``case``."""

    def test_every_target_is_in_one_group(self, case: Case) -> None:
        """Targets of a group have one role, kind and shape; a group of several has a name that no module path has."""
        every = [target for targets in TARGETS.values() for target in targets]
        groups = case.decomposer.groups(every)
        assert sorted(target.name for group in groups for target in group.targets) == sorted(t.name for t in every)
        assert len({group.name for group in groups}) == len(groups)
        for group in groups:
            assert len({(target.role, target.kind, target.shape) for target in group.targets}) == 1
            assert "." not in group.name if len(group.targets) > 1 else group.name == group.target.name

    def test_forward_equals_the_dense_one(self, case: Case) -> None:
        """Layers compute what ordinary ones with the same weight do, for few tokens and many."""
        for layer in case.layers(Matrices.random(case.group.targets)).values():
            dense = layer.to_dense()
            assert type(dense) in (nn.Linear, nn.Embedding)
            for tokens in ((1,), (2, 5), (3, 130), (0, 4)):
                x = case.inputs(*tokens)
                torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)

    def test_gradients_are_those_of_the_dense_product(self, case: Case) -> None:
        """Every factor learns; the factors of a linear as the product does."""
        layers = case.layers(Matrices.random(case.group.targets))
        x, factors = case.inputs(2, 70), _factors(layers)
        got = torch.autograd.grad(_sum_of_sines(layer(x) for layer in layers.values()), factors)
        if case.group.kind == "embedding":  # the look-up's padding row gets no gradient, the product's would
            assert all(mine.abs().sum() > 0 for mine in got)
            return
        linears = [layer for layer in layers.values() if isinstance(layer, FactorisedLinear)]
        dense = _sum_of_sines(F.linear(x, layer.dense_weight(), layer.bias) for layer in linears)
        for mine, theirs in zip(got, torch.autograd.grad(dense, factors), strict=True):
            assert mine.abs().sum() > 0
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)

    def test_parameters_and_flops_are_as_the_cost_says(self, case: Case) -> None:
        """FLOPs as torch counts them."""
        layers = case.layers(Matrices.random(case.group.targets))
        counted = sum(factor.numel() for factor in _factors(layers))
        assert case.decomposer.cost(case.group, case.spec).parameters == counted < case.group.parameters
        for tokens in (1, 128, 3000):
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                for layer in layers.values():
                    layer(case.inputs(tokens))
            assert case.decomposer.cost(case.group, case.spec, tokens).flops == counter.get_total_flops()

    def test_the_error_is_predicted_exactly(self, case: Case) -> None:
        """Of one spec: in the Frobenius norm over all matrices of the group."""
        matrices = Matrices.random(case.group.targets)
        layers = case.layers(matrices)
        pairs = [(matrices.read(t), layers[t.name].dense_weight().detach()) for t in case.group.targets]
        residual = math.hypot(*(float((weight - made).norm()) for weight, made in pairs))
        expected = residual / math.hypot(*(float(weight.norm()) for weight, _ in pairs))
        (predicted,) = case.decomposer.errors(case.group, [case.spec], matrices)
        assert math.isclose(predicted, expected, rel_tol=1e-6), (predicted, expected)

    def test_the_error_of_outputs_is_predicted_exactly(self, case: Case) -> None:
        """Of one spec, for the factors that it gets with statistics."""
        matrices = Matrices.random(case.group.targets)
        layers = case.layers(matrices, calibrated=True)
        made = [(t, matrices.read(t), layers[t.name].dense_weight().detach()) for t in case.group.targets]
        expected = output_error(made, matrices)
        (predicted,) = case.decomposer.output_errors(case.group, [case.spec], matrices, matrices)
        assert math.isclose(predicted, expected, rel_tol=1e-6), (predicted, expected)

    def test_the_spec_survives_plain_data(self, case: Case) -> None:
        """As ``config.json`` holds it, and as a recipe's rule gives it."""
        decomposer, data = case.decomposer, case.spec.model_dump(mode="json")
        again = decomposer.parse_spec(data)
        assert again == case.spec
        assert again.method == decomposer.name
        decomposer.check(case.group, again)
        del data["method"]
        assert decomposer.resolve(case.group, decomposer.options_type.model_validate(data)) == case.spec

    def test_dtype_device_and_state_are_kept(self, case: Case) -> None:
        """Factors have the weight's dtype and are named as in the state dict, with statistics and without; layers can
        be built on the meta device.
        """
        with torch.device("meta"):
            layers = case.decomposer.layers(case.group, case.spec)
        assert {parameter.device.type for layer in layers.values() for parameter in layer.parameters()} == {"meta"}
        states = ((path, name) for path, layer in layers.items() for name in layer.state_dict())
        names = {f"{path}.{name}" for path, name in states if name != "bias"}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            matrices = Matrices.random(case.group.targets, dtype)
            for statistics in (None, matrices):
                factors = case.decomposer.factorise(case.group, case.spec, matrices, statistics)
                assert set(factors) == names
                assert {factor.dtype for factor in factors.values() if factor.is_floating_point()} == {dtype}
                assert all(factor.isfinite().all() for factor in factors.values())

    def test_a_tied_head_equals_the_dense_one(self, case: Case) -> None:
        """An output head computes with the factors of the embedding and holds its bias alone."""
        for layer in case.layers(Matrices.random(case.group.targets)).values():
            if isinstance(layer, FactorisedEmbedding):
                hidden = torch.randn(2, 7, layer.embedding_dim, dtype=torch.float64)
                bias = nn.Parameter(torch.randn(layer.num_embeddings, dtype=torch.float64))
                head = TiedHead(layer, bias)
                torch.testing.assert_close(
                    head(hidden), F.linear(hidden, layer.dense_weight(), bias), rtol=1e-9, atol=1e-9
                )
                assert list(head.parameters()) == [bias]


def _sum_of_sines(outputs: Iterable[Tensor]) -> Tensor:
    """A number that depends on every output in another way."""
    return torch.stack([output.sin().sum() for output in outputs]).sum()


def _factors(layers: Mapping[str, FactorisedLayer]) -> list[nn.Parameter]:
    """The parameters of all layers without biases, shared ones once."""
    modules = dict.fromkeys(module for layer in layers.values() for module in (layer, *layer.shared_factors))
    return [parameter for module in modules for name, parameter in module.named_parameters() if name != "bias"]
