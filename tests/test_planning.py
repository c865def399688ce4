"""Plans: the ratio asked is the ratio reached, by the planner's own rules."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, count, quick, tiny_model
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

import compresskit
from compresskit import InputError
from compresskit.calibration.statistics import calibrate
from compresskit.cli.tables import plan_table
from compresskit.data.corpus import find_corpus
from compresskit.decomposers import Group, Target, registry
from compresskit.decomposers.kronecker import KroneckerSpec
from compresskit.decomposers.registry import METHODS
from compresskit.model.measure import count_flops
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import find_targets, skeleton
from compresskit.planning.allocation import Choice, allocate
from compresskit.planning.budgets import Window
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import Allocation, Recipe, Rule, for_method, load_recipe

RATIOS = (2, 3, 5, 8, 12, 19, 30)
METHODS = list(METHODS.all())


@pytest.fixture(scope="module")
def minilm(embedded: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(embedded)


@pytest.mark.parametrize("ratio", quick(RATIOS, 2, 8, 30))
@pytest.mark.parametrize("method", METHODS)
def test_uniform_reaches_the_ratio_on_the_embedded_checkpoint(
    minilm: PreTrainedModel, method: str, ratio: float
) -> None:
    plan = make_plan(skeleton(minilm), for_method(method, ratio))  # shapes are enough
    assert ratio <= plan.ratio <= 1.01 * ratio
    assert plan.notes == ()
    by_class = {(a.group.role, a.group.shape): a.spec for a in plan.assignments}
    assert all(a.spec == by_class[a.group.role, a.group.shape] for a in plan.assignments)
    ratios = [a.group.parameters / a.parameters for a in plan.assignments]
    assert max(ratios) / min(ratios) < math.exp(2 * 3 * 0.15)


@pytest.fixture(scope="module")
def two_layers(embedded: Path) -> PreTrainedModel:
    """Two layers and 8,000 words of the embedded checkpoint: every shape of every matrix is looked at."""
    model = AutoModel.from_pretrained(embedded, num_hidden_layers=2)
    model.resize_token_embeddings(8000)
    return model


@pytest.mark.parametrize("method", quick(METHODS, "low-rank", "kronecker"))
def test_error_allocation_reaches_the_ratio(two_layers: PreTrainedModel, method: str) -> None:
    source = ModelWeights(two_layers)
    for ratio in (2, 19):
        plan = make_plan(two_layers, for_method(method, ratio, "error"), source)
        assert ratio <= plan.ratio <= 1.01 * ratio


@pytest.mark.parametrize("method", quick(METHODS, "low-rank", "kronecker"))
def test_error_allocation_has_less_error_than_uniform(two_layers: PreTrainedModel, method: str) -> None:
    source = ModelWeights(two_layers)
    total = {}
    for allocation in ("uniform", "error"):
        plan = make_plan(two_layers, for_method(method, 8, allocation), source, predict_errors=True)
        assert 8 <= plan.ratio <= 1.01 * 8
        norms = [math.hypot(*(float(source.read(t).norm()) for t in a.group.targets)) for a in plan.assignments]
        total[allocation] = math.hypot(*(a.error * norm for a, norm in zip(plan.assignments, norms, strict=True)))
    assert total["error"] < total["uniform"]


@pytest.mark.parametrize(
    ("recipe", "parameters", "linear_gflops"),
    [
        (f"kroneckerbert-{name}{variant}", parameters, linear_gflops)
        for name, parameters, linear_gflops in (
            ("8", 14_654_216, 5.493817344),
            ("19", 5_716_620, 1.416953856),
            ("21", 5_228_272, 1.416953856),
        )
        for variant in ("", "-fast")
    ],
)
def test_paper_recipes_have_the_papers_parameters(recipe: str, parameters: int, linear_gflops: float) -> None:
    with torch.device("meta"):
        bert = BertModel(BertConfig())
    plan = make_plan(bert, load_recipe(recipe))
    assert (plan.parameters_before, plan.parameters_after) == (109_482_240, parameters)
    assert plan.flops_after.linear / 1e9 == linear_gflops


def test_paper_recipes_apply_to_the_embedded_checkpoint(minilm: PreTrainedModel) -> None:
    plan = make_plan(skeleton(minilm), load_recipe("kroneckerbert-21"))
    shapes = {(a.group.role, a.group.shape): (a.spec.a, a.spec.b) for a in plan.assignments}
    assert shapes == {
        ("embedding", (30522, 384)): ((30522, 24), (1, 16)),
        ("attention", (384, 384)): ((192, 24), (2, 16)),
        ("ffn", (1536, 384)): ((16, 2), (96, 192)),
        ("ffn", (384, 1536)): ((2, 16), (192, 96)),
    }


@pytest.mark.parametrize("method", METHODS)
def test_objective_latency_is_as_small_and_faster(minilm: PreTrainedModel, method: str) -> None:
    dense, ratio = skeleton(minilm), 19
    plans = [make_plan(dense, for_method(method, ratio, objective=o)) for o in ("size", "latency")]
    small, fast = (
        sum(registry.get(method).time(a.group, a.spec) for a in plan.assignments if a.group.kind == "linear")
        for plan in plans
    )
    assert fast < small
    assert ratio <= plans[1].ratio <= 1.01 * ratio


def test_a_faster_shape_has_as_many_parameters() -> None:
    kronecker = registry.get("kronecker")
    group = Group("layer", (Target("layer", "linear", "attention", (768, 768)),))
    printed = KroneckerSpec(a=(384, 48), b=(2, 16))
    mirrored = kronecker.faster(group, printed)
    assert (mirrored.a, mirrored.b) == ((2, 16), (384, 48))
    assert kronecker.cost(group, mirrored).parameters == kronecker.cost(group, printed).parameters
    assert kronecker.time(group, mirrored) < kronecker.time(group, printed)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if (row - column) % len(METHODS) < 2 else pytest.mark.sweep)
        for row, family in enumerate(FAMILIES)
        for column, method in enumerate(METHODS)
    ],
)
def test_plan_totals_are_those_of_the_compressed_model(family: str, method: str) -> None:
    dense = tiny_model(family, "masked-lm")
    plan = compresskit.plan(dense, method=method, ratio=3)
    student = compresskit.compress(dense, method=method, ratio=3)
    assert plan.parameters_before == count(dense)
    assert plan.parameters_after == count(student)
    assert plan.ratio >= 3
    assert plan.flops_after == count_flops(student)
    assert plan.flops_before == count_flops(dense)


def test_flops_are_torchs_count_with_eager_attention() -> None:
    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=499
    )
    flops = count_flops(BertModel(config))
    linear = 2 * 128 * 2 * (4 * 48 * 48 + 2 * 48 * 96) + 2 * 48 * 48  # the pooler sees one token
    assert flops.linear == linear
    assert flops.total == linear + 2 * 2 * (2 * 128 * 128 * 48)


@pytest.mark.parametrize("method", METHODS)
def test_a_larger_ratio_is_a_smaller_model(method: str) -> None:
    dense = skeleton(tiny_model(hidden_size=96, intermediate_size=384))
    sizes = [make_plan(dense, for_method(method, ratio)).parameters_after for ratio in np.arange(1.2, 6, 0.8)]
    assert sizes == sorted(sizes, reverse=True)


def test_out_of_reach_names_the_ratio_that_can_be_reached() -> None:
    dense = skeleton(tiny_model())
    with pytest.raises(InputError, match=r"ratio 500 is out of reach: .* at most ([\d.]+)x smaller") as caught:
        make_plan(dense, for_method("low-rank", 500))
    reachable = float(str(caught.value).split("at most ")[1].split("x")[0])
    assert make_plan(dense, for_method("low-rank", reachable)).ratio >= reachable


def test_a_far_ratio_is_flagged() -> None:
    dense = skeleton(tiny_model())
    rules = (Rule(role="embedding", method="kronecker"),)  # one matrix: too few shapes to come within 1 % everywhere
    asked = [Recipe(version=1, name="embedding-only", ratio=ratio, rules=rules) for ratio in np.arange(1.1, 1.4, 0.03)]
    plans = [make_plan(dense, recipe) for recipe in asked]
    assert all(bool(plan.notes) == (plan.ratio > 1.01 * plan.ratio_asked) for plan in plans)
    assert any("smallest ratio of at least" in note for plan in plans for note in plan.notes)
    assert all(plan.ratio >= plan.ratio_asked for plan in plans)


def test_a_matrix_without_a_shape_that_saves_stays_dense() -> None:
    # 7 is prime: no Kronecker shape of a 7-wide embedding but one-column ones.
    dense = tiny_model("electra", embedding_size=7)
    plan = make_plan(dense, for_method("kronecker", 1.5))
    assert plan.ratio >= 1.5
    assert "embeddings.word_embeddings stays dense: no shape of it saves parameters" in plan.notes
    with pytest.warns(UserWarning, match="word_embeddings stays dense"):
        student = compresskit.compress(dense, method="kronecker", ratio=1.5)
    assert type(student.get_input_embeddings()).__name__ == "Embedding"


@pytest.mark.parametrize("width", [37, 41])
@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_prime_sizes_leave_matrices_dense_or_say_so(width: int, allocation: Allocation) -> None:
    dense = tiny_model(hidden_size=width, num_attention_heads=1)
    plan = compresskit.plan(dense, method="kronecker", ratio=1.2, allocation=allocation)
    assert plan.ratio >= 1.2
    with pytest.raises(InputError, match="out of reach"):
        compresskit.plan(dense, method="kronecker", ratio=500, allocation=allocation)


@pytest.mark.parametrize("head", ["base", "masked-lm"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_weights_is_planned_by_its_shapes(method: str, head: str) -> None:
    dense = tiny_model(head=head)
    with_weights = compresskit.plan(dense, method=method, ratio=1.7)
    without = compresskit.plan(dense.to("meta"), method=method, ratio=1.7)  # this cuts the tie of a head
    assert [(a.group, a.spec) for a in without.assignments] == [(a.group, a.spec) for a in with_weights.assignments]
    assert without.parameters_before == with_weights.parameters_before
    assert (without.ratio, without.flops_after) == (with_weights.ratio, with_weights.flops_after)
    assert {a.error for a in without.assignments} == {None}


@pytest.mark.parametrize("options", [{"method": "auto"}, {"method": "tucker", "allocation": "error"}])
def test_a_model_without_weights_is_refused_where_they_are_needed(options: dict[str, str]) -> None:
    dense = tiny_model().to("meta")
    for call in (compresskit.plan, compresskit.compress):
        with pytest.raises(InputError, match=r"word_embeddings.weight is on the meta device"):
            call(dense, ratio=2, **options)
    with pytest.raises(InputError, match="on the meta device"):
        compresskit.compress(dense, method="low-rank", ratio=2, inplace=True)
    with pytest.raises(InputError, match="on the meta device"):
        calibrate(dense, None, find_corpus(None))


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_a_callers_autocast_changes_nothing(method: str) -> None:
    plain = compresskit.compress(tiny_model(), method=method, ratio=2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = compresskit.compress(tiny_model(), method=method, ratio=2)
        dense = compresskit.to_dense(cast)
    assert same_state(plain, cast)
    assert same_state(compresskit.to_dense(plain), dense)


def same_state(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_error_above_1_is_explained_where_outputs_are_kept() -> None:
    plan = make_plan(tiny_model(), for_method("low-rank", 3))
    high = plan.with_errors({assignment.group.name: 1.4 for assignment in plan.assignments})
    says = "an error above 1 is no fault"
    assert says in str(plan_table(replace(high, calibration={"tokens": 100})).caption)
    assert says not in str(plan_table(replace(plan, calibration={"tokens": 100})).caption)
    assert says not in str(plan_table(high).caption)


def test_planning_is_repeatable() -> None:
    dense = tiny_model()
    plans = [compresskit.plan(dense, method="kronecker", ratio=4, allocation="error") for _ in range(2)]
    assert plans[0] == plans[1]


def test_roles_and_reasons() -> None:
    targets = {target.name: target for target in find_targets(tiny_model("electra", "masked-lm"))}
    assert targets["electra.embeddings.word_embeddings"].role == "embedding"
    assert targets["electra.embeddings.position_embeddings"].reason == "not the word embedding"
    assert targets["electra.embeddings_project"].reason == "projects embeddings to the hidden size"
    assert targets["electra.encoder.layer.1.attention.self.key"].role == "attention"
    assert targets["electra.encoder.layer.1.attention.output.dense"].role == "attention"
    assert targets["electra.encoder.layer.1.output.dense"].role == "ffn"
    assert targets["generator_predictions.dense"].role == "head"
    assert "generator_lm_head" not in targets  # tied: computed by the embedding's factors
    classifier = {target.name: target for target in find_targets(tiny_model("roberta", "classifier"))}
    assert classifier["classifier.dense"].role == "head"
    assert classifier["classifier.out_proj"].reason == "last linear of a head"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_matrix_has_a_role(family: str) -> None:
    roles = [t.role for t in find_targets(tiny_model(family)) if ".0." in t.name or ".1." in t.name]
    assert roles.count("attention") == 8
    assert roles.count("ffn") == 4
    assert len(roles) == 12


def brute_force(items: list[list[Choice]], budget: int, slack: float) -> float | None:
    inside = [
        sum(choice.penalty for choice in picks)
        for picks in itertools.product(*items)
        if budget / (1 + slack) <= sum(choice.parameters for choice in picks) <= budget
    ]
    return min(inside) if inside else None


def test_allocation_is_the_optimum() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        items = [
            [Choice(int(random.integers(10, 400)), float(random.random())) for _ in range(random.integers(1, 6))]
            for _ in range(random.integers(1, 6))
        ]
        budget = int(random.integers(200, 1200))
        expected = brute_force(items, budget, 0.05)
        picks = allocate(items, budget, Window(budget, budget / 1.05, -1))
        if expected is None:
            continue
        assert picks is not None
        chosen = [item[pick] for item, pick in zip(items, picks, strict=True)]
        assert sum(choice.penalty for choice in chosen) == pytest.approx(expected)


def test_allocation_without_a_total_in_the_window_takes_the_largest_below() -> None:
    items = [[Choice(10, 1.0), Choice(50, 0.0)], [Choice(10, 1.0), Choice(70, 5.0)]]
    # 80 is nearer to 100 than 60, whatever the penalty.
    assert allocate(items, 100, Window(100, 99, -1)) == [0, 1]
    assert allocate(items, 19, Window(19, 18, -1)) is None


def test_allocation_looks_at_totals_of_the_window_alone() -> None:
    items = [[Choice(10, 1.0), Choice(50, 0.0)], [Choice(10, 1.0), Choice(70, 5.0)]]  # 20, 60, 80 or 120
    assert allocate(items, 200, Window(100, 99, 79)) == [0, 1]
    assert allocate(items, 200, Window(100, 99, 80)) is None
    assert allocate(items, 200, Window(59, 58, 19)) == [0, 0]
    # Few cells, many totals: the smallest of all can be had.
    assert allocate(items, 10**9, Window(20, 20, 19)) == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_asking_more_never_gives_less_where_shapes_are_few(method: str) -> None:
    dense = skeleton(tiny_model(hidden_size=16, intermediate_size=22, vocab_size=61, num_hidden_layers=1))
    with pytest.raises(InputError, match=r"at most ([\d.]+)x") as caught:
        make_plan(dense, for_method(method, 500))
    limit = float(str(caught.value).split("at most ")[1].split("x")[0])
    asked = [*np.arange(1.01, limit, 0.2), limit]
    got = [make_plan(dense, for_method(method, float(ratio))).ratio for ratio in asked]
    assert got == sorted(got)
    assert all(mine >= ratio for mine, ratio in zip(got, asked, strict=True))
