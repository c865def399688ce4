"""Tucker: factors that all layers of a role share are computed, counted, stored and trained once."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from accelerate import cpu_offload
from conftest import count, outputs, tiny_model, token_ids
from safetensors import safe_open
from tensorly.decomposition import partial_tucker, tensor_train
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import compresskit
from compresskit import InputError
from compresskit.decomposers import Group, SharedFactors, Target
from compresskit.decomposers.registry import get
from compresskit.decomposers.tensor_train import TensorTrainSpec
from compresskit.decomposers.tucker import TuckerSpec
from compresskit.model.swap import densify
from compresskit.model.targets import find_targets
from compresskit.planning.recipe import Recipe

SHAPE = (24, 36)
TARGETS = tuple(Target(f"layer{i}", "linear", "ffn", SHAPE, bias=True) for i in range(5))
GROUP = Group("tucker_ffn_24x36", TARGETS)
SPECS = [TuckerSpec(rank_out=7, rank_in=9), TuckerSpec(rank_in=9), TuckerSpec(rank_out=7)]


class Weights:
    """Matrices that have something in common."""

    def __init__(self) -> None:
        chance = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=chance, dtype=torch.float64)

        left, right = random(24, 6), random(6, 36)
        self.weights = {target.name: left @ random(6, 6) @ right + 3 * random(*SHAPE) for target in TARGETS}

    def read(self, target: Target) -> torch.Tensor:
        return self.weights[target.name]

    def rows(self, target: Target, start: int, stop: int) -> torch.Tensor:
        return self.weights[target.name][start:stop]


def product(factors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    a, b = (factors.get(f"{GROUP.name}.{side}") for side in "ab")
    core = factors[f"{name}.core"]
    core = core if a is None else a @ core
    return core if b is None else core @ b


def relative_error(factors: dict[str, torch.Tensor], source: Weights) -> float:
    lost = sum(float((w - product(factors, name)).square().sum()) for name, w in source.weights.items())
    return (lost / sum(float(w.square().sum()) for w in source.weights.values())) ** 0.5


@pytest.mark.parametrize("spec", SPECS, ids=TuckerSpec.describe)
def test_error_is_that_of_tensorly(spec: TuckerSpec) -> None:
    source, tucker = Weights(), get("tucker")
    error = relative_error(tucker.factorise(GROUP, spec, source), source)
    assert tucker.errors(GROUP, [spec], source) == pytest.approx([error], rel=1e-9)
    stacked = torch.stack(list(source.weights.values()))
    ranks = [spec.rank_out or 24, spec.rank_in or 36]
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(stacked, rank=ranks, modes=[1, 2], n_iter_max=200, tol=1e-10)
    oracle = torch.einsum("lpq,mp,nq->lmn", core, *factors)
    best = float((stacked - oracle).norm() / stacked.norm())
    assert error == pytest.approx(best, rel=2e-3)  # three sweeps against two hundred


def test_error_of_many_specs_is_a_close_upper_bound() -> None:
    source, tucker = Weights(), get("tucker")
    bounds = tucker.errors(GROUP, SPECS, source)
    exact = [tucker.errors(GROUP, [spec], source)[0] for spec in SPECS]
    for bound, error in zip(bounds, exact, strict=True):
        assert error * (1 - 1e-9) <= bound <= 1.03 * error


@pytest.mark.parametrize("spec", SPECS, ids=TuckerSpec.describe)
def test_cost_counts_shared_factors_once(spec: TuckerSpec) -> None:
    tucker = get("tucker")
    owner, *layers = tucker.layers(GROUP, spec).values()
    assert isinstance(owner, SharedFactors)
    factors = count(owner) + sum(layer.core.numel() for layer in layers)
    assert tucker.cost(GROUP, spec).parameters == factors
    assert all(set(dict(layer.named_parameters())) == {"core", "bias"} for layer in layers)


def test_shared_more_helps_where_matrices_have_something_in_common() -> None:
    source, tucker, low_rank = Weights(), get("tucker"), get("low-rank")
    parameters = tucker.cost(GROUP, SPECS[0]).parameters
    alone = []
    for target in TARGETS:
        group = Group(target.name, (target,))
        near = low_rank.candidates(group, parameters // len(TARGETS))[0]
        alone.append(low_rank.errors(group, [near], source)[0] * source.weights[target.name].norm())
    norm = torch.stack(list(source.weights.values())).norm()
    assert tucker.errors(GROUP, SPECS[:1], source)[0] < float(np.hypot.reduce(alone) / norm)


def test_groups_are_roles_and_shapes_over_all_layers() -> None:
    targets = [target for target in find_targets(tiny_model("bert", "classifier")) if target.role]
    groups = get("tucker").groups(targets)
    assert {group.name: len(group.targets) for group in groups} == {
        "bert.embeddings.word_embeddings": 1,
        "bert.pooler.dense": 1,
        "tucker_attention_48x48": 8,
        "tucker_ffn_96x48": 2,
        "tucker_ffn_48x96": 2,
    }


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_stored_and_loaded_once(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family, "masked-lm")
    student = compresskit.compress(dense, method="tucker", ratio=3)
    owners = [m for m in student.modules() if isinstance(m, SharedFactors)]
    assert len(owners) == 3
    student.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        shared = [key for key in file.keys() if "tucker_" in key]  # noqa: SIM118
        assert len(shared) == sum(1 for owner in owners for _ in owner.parameters())
    again = compresskit.load(tmp_path / "out")
    assert torch.equal(outputs(again), outputs(student))
    assert count(again) == count(student)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(
        other.base_model(token_ids())[0],
        AutoModelForMaskedLM.from_pretrained(tmp_path / "out").base_model(token_ids())[0],
    )
    other.base_model.save_pretrained(tmp_path / "base")
    base = compresskit.load(tmp_path / "base")
    assert torch.equal(base(token_ids())[0], other.base_model(token_ids())[0])


def test_gradients_of_all_layers_meet_in_the_shared_factors() -> None:
    student = compresskit.compress(tiny_model(), method="tucker", ratio=3)
    student(token_ids()).last_hidden_state.square().sum().backward()
    owner = student.tucker_attention_48x48
    whole = owner.b.grad.clone()
    assert whole.abs().sum() > 0
    parts = torch.zeros_like(whole)
    for name in [t.name for t in find_targets(tiny_model()) if t.role == "attention"]:
        alone = copy.deepcopy(student)
        for path, layer in alone.named_modules():
            if getattr(layer, "shared", None) is alone.tucker_attention_48x48 and path != name:
                layer.__dict__["shared"] = copy.deepcopy(layer.shared)
        alone.zero_grad()
        alone(token_ids()).last_hidden_state.square().sum().backward()
        parts += alone.tucker_attention_48x48.b.grad
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_copies_and_dense_models_leave_the_original_alone() -> None:
    student = compresskit.compress(tiny_model(), method="tucker", ratio=3)
    before = outputs(student)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.tucker_attention_48x48.b.zero_()
    assert not torch.equal(outputs(twin), before)
    assert torch.equal(outputs(student), before)
    dense = compresskit.to_dense(student)
    torch.testing.assert_close(outputs(dense), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, SharedFactors) for module in dense.modules())
    assert count(dense) == count(tiny_model())
    densify(twin)
    assert not hasattr(twin, "tucker_attention_48x48")


def test_two_rules_make_two_groups(tmp_path: Path) -> None:
    rules = [
        {"match": r"layer\.0\..*(query|key|value)", "method": "tucker", "rank_out": 9, "rank_in": 9},
        {"match": r"layer\.1\..*(query|key|value)", "method": "tucker", "rank_out": 11, "rank_in": 7},
    ]
    recipe = Recipe.model_validate({"version": 1, "name": "two", "rules": rules})
    student = compresskit.compress(tiny_model("bert", "classifier"), recipe=recipe)
    shapes = [tuple(module.a.shape) for module in student.modules() if isinstance(module, SharedFactors)]
    assert sorted(shapes) == [(48, 9), (48, 11)]
    student.save_pretrained(tmp_path)
    assert torch.equal(outputs(compresskit.load(tmp_path)), outputs(student))


def test_half_precision_and_frozen_weights() -> None:
    dense = tiny_model().to(torch.bfloat16)
    for target in find_targets(dense):
        dense.get_submodule(target.name).weight.requires_grad_(False)
    student = compresskit.compress(dense, method="tucker", ratio=3)
    for owner in (m for m in student.modules() if isinstance(m, SharedFactors)):
        assert {(p.dtype, p.requires_grad) for p in owner.parameters()} == {(torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (TuckerSpec(rank_out=24), "rank_out 24 must be below 24"),
        (TuckerSpec(rank_out=23, rank_in=35), "saves no parameters"),
        (TuckerSpec(rank_out=12, rank_in=2), "5 cores 12x2 cannot fill both sides"),
    ],
)
def test_refused(spec: TuckerSpec, says: str) -> None:
    with pytest.raises(InputError, match=says):
        get("tucker").check(GROUP, spec)


def test_a_single_matrix_has_one_rank() -> None:
    with pytest.raises(InputError, match="a single matrix takes one rank"):
        get("tucker").check(Group("layer0", TARGETS[:1]), TuckerSpec(rank_out=2, rank_in=2))


def test_shared_factors_learn_where_one_of_their_matrices_does() -> None:
    dense = tiny_model().eval()
    dense.encoder.layer[0].requires_grad_(False)
    student = compresskit.compress(dense, method="tucker", ratio=3)
    assert student.tucker_attention_48x48.b.requires_grad
    assert not student.encoder.layer[0].attention.self.query.core.requires_grad
    assert student.encoder.layer[1].attention.self.query.core.requires_grad
    assert not student.tucker_attention_48x48.training


def test_offloaded_factors_come_back(tmp_path: Path) -> None:
    student = compresskit.compress(tiny_model(), method="tucker", ratio=3)
    expected = outputs(student)
    torch.testing.assert_close(outputs(cpu_offload(copy.deepcopy(student), torch.device("cpu"))), expected)


def test_tensor_train_is_that_of_tensorly() -> None:
    target = Target("layer", "embedding", "embedding", (22, 36))  # 4 does not divide 22: two rows of padding
    weight = torch.randn(22, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    source = Weights()
    source.weights = {"layer": weight}
    spec = TensorTrainSpec(blocks=(4, 2), ranks=(5, 7))
    train, group = get("tensor-train"), Group("layer", (target,))
    (layer,) = train.layers(group, spec).values()
    for name, factor in train.factorise(group, spec, source).items():
        setattr(
            layer, name.removeprefix("layer."), torch.nn.Parameter(factor) if factor.is_floating_point() else factor
        )
    padded = torch.cat([weight, torch.zeros(2, 36, dtype=torch.float64)])
    tensor = padded.reshape(4, 6, 2, 18).permute(1, 0, 2, 3).reshape(6, 8, 18)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        cores = tensor_train(tensor, rank=[1, 5, 7, 1]).factors
    oracle = torch.einsum("aip,pjq,qkb->ijk", *cores).reshape(6, 4, 2, 18).permute(1, 0, 2, 3).reshape(24, 36)[:22]
    torch.testing.assert_close(layer.dense_weight().detach(), oracle, rtol=1e-8, atol=1e-8)
    assert layer(torch.arange(22)).shape == (22, 36)
    with pytest.raises((IndexError, RuntimeError)):
        layer(torch.tensor([22]))  # a row of padding
    assert layer.project(torch.randn(3, 36, dtype=torch.float64)).shape == (3, 22)
