"""Recipes: strict, versioned, round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import count, outputs, tiny_model
from transformers import PreTrainedModel

import compresskit
from compresskit import InputError
from compresskit.decomposers.registry import METHODS
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import find_targets
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import Recipe, apply_rules, for_method, load_recipe, parse_recipe, shipped_recipes
from compresskit.planning.resolved import resolved_recipe

VALID = """
version: 1
name: mixed
rules:
  - {match: 'layer\\.0\\.attention', method: low-rank, rank: 4}
  - {role: embedding, method: kronecker, n: 4}
  - {role: [attention, ffn], method: kronecker, b: [2, 2], terms: 2}
  - {role: head, method: dense, optional: true}
"""


def changed(**changes: object) -> str:
    return yaml.safe_dump(yaml.safe_load(VALID) | changes)


def rule(**keys: object) -> str:
    return changed(rules=[{"role": "attention", **keys}])


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_model()


def test_a_recipe_mixes_methods_by_role_and_pattern(dense: PreTrainedModel) -> None:
    plan = make_plan(dense, parse_recipe(VALID, "test"))
    methods = {a.group.name: a.method for a in plan.assignments}
    assert methods["encoder.layer.0.attention.self.query"] == "low-rank"
    assert methods["encoder.layer.1.attention.self.query"] == "kronecker"
    assert methods["embeddings.word_embeddings"] == "kronecker"
    assert "pooler.dense" not in methods
    student = compresskit.compress(dense, recipe=parse_recipe(VALID, "test"))
    assert count(student) == plan.parameters_after
    assert type(student.get_submodule("pooler.dense")).__name__ == "Linear"


def test_a_recipe_with_a_ratio_mixes_methods(dense: PreTrainedModel) -> None:
    rules = [{"role": "embedding", "method": "low-rank"}, {"role": ["attention", "ffn"], "method": "kronecker"}]
    recipe = parse_recipe(changed(rules=rules, ratio=3), "test")
    plan = make_plan(dense, recipe)
    assert 3 <= plan.ratio <= 3.03
    assert {a.group.role: a.method for a in plan.assignments} == {
        "embedding": "low-rank",
        "attention": "kronecker",
        "ffn": "kronecker",
    }
    assert count(compresskit.compress(dense, recipe=recipe, ratio=2)) > plan.parameters_after  # ratio is replaced


def test_a_pattern_reaches_matrices_without_a_role(dense: PreTrainedModel) -> None:
    recipe = parse_recipe(changed(rules=[{"match": "position_embeddings", "method": "low-rank", "rank": 3}]), "test")
    student = compresskit.compress(dense, recipe=recipe)
    assert type(student.embeddings.position_embeddings).__name__ == "LowRankEmbedding"
    outputs(student)


def test_first_match_wins(dense: PreTrainedModel) -> None:
    taken = apply_rules(parse_recipe(VALID, "test"), find_targets(dense))
    assert [len(targets) for _, targets in taken] == [4, 1, 4 + 4, 1]


def test_swap_for_output_transposes_the_shape() -> None:
    text = changed(rules=[{"role": "ffn", "method": "kronecker", "a": [8, 2], "swap_for_output": True}])
    plan = make_plan(tiny_model(), parse_recipe(text, "test"))
    assert {(a.group.shape, a.spec.a, a.spec.b) for a in plan.assignments} == {
        ((96, 48), (8, 2), (12, 24)),
        ((48, 96), (2, 8), (24, 12)),
    }


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid_and_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert parse_recipe(recipe.to_yaml(), "again") == recipe
    assert recipe.distill is not None
    assert recipe.distill.general is not None
    assert recipe.distill.general.learning_rate == 1e-3


@pytest.mark.parametrize("method", list(METHODS.all()))
@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_the_resolved_recipe_repeats_the_plan(method: str, allocation: str, dense: PreTrainedModel) -> None:
    plan = make_plan(dense, for_method(method, 3, allocation), ModelWeights(dense))
    resolved = parse_recipe(resolved_recipe(plan).to_yaml(), "resolved")
    again = make_plan(dense, resolved)
    assert {a.group.name: a.spec for a in again.assignments} == {a.group.name: a.spec for a in plan.assignments}
    assert again.parameters_after == plan.parameters_after


@pytest.mark.parametrize(
    "rules",
    [
        [
            {"match": r"layer\.0\.", "method": "dense"},
            {"role": ["attention", "ffn"], "method": "low-rank", "rank": 5},
        ],
        [
            {"match": r"layer\.0\..*(query|key)", "method": "tucker", "rank_out": 9, "rank_in": 9},
            {"match": r"layer\.1\..*(query|key)", "method": "tucker", "rank_out": 9, "rank_in": 9},
        ],
    ],
)
def test_the_resolved_recipe_keeps_dense_what_was_and_apart_what_was(rules: list, dense: PreTrainedModel) -> None:
    plan = make_plan(dense, Recipe.model_validate({"version": 1, "name": "own", "rules": rules}))
    again = make_plan(dense, parse_recipe(resolved_recipe(plan).to_yaml(), "resolved"))
    assert again.parameters_after == plan.parameters_after
    assert [a.group.targets for a in again.assignments] == [a.group.targets for a in plan.assignments]


def test_a_resolved_uniform_recipe_has_one_rule_per_role_and_shape(dense: PreTrainedModel) -> None:
    recipe = resolved_recipe(make_plan(dense, for_method("low-rank", 3)))
    assert len(recipe.rules) <= 5
    assert any(r"layer\.[0-9]+\." in (rule.match or "") for rule in recipe.rules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "not valid YAML"),
        ("just words", "must be a mapping"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        (changed(version=2), "version: Input should be 1"),
        (changed(name="../evil"), "name: String should match"),
        (changed(rulez=[]), "unknown key 'rulez': the nearest valid one is 'rules'"),
        (changed(rules=[]), "rules: "),
        (changed(ratio=0.5), "ratio: Input should be greater than 1"),
        (changed(ratio=float("nan")), "ratio: "),
        (changed(ratio=8), "gives both ratio and shapes"),
        (changed(rules=[{"method": "low-rank", "rank": 3}]), r"rules\[0\]: give role, match or both"),
        (changed(rules=[{"match": "(", "method": "low-rank", "rank": 3}]), "not a regular expression"),
        (rule(method="kroneker", n=4), "unknown method 'kroneker': did you mean 'kronecker'"),
        (rule(method="kronecker", term=2, n=4), "unknown key 'term': the nearest valid one is 'terms'"),
        (rule(method="low-rank", n=4), r"rules\[0\]: unknown key 'n'"),
        (rule(method="dense", rank=4), r"rules\[0\]: unknown key 'rank'"),
        (rule(method="kronecker", n=4, a=[2, 2]), "n means b"),
        (rule(method="kronecker", terms=2), "give a, b or n"),
        (rule(method="kronecker", b=[2, 2, 2]), "options of kronecker: b"),
        (rule(method="kronecker", b=[0, 2]), "options of kronecker: b"),
        (rule(method="low-rank", rank=4, roles="ffn"), "unknown key 'roles': the nearest valid one is 'role'"),
        (changed(rules=[{"role": "atention", "method": "low-rank", "rank": 1}]), "rules.0..role"),
        (
            changed(
                rules=[{"role": "ffn", "method": "low-rank", "rank": 1}, {"role": "attention", "method": "low-rank"}]
            ),
            r"rules\[1\] gives no shapes but other rules do",
        ),
        (changed(distill={"task": {"lr": 1}}), "distill"),
        (
            changed(distill={"task": {"learning_rat": 1}}),
            "distill.task: unknown key 'learning_rat': the nearest valid one is 'learning_rate'",
        ),
    ],
)
def test_bad_recipes_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe(text, "bad")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipe ")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "no_such_module", "method": "low-rank", "rank": 1}], "no matrix of this model matches it"),
        (
            [{"role": "ffn", "method": "low-rank", "rank": 1}, {"role": "ffn", "method": "low-rank", "rank": 2}],
            r"rules\[1\] \(role ffn\): earlier rules take all it matches",
        ),
        ([{"role": "ffn", "method": "dense"}], "factorises nothing"),
        ([{"role": "attention", "method": "kronecker", "b": [5, 2]}], "a factor 5x2 does not divide it"),
        ([{"role": "attention", "method": "kronecker", "b": [1, 1]}], "no fewer than the dense"),
        ([{"role": "attention", "method": "low-rank", "rank": 24}], "saves no parameters"),
    ],
)
def test_recipes_that_do_not_fit_the_model_are_refused(rules: list, message: str, dense: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(dense, parse_recipe(changed(rules=rules), "bad"))


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe 'kroneckerbert-20': did you mean"):
        load_recipe("kroneckerbert-20")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either a method"),
        ({"method": "low-rank", "recipe": "kroneckerbert-8", "ratio": 2}, "not both"),
        ({"method": "low-rank"}, "needs a ratio"),
        ({"method": "low-rank", "ratio": 1}, "above 1"),
        ({"method": "low-rank", "ratio": float("nan")}, "ratio nan"),
        ({"method": "low-rank", "ratio": float("inf")}, "ratio inf"),
        ({"method": "low-rank", "ratio": -3}, "above 1"),
        ({"recipe": "kroneckerbert-8", "ratio": 2}, "explicit shapes, so a ratio or size cannot"),
        ({"recipe": "kroneckerbert-8", "objective": "latency"}, "explicit shapes, so an objective cannot"),
        ({"method": "low-rank", "ratio": 2, "objective": "speed"}, "unknown objective 'speed'"),
        ({"recipe": "kroneckerbert-8", "allocation": "error"}, "explicit shapes, so an allocation cannot"),
    ],
)
def test_choices_that_exclude_each_other(arguments: dict, message: str, dense: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=message):
        compresskit.compress(dense, **arguments)


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ({"ratio": 19, "rules": [{"role": "ffn", "method": "low-rank", "rank": 2}]}, {}, "both ratio and shapes"),
        (
            {"rules": [{"role": "ffn", "method": "low-rank", "rank": 2}, {"role": "attention", "method": "low-rank"}]},
            {},
            "gives no shapes but other rules do",
        ),
        ({"rules": [{"role": "ffn", "method": "low-rank"}]}, {"ratio": 2, "allocation": "erorr"}, "unknown allocation"),
    ],
)
def test_recipes_made_in_python_are_checked(
    recipe: dict, arguments: dict, message: str, dense: PreTrainedModel
) -> None:
    made = Recipe.model_validate({"version": 1, "name": "x", **recipe})
    with pytest.raises(InputError, match=message):
        compresskit.compress(dense, recipe=made, **arguments)


def test_a_wrong_kind_of_model_is_named() -> None:
    with pytest.raises(InputError, match="not a Linear"):
        compresskit.compress(torch.nn.Linear(2, 2), method="low-rank", ratio=2)


def test_a_recipe_without_ratio_or_shapes_asks_for_one(dense: PreTrainedModel) -> None:
    recipe = Recipe.model_validate({"version": 1, "name": "x", "rules": [{"role": "ffn", "method": "low-rank"}]})
    with pytest.raises(InputError, match="neither shapes nor a ratio"):
        compresskit.compress(dense, recipe=recipe)
    assert compresskit.compress(dense, recipe=recipe, ratio=1.2) is not None
