"""Benchmarks over several tasks and models, and in bf16."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_bench, tiny_model, weights, write_tsv
from transformers import AutoModel

import compresskit
from compresskit.benchmark.baselines.layers import with_fewer_layers
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.store import Store
from compresskit.errors import InputError
from compresskit.planning.recipe import for_method

STAGE = {"max_length": 32, "learning_rate": 3e-3, "epochs": 2}


@pytest.mark.sweep
def test_regression_spans_and_their_mean(bench_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "similar.yaml").write_text(
        "version: 1\nname: similar\nkind: regression\ninputs: [one, two]\nlabel: score\n"
        "files: {train: rows.tsv}\nmetrics: [pearson, spearman]\n"
    )
    words = ["the", "film"] * 60
    rows = [(word, "good" if i % 2 else "bad", str(5 * (i % 2) + i / 100)) for i, word in enumerate(words)]
    write_tsv(tmp_path / "rows.tsv", "one\ttwo\tscore", rows)
    for name, number in (("train-v1.1.json", 80), ("dev-v1.1.json", 10)):
        paragraphs = []
        for word in ("good", "awful") * (number // 2):
            question = {"question": "how", "answers": [{"text": word, "answer_start": 13}]}
            paragraphs.append({"context": f"the film was {word}", "qas": [question]})
        (tmp_path / name).write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    result = tiny_bench(
        bench_folder,
        tmp_path / "out",
        tasks=(str(tmp_path / "similar.yaml"), "squad"),
        data=str(tmp_path),
        baselines=("dense", "half-layers"),
        general=False,
        teacher=STAGE | {"epochs": 10},  # a teacher that has learnt which way the scores go
        task=STAGE,
    )
    assert [record.status for record in result.records] == ["finished"] * 6
    metrics = {record.task: record.metric for record in result.records}
    assert metrics == {"similar": "pearson", "squad": "span_f1"}
    for record in result.records:
        assert record.score == record.scores["dev"][record.metric]
    students = [record for record in result.records if record.method == "low-rank"]
    teachers = [record for record in result.records if record.method == "dense"]
    kept = sum(record.score for record in students) / sum(record.score for record in teachers)
    text = (result.folder / "README.md").read_text()
    assert "**all tasks**" in text
    row = next(line for line in text.splitlines() if line.startswith("| low-rank |"))
    assert f"{100 * kept:.1f} %" in row


@pytest.mark.sweep
def test_two_models_in_bf16(bench_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "three-layers"
    tiny_model(num_hidden_layers=3, seed=5).save_pretrained(other)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, other)
    result = tiny_bench(
        bench_folder,
        tmp_path / "out",
        models=(str(bench_folder / "model"), str(other)),
        methods=("tucker",),
        baselines=("dense", "int8", "half-layers"),
        precision="bf16",
    )
    assert [record.status for record in result.records] == ["finished"] * 8
    for record in result.records:
        if record.method == "half-layers":
            assert record.made_by.layers == {"model": "1 of 2", "three-layers": "1 of 3"}[record.model]
        if record.kind == "student":
            assert record.made_by.general.precision == "bf16"
            (folder,) = (result.folder / "cells").glob(f"{record.model}-tucker-*/model")
            # Shared factors belong to the role whose matrices they make, once.
            model = AutoModel.from_pretrained(folder)
            parts = dict.fromkeys(record.parameters_by_role, 0)
            for name, parameter in model.named_parameters():
                parts[_role(name)] += parameter.numel()
                assert parameter.dtype == torch.float32  # stored as the checkpoint was
            assert parts == record.parameters_by_role
            assert parts["attention"] > 0
            assert parts["ffn"] > 0
    text = (result.folder / "README.md").read_text()
    assert "**model: without labels**" in text
    assert "**three-layers: without labels**" in text
    teachers = {record.model: record.scores["retrieval teacher"] for record in result.records}
    for model, score in teachers.items():
        assert f"{model}: teacher {100 * score:.1f}" in text
    assert "- half-layers: 1 of 3 layers of three-layers" in text
    with (result.folder / "results.csv").open(newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"model", "three-layers"}


def _role(name: str) -> str:
    """By the names of BERT's modules and of the owners of shared factors, not by the code under test."""
    if "word_embeddings" in name:
        return "embedding"
    if "attention" in name and "LayerNorm" not in name:
        return "attention"
    if ("intermediate" in name or "output.dense" in name or "ffn" in name) and "LayerNorm" not in name:
        return "ffn"
    return "head" if "pooler" in name else "rest"


