"""``method: auto``: the method and shape of every group, by error under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import Run, count, outputs, tiny_bench, tiny_model
from transformers import AutoTokenizer, PreTrainedModel

import compresskit
from compresskit import InputError
from compresskit.calibration.statistics import calibrate
from compresskit.data.corpus import find_corpus
from compresskit.decomposers import AnyDecomposer, Group, Spec, Target
from compresskit.decomposers.low_rank import LowRankSpec
from compresskit.decomposers.registry import METHODS, get, register
from compresskit.decomposers.tensor_train import TensorTrainSpec
from compresskit.decomposers.tucker import TuckerSpec
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import find_targets
from compresskit.planning.blocks import Pick, Proposal, _fronts, _Option, blocks_of
from compresskit.planning.planner import Plan, make_plan
from compresskit.planning.recipe import Recipe, Rule, for_method


def plant(model: PreTrainedModel, names: Sequence[str], method: str, spec: Spec, chance: torch.Generator) -> None:
    """Give the matrices whose name holds one of ``names`` random weights of just this structure."""
    targets = [target for target in find_targets(model) if any(name in target.name for name in names)]
    for group in get(method).groups(targets):
        layers = get(method).layers(group, spec)
        for parameter in (p for layer in layers.values() for name, p in layer.named_parameters() if name != "bias"):
            parameter.data = torch.randn(parameter.shape, generator=chance)
        for target in group.targets:
            weight = layers[target.name].dense_weight().detach()
            model.get_submodule(target.name).weight.data = 0.05 * weight / weight.std()


@pytest.fixture(scope="module")
def planted() -> PreTrainedModel:
    """A model with another structure in every block."""
    model, chance = tiny_model(), torch.Generator().manual_seed(0)
    wide = next(target for target in find_targets(model) if "intermediate" in target.name)
    plant(model, ["attention"], "tucker", TuckerSpec(rank_out=8, rank_in=8), chance)
    plant(model, ["intermediate"], "kronecker", get("kronecker").candidates(Group("w", (wide,)), 400)[0], chance)
    plant(model, ["0.output.dense", "1.output.dense"], "low-rank", LowRankSpec(rank=6), chance)
    plant(model, ["word_embeddings"], "tensor-train", TensorTrainSpec(blocks=(4, 2), ranks=(8, 8)), chance)
    return model


def methods(plan: Plan) -> dict[str, str]:
    own = ("pooler", "position_embeddings")  # in which nothing is planted
    return {t.name: a.method for a in plan.assignments for t in a.group.targets if not any(n in t.name for n in own)}


EXPECTED = {
    "word_embeddings": "tensor-train",
    "attention": "tucker",
    "intermediate": "kronecker",
    "layer.0.output": "low-rank",
    "layer.1.output": "low-rank",
}


@pytest.mark.parametrize("calibrated", [False, True])
def test_planted_structure_is_found(planted: PreTrainedModel, bench_folder: Path, calibrated: bool) -> None:
    statistics = None
    if calibrated:
        tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
        statistics = calibrate(planted, tokenizer, find_corpus(bench_folder / "text.txt"), 2000)
    source = ModelWeights(planted)
    plan = make_plan(planted, for_method("auto", 6), source, statistics=statistics, predict_errors=True)
    assert 6 <= plan.ratio <= 6.06
    for name, method in methods(plan).items():
        assert method == next(value for part, value in EXPECTED.items() if part in name), name
    for assignment in plan.assignments:
        if "pooler" not in assignment.group.name and "position" not in assignment.group.name:
            assert (assignment.output_error if calibrated else assignment.error) < 0.02


def test_no_worse_than_any_method_by_least_error(bench_folder: Path) -> None:
    model = tiny_model(seed=3)
    for method, ratio in (("low-rank", 3), ("tucker", 5), ("tensor-train", 5), ("kronecker", 3)):

        def energy(name: str, ratio: float = ratio) -> float:
            plan = make_plan(model, for_method(name, ratio, "error"), ModelWeights(model), predict_errors=True)
            norms = {
                a.group.name: sum(
                    float(model.get_submodule(t.name).weight.detach().square().sum()) for t in a.group.targets
                )
                for a in plan.assignments
            }
            return sum(a.error**2 * norms[a.group.name] for a in plan.assignments)

        assert energy("auto") <= 1.02 * energy(method)  # bounds of Tucker and of several trains are not exact


def test_compressed_saved_and_loaded(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    model = str(bench_folder / "model")
    result = run("compress", "--model", model, "--method", "auto", "--ratio", "4", "--calibration", "--output", "auto")
    assert result.code == 0, result.err
    loaded = compresskit.load("auto")
    assert 4 <= count(tiny_model()) / count(loaded) <= 4.04
    result = run("compress", "--model", model, "--recipe", "auto/recipe.yaml", "--calibration", "--output", "again")
    assert result.code == 0, result.err
    assert torch.equal(outputs(compresskit.load("again")), outputs(loaded))
    assert "auto" in run("methods").out


@pytest.mark.parametrize("method", ["auto", "kronecker"])
def test_latency_costs_little_error(method: str) -> None:
    model = tiny_model(seed=3)

    def figures(objective: str) -> tuple[float, float, int]:
        recipe = for_method(method, 4, "error", objective=objective)
        plan = make_plan(model, recipe, ModelWeights(model), predict_errors=True)
        energy = sum(
            a.error**2 * float(sum(model.get_submodule(t.name).weight.detach().square().sum() for t in a.group.targets))
            for a in plan.assignments
        )
        return energy, sum(get(a.method).time(a.group, a.spec) for a in plan.assignments), plan.parameters_after

    (least, slow, size), (energy, fast, small) = figures("size"), figures("latency")
    assert fast < slow
    assert energy < 1.08 * least  # 5 %, by bounds that are not exact
    assert count(model) / 4.04 <= min(size, small) <= max(size, small) <= count(model) / 4


def test_latency_keeps_what_is_faster_for_every_matrix() -> None:
    """Specs that lose on the first matrix are not tried on others, but those that win time."""
    group = Group("t", (Target("t", "linear", "ffn", (64, 64)),))
    proposal = Proposal(group, get("low-rank"), Rule(role=("ffn",), method="low-rank"))
    figures = {1: (100, 0.5, 9.0), 2: (100, 0.6, 5.0), 3: (110, 0.5, 9.0), 4: (200, 0.1, 20.0)}
    options = [
        _Option((Pick(proposal, LowRankSpec(rank=rank)),), size, penalty, time, penalty)
        for rank, (size, penalty, time) in figures.items()
    ]
    ranks = [[spec.rank for spec in _fronts([proposal], options, fast=fast)[0]] for fast in (False, True)]
    assert ranks == [[1, 4], [1, 2, 4]]


def test_in_a_benchmark(bench_folder: Path, tmp_path: Path) -> None:
    records = tiny_bench(bench_folder, tmp_path / "out", methods=("auto",), calibration_tokens=1000).records
    assert [(record.method, record.status) for record in records] == [("dense", "finished"), ("auto", "finished")]


def test_beside_other_rules() -> None:
    rules = (Rule(role=("embedding",), method="low-rank"), Rule(role=("attention", "ffn", "head"), method="auto"))
    recipe = Recipe(version=1, name="mix", ratio=5, allocation="error", rules=rules)
    model = tiny_model()
    plan = make_plan(model, recipe, ModelWeights(model))
    assert methods(plan)["embeddings.word_embeddings"] == "low-rank"
    with pytest.raises(InputError, match="auto chooses by error"):
        Recipe(version=1, name="mix", ratio=5, rules=rules).checked()
    with pytest.raises(InputError, match="auto chooses by error"):
        compresskit.compress(model, method="auto", ratio=5, allocation="uniform")
    with pytest.raises(InputError, match="already registered by compresskit"):
        register(type("Auto", (type(get("low-rank")),), {"name": "auto"}))


def test_blocks_and_partitions() -> None:
    """A method that pairs matrices, one that takes each alone, and one that knows only some of them."""
    targets = [Target(f"t{i}", "linear", "ffn", (8, 8)) for i in range(4)]
    alone = [Group(target.name, (target,)) for target in targets]
    pairs = [Group("p0", tuple(targets[:2])), Group("p1", tuple(targets[2:]))]
    rule = Rule(role=("ffn",), method="auto")

    def proposals(method: str, groups: Sequence[Group]) -> list[Proposal]:
        decomposer: AnyDecomposer = METHODS.all()[method]
        return [Proposal(group, decomposer, rule) for group in groups]

    given = [*proposals("low-rank", alone), *proposals("tucker", pairs[:1]), *proposals("kronecker", alone[1:])]
    found = [
        [[(part[0].group.name, [one.decomposer.name for one in part]) for part in partition] for partition in block]
        for block in blocks_of(given)
    ]
    both = ["low-rank", "kronecker"]
    assert sorted(found, key=len, reverse=True) == [
        [[("p0", ["tucker"])], [("t0", ["low-rank"]), ("t1", both)]],
        [[("t2", both)]],
        [[("t3", both)]],
    ]