@pytest.mark.parametrize(("layers", "left"), [(4, [0, 2]), (3, [0]), (6, [0, 2, 4]), (6, [0, 2, 3, 5]), (5, [0, 3])])
def test_fewer_layers_are_evenly_spread(layers: int, left: list[int]) -> None:
    model = transformers.BertModel(tiny_model(num_hidden_layers=layers).config)
    smaller = with_fewer_layers(model, len(left))
    assert len(smaller.encoder.layer) == len(left)
    for place, layer in enumerate(left):
        ours, theirs = smaller.encoder.layer[place], model.encoder.layer[layer]
        assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight)
    assert isinstance(compresskit.compress(smaller, method="low-rank", ratio=2), transformers.BertModel)


@pytest.mark.sweep
def test_one_stage_1_for_all_tasks_and_seeds(bench_folder: Path, tmp_path: Path) -> None:
    declared = "version: 1\nname: {}\ninputs: [sentence]\nlabel: label\nmetrics: [accuracy]\n"
    declared += "files: {{train: SST-2/train.tsv, dev: SST-2/dev.tsv}}\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(declared.format(name))
    grid = {
        "tasks": tuple(str(tmp_path / f"{name}.yaml") for name in ("one", "two")),
        "data": str(bench_folder / "data"),
        "seeds": (0, 1),
        "teacher": STAGE,
        "task": {**STAGE, "epochs": 1},
    }
    shared = tiny_bench(bench_folder, tmp_path / "shared", share_general=True, **grid)
    assert [record.status for record in shared.records] == ["finished"] * 6
    starts = sorted((tmp_path / "shared" / "general").iterdir())
    assert [start.name.rpartition("-")[0] for start in starts] == ["model-low-rank-3x"]
    gone = starts[0].with_name("of-another-configuration")
    gone.mkdir()
    (gone / ".lock").touch()
    tiny_bench(bench_folder, tmp_path / "shared", share_general=True, overwrite=True, **grid)
    assert sorted((tmp_path / "shared" / "general").iterdir()) == starts
    own = tiny_bench(bench_folder, tmp_path / "own", **{**grid, "seeds": (0,), "tasks": grid["tasks"][1:]})
    assert not (tmp_path / "own" / "general").exists()
    students = {
        (record.task, record.method, record.seed): (
            record.score_before,
            record.score,
            record.made_by.general.seed,
        )
        for record in shared.records
        if record.method != "dense"
    }
    for record in own.records:  # the first seed goes the same way, shared or not; that is repeatable too
        if record.method != "dense":
            assert students[record.task, record.method, 0] == (record.score_before, record.score, 0)
            assert students[record.task, record.method, 1][2] == 0
    with pytest.raises(compresskit.InputError, match="nothing to share"):
        tiny_bench(bench_folder, tmp_path / "none", share_general=True)


def test_students_of_the_task_s_teacher(bench_folder: Path, tmp_path: Path) -> None:
    grid = {
        "tasks": ("sst2",),
        "data": str(bench_folder / "data"),
        "seeds": (0, 1),
        "baselines": ("dense", "half-layers"),
        "students_from": "teacher",
        "allocation": "error",
        "calibration_tokens": 1000,
        "general": False,
        "teacher": STAGE,
        "task": {**STAGE, "epochs": 1},
    }
    result = tiny_bench(bench_folder, tmp_path / "out", **grid)
    assert [record.status for record in result.records] == ["finished"] * 5
    shared = sorted((tmp_path / "out" / "general").iterdir())  # compressed once for both seeds
    assert [one.name.rpartition("-")[0] for one in shared] == ["model-half-layers-sst2", "model-low-rank-3x-sst2"]
    teacher = next((result.folder / "cells").glob("*dense*")) / "model"
    data = bench_folder / "data"
    recipe = for_method("low-rank", 3.0, "error", calibration_tokens=1000)
    made = compresskit.compress(teacher, recipe=recipe, calibration_task="sst2", data=data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    score = compresskit.evaluate(made, task="sst2", data=data, tokenizer=tokenizer, max_length=32).record["scores"]
    students = [record for record in result.records if record.method == "low-rank"]
    assert {record.score_before for record in students} == {score["dev"]["accuracy"]}
    assert students[0].made_by.calibration.text.task == "sst2"
    assert students[0].made_by.calibration.weighed_by == "predictions"
    halved = with_fewer_layers(transformers.AutoModelForSequenceClassification.from_pretrained(teacher), 1).state_dict()
    assert all(torch.equal(tensor, halved[name]) for name, tensor in weights(shared[0] / "compressed").items())
    text = (result.folder / "README.md").read_text()
    assert "the task's teacher" in text
    assert "(sst2)" in text
    for change in ({"general": {"max_tokens": 100}}, {"tasks": (), "data": None}):
        with pytest.raises(compresskit.InputError, match="students_from: teacher is for tasks without stage 1"):
            tiny_bench(bench_folder, tmp_path / "none", **{**grid, **change})


@pytest.mark.sweep
def test_one_task_may_have_other_seeds_and_settings(bench_folder: Path, tmp_path: Path) -> None:
    declared = "version: 1\nname: {}\ninputs: [sentence]\nlabel: label\nmetrics: [accuracy]\n"
    declared += "files: {{train: SST-2/train.tsv, dev: SST-2/dev.tsv}}\n"
    one, two = (str(tmp_path / f"{name}.yaml") for name in ("one", "two"))
    for path in (one, two):
        Path(path).write_text(declared.format(Path(path).stem))
    grid = {
        "tasks": (one, two),
        "data": str(bench_folder / "data"),
        "seeds": (0, 1),
        "general": False,
        "teacher": STAGE,
        "task": {**STAGE, "epochs": 1},
        "per_task": {two: {"seeds": (1,), "task": {"epochs": 3}}},
    }
    result = tiny_bench(bench_folder, tmp_path / "out", **grid)
    rows = {(record.task, record.method, record.seed): record for record in result.records}
    assert list(rows) == [
        ("one", "dense", 0),
        ("one", "low-rank", 0),
        ("one", "low-rank", 1),
        ("two", "dense", 1),
        ("two", "low-rank", 1),
    ]
    assert {name: rows[name].made_by.task_stage.epochs for name in rows} == {
        name: 3 if name[0] == "two" else 1 for name in rows
    }
    assert rows["two", "low-rank", 1].made_by.teacher.learning_rate == 3e-3
    # All tasks: the mean over seeds of (one with that seed + two with the seed it has) over the same of the teachers.
    students = [rows["one", "low-rank", seed].score + rows["two", "low-rank", 1].score for seed in (0, 1)]
    kept = sum(students) / 2 / (rows["one", "dense", 0].score + rows["two", "dense", 1].score)
    text = (result.folder / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| low-rank |"))
    assert f"{100 * kept:.1f} " in row
    assert "- Seeds, one: 0, 1\n- Seeds, two: 1\n" in text
    assert "per_task:\n  two.yaml:" in (result.folder / "grid.yaml").read_text()  # the name that tasks have there
    with pytest.raises(compresskit.InputError, match="task of per_task"):
        tiny_bench(bench_folder, tmp_path / "other", **{**grid, "per_task": {"cola": {"seeds": (1,)}}})
    # Fewer tasks than a recipe has: what it says of the others does not matter.
    base = {"models": (str(bench_folder / "model"),), "text": str(bench_folder / "text.txt"), "latency_rounds": 1}
    base |= {"methods": ("low-rank",), "ratios": (3,), "baselines": ("dense",)}
    recipe = Grid.model_validate({**base, **grid, "per_task": {**grid["per_task"], one: {"seeds": (0,)}}})
    less = compresskit.bench(recipe, output=tmp_path / "less", tasks=(two,))
    found = {(record.task, record.method, record.seed): record.score for record in less.records}
    assert found == {name: rows[name].score for name in (("two", "dense", 1), ("two", "low-rank", 1))}


def test_variants(bench_folder: Path, tmp_path: Path) -> None:
    grid = {
        "methods": ("low-rank", "tucker"),
        "variants": {
            "calibrated": {"methods": ("low-rank",), "calibration_tokens": 1000},
            "hidden-alone": {"general": {"losses": {"embedding": 0.0}}},
        },
    }
    plain = tiny_bench(bench_folder, tmp_path / "out", methods=grid["methods"])
    result = tiny_bench(bench_folder, tmp_path / "out", **grid)
    names = ["low-rank", "low-rank + calibrated", "low-rank + hidden-alone", "tucker", "tucker + hidden-alone"]
    assert [record.method for record in result.records] == ["dense", *names]
    losses = {"hidden": 2.0, "embedding": 1.0}
    grown = Grid(general={"losses": losses}, variants=grid["variants"]).of(None, "hidden-alone").general
    assert grown == {"losses": {"hidden": 2.0, "embedding": 0.0}}
    found = {record.method: record for record in result.records}
    assert {record.status for record in result.records} == {"finished"}
    for record in plain.records:  # what a grid has without variants is kept
        assert record.key == found[record.method].key
        assert record.made_by == found[record.method].made_by
    usual, calibrated, hidden = (found[name] for name in names[:3])
    assert calibrated.made_by.recipe["calibration_tokens"] == 1000
    assert calibrated.error > usual.error  # of the weights
    assert usual.made_by.general.losses == {"embedding": 1.0, "hidden": 1.0}
    assert hidden.made_by.general.losses == {"hidden": 1.0}
    assert hidden.made_by.general.max_tokens == usual.made_by.general.max_tokens
    assert hidden.error == usual.error
    assert hidden.score != usual.score
    assert len(list((tmp_path / "out" / "cells").glob("model-low-rank-calibrated-3x-seed0-*/model"))) == 1
    text = (result.folder / "README.md").read_text()
    assert "| low-rank + calibrated |" in text
    assert "- Variant: hidden-alone: general: losses (embedding 0.0)" in text
    assert Store(result.folder).grid().variants["calibrated"].methods == ("low-rank",)


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"general": {"learning_rat": 1}}, "unknown key 'learning_rat'"),
        ({"methods": ("tucker",)}, "unknown method of variants 'tucker'"),
        ({"general": False}, "nothing would be trained"),
        ({"students_from": "teacher"}, "students_from: teacher is for tasks"),
        ({"seeds": (1,)}, "unknown key 'seeds'"),
    ],
)
def test_variants_are_checked(bench_folder: Path, tmp_path: Path, variant: dict[str, object], says: str) -> None:
    with pytest.raises(compresskit.InputError, match=says):
        tiny_bench(bench_folder, tmp_path / "out", variants={"other": variant})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["task", "teacher"])
def test_settings_of_tasks_need_one_that_is_trained_on(name: str, tmp_path: Path) -> None:
    """They were taken without a task, as by --task-epochs, and changed nothing."""
    changes: dict[str, Any] = {name: {"epochs": 2}}
    for grid in (Grid(), Grid(tasks=("stsb-similarity",), unit=("sentence",))):
        with pytest.raises(InputError, match=f"{name}: are settings of trainings on a task"):
            compresskit.bench(grid, output=tmp_path / "out", **changes)
