"""Schedules, class weights, early stopping and gradient checkpointing: what they do, and what they leave alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import PartialState
from conftest import Run, refused, reviews, same, tiny_bench, tiny_model, write_tsv
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import AutoTokenizer, TrainerCallback

import compresskit
from compresskit import InputError
from compresskit.benchmark import keys
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.provenance import Training
from compresskit.benchmark.rows import Row
from compresskit.planning.recipe import Recipe, for_method
from compresskit.planning.stage import DEFAULTS, Stage
from compresskit.tasks.class_weights import class_weights
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.losses import IGNORED, supervised_loss

SETTINGS: dict[str, Any] = {"task": "sst2", "max_length": 32, "device": "cpu", "learning_rate": 3e-3}


@pytest.fixture
def settings(bench_folder: Path) -> dict[str, Any]:
    return SETTINGS | {"data": bench_folder / "data"}


UNREAD: dict[str, Any] = {"temperature": 4.0, "logits_loss": "mse", "mask_probability": 0.3, "pooled_loss": "mse"}
UNREAD |= {"dims": (8,)}


@pytest.mark.parametrize("name", UNREAD)
def test_fine_tuning_refuses_settings_of_distillation(name: str, bench_folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"settings: {name}: fine-tuning learns from labels alone"):
        compresskit.finetune(bench_folder / "model", **settings, **{name: UNREAD[name]})


def test_what_a_run_without_files_or_a_given_model_cannot_have(bench_folder: Path, settings: dict[str, Any]) -> None:
    """A run was begun anew, a model answered as what it is; both without a word."""
    with pytest.raises(InputError, match="resume: continues the run of an output"):
        compresskit.finetune(bench_folder / "model", resume=True, **settings)
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    given: dict[str, Any] = {"tokenizer": tokenizer, "as_class": "masked-lm"}
    with pytest.raises(InputError, match="as_class masked-lm: is for a folder"):
        compresskit.predict(tiny_model(head="classifier"), "good", **given)
    with pytest.raises(InputError, match="as_class masked-lm: is for a folder"):
        compresskit.evaluate(tiny_model(head="classifier"), task="sst2", data=bench_folder / "data", **given)


def test_distillation_refuses_what_neither_models_nor_data_make_use_of(bench_folder: Path) -> None:
    """Nothing is hidden where rows have labels, and one number has no temperature: both were ignored."""
    teacher = tiny_model(head="classifier", num_labels=1, problem_type="regression")
    student = compresskit.compress(teacher, method="low-rank", ratio=2)
    rows = Dataset.from_dict({"input_ids": [[2, 7, 8, 3]] * 4, "labels": [0.1, 0.2, 0.3, 0.4]})
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    given: dict[str, Any] = {"dataset": rows, "tokenizer": tokenizer, "device": "cpu"}
    with pytest.raises(InputError, match="mask_probability: no word is hidden here"):
        compresskit.distill(student, teacher, mask_probability=0.3, **given)
    with pytest.raises(InputError, match="temperature: is of the loss logits, which compares the one number"):
        compresskit.distill(student, teacher, temperature=4.0, **given)
    assert compresskit.distill(student, teacher, temperature=1.0, max_steps=1, **given).record["steps"] == 1


# -- keys and records --------------------------------------------------------------------------------------------------


def test_settings_that_change_nothing_leave_no_trace() -> None:
    later = {"schedule", "class_weights", "early_stopping", "score_every"}
    assert not later & DEFAULTS["task"].model_dump(mode="json").keys()
    changed = Stage(
        losses={"supervised": 1}, schedule="cosine", class_weights={"a": 2}, early_stopping=3, score_every=5
    )
    found = changed.model_dump(mode="json")
    assert {name: found[name] for name in later} == {
        "schedule": "cosine",
        "class_weights": {"a": 2.0},
        "early_stopping": 3,
        "score_every": 5,
    }
    assert Stage.model_validate(found) == changed
    ground = keys.Ground({"name": "bert"}, {"source": "text"}, {}, None, {"name": "sst2"}, {})
    row = Row(None, "sst2", 0, "low-rank", recipe=for_method("low-rank", 4), ratio=4.0)
    usual = keys.settings(row, Grid(tasks=("sst2",)), ground)
    for name, value, plain in (
        ("schedule", "cosine", "linear"),
        ("class_weights", "balanced", None),
        ("early_stopping", 2, None),
    ):
        assert keys.settings(row, Grid(tasks=("sst2",), task={name: plain}), ground) == usual
        assert keys.settings(row, Grid(tasks=("sst2",), task={name: value}), ground) != usual
        assert keys.settings(row, Grid(tasks=("sst2",), teacher={name: value}), ground) != usual
    # It changes how a result is computed and not the result.
    assert keys.settings(row, Grid(tasks=("sst2",), task={"gradient_checkpointing": True}), ground) == usual


def test_a_recipe_and_a_benchmark_take_them(bench_folder: Path, tmp_path: Path) -> None:
    stage = {"schedule": "constant", "class_weights": "balanced", "early_stopping": 1}
    rule = {"role": "ffn", "method": "low-rank"}
    recipe = Recipe.model_validate({"version": 1, "name": "r", "ratio": 2, "rules": [rule], "distill": {"task": stage}})
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_defaults=True)) == recipe
    short = {"max_steps": 6, "max_length": 32, "score_every": 2, **stage}
    grid = {"tasks": ("sst2",), "data": str(bench_folder / "data"), "students_from": "teacher", "general": False}
    grid |= {"teacher": short, "task": short}
    result = tiny_bench(bench_folder, tmp_path / "b", **grid)
    assert {record.status for record in result.records} == {"finished"}
    page = (tmp_path / "b" / "README.md").read_text()
    assert "constant schedule, class weights balanced, early stopping after 1 scores" in page
    plain = json.loads(next((tmp_path / "b" / "cells").glob("*low-rank*/record.json")).read_text())
    made = plain["made_by"]["task_stage"]
    assert Training.model_validate(made).model_dump(mode="json") == made
    again = tiny_bench(bench_folder, tmp_path / "b", **grid)
    assert [record.key for record in again.records] == [record.key for record in result.records]


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_falls_as_asked(bench_folder: Path, settings: dict[str, Any], schedule: str) -> None:
    made = compresskit.finetune(
        bench_folder / "model", **settings, max_steps=10, warmup=0.2, schedule=schedule, batch_size=4
    )
    assert made.record.get("schedule", "linear") == schedule
    rates = [entry["learning_rate"] / settings["learning_rate"] for entry in made.record["log"]]
    after = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "constant": lambda x: 1.0}
    expected = [step / 2 if step < 2 else after[schedule]((step - 2) / 8) for step in range(10)]
    assert rates == pytest.approx(expected) or rates == pytest.approx([*expected[1:], after[schedule](1.0)])


# -- class weights -----------------------------------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0, 0, 0, 2, 2, 0, 2, 0, 0, 1]
    numbers = {"a": 0, "b": 1, "c": 2, "rare": 3}
    found = class_weights("balanced", labels, numbers, 4)
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=np.array(labels))
    assert found[:3].tolist() == pytest.approx(theirs.tolist())
    words = [[*labels[:4], IGNORED], labels[4:]]
    assert torch.equal(class_weights("balanced", words, numbers, 4), found)


def test_given_weights_are_those_of_torch() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 0, IGNORED])
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    weights = class_weights({"B": 3, "c": 0.5}, labels.tolist(), {"a": 0, "b": 1, "c": 2}, 3)
    ours = supervised_loss(logits, labels, 6, weights)
    assert ours.item() == pytest.approx(F.cross_entropy(logits, labels, torch.tensor([1.0, 3.0, 0.5])).item())


def test_they_weigh_the_loss(bench_folder: Path, tmp_path: Path) -> None:
    rows = [(text, label) for text, label in reviews(80, 0) if label == "0" or int(text[0] < "f")]
    write_tsv(tmp_path / "SST-2" / "train.tsv", "sentence\tlabel", rows)
    write_tsv(tmp_path / "SST-2" / "dev.tsv", "sentence\tlabel", rows)
    model, tokenizer = tiny_model(head="classifier"), AutoTokenizer.from_pretrained(bench_folder / "model")
    model.config.id2label = {0: "positive", 1: "negative"}
    split = load_data(load_task("sst2"), tmp_path).splits["train"]
    batch = tokenizer([text for (text,) in split.texts], padding=True, return_tensors="pt")
    labels = torch.tensor([int(target == "negative") for target in split.targets])
    with torch.no_grad():
        expected = F.cross_entropy(model(**batch).logits, labels, torch.tensor([4.0, 1.0])).item()
    one = SETTINGS | {"data": tmp_path, "tokenizer": tokenizer, "dropout": 0, "max_steps": 1}
    size = len(rows) // 2 * 2
    for accumulation in (1, 2):
        made = compresskit.finetune(
            tiny_model(head="classifier", id2label={0: "positive", 1: "negative"}),
            class_weights={"positive": 4},
            accumulation=accumulation,
            batch_size=size + 2,
            **one,
        )
        assert made.record["log"][0]["loss_supervised"] == pytest.approx(expected, rel=1e-5)
        assert made.record["class_weights"] == {"positive": 4.0}


def test_where_there_are_no_classes_they_are_refused(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    write_tsv(tmp_path / "STS-B" / "train.tsv", "sentence1\tsentence2\tscore", [("a", "b", "1.0"), ("b", "c", "2.0")])
    write_tsv(tmp_path / "STS-B" / "dev.tsv", "sentence1\tsentence2\tscore", [("a", "b", "1.0"), ("b", "c", "2.0")])
    arguments = ("finetune", "--model", bench_folder / "model", "--output", "out", "--max-length", 32)
    stsb = (*arguments, "--task", "stsb", "--data", tmp_path)
    refused(
        run(*stsb, "--class-weight", "balanced"), "class weights: are for kinds with one class", "not for regression"
    )
    sst2 = (*arguments, "--task", "sst2", "--data", bench_folder / "data")
    refused(run(*sst2, "--class-weight", "postive=2"), "unknown class of class_weights 'postive'", "'positive'")
    refused(run(*sst2, "--class-weight", "positive=-2"), "class_weights")
    twice = ("--class-weight", "positive=2", "--class-weight")
    refused(run(*sst2, *twice, "positive=3"), "--class-weight positive: is given twice")
    refused(run(*sst2, *twice, "Positive=3"), "'positive' and 'Positive' are both class positive")
    taught = ("distill", "--student", bench_folder / "student", "--teacher", bench_folder / "teacher", *sst2[3:])
    refused(
        run(*taught, "--class-weight", "positive=2", "--loss", "supervised=0"), "loss supervised, whose weight is 0"
    )
    refused(run(*sst2, "--class-weight", "positive"), "give balanced, or NAME=WEIGHT")
    refused(run(*sst2, "--class-weight", "balanced", "--class-weight", "positive=2"), "takes no other weights")
    zero = ("--class-weight", "positive=0", "--class-weight", "negative=0")
    refused(run(*sst2, *zero), "no class that occurs in the training rows has a weight above 0")
    general = ("distill", "--student", bench_folder / "student", "--teacher", bench_folder / "model", "--output", "out")
    general = (*general, "--text", bench_folder / "text.txt", "--max-length", 32)
    refused(run(*general, "--class-weight", "balanced"), "class_weights: weigh the labels of a task")
    refused(run(*general, "--early-stopping", 2), "early_stopping: goes by the primary metric")
    refused(run(*general, "--score-every", 2), "score_every: is for early_stopping")
    refused(run(*sst2, "--early-stopping", 0), "early_stopping")


def test_sequences_too_few_for_the_parts_of_a_batch_are_told(bench_folder: Path, settings: dict[str, Any]) -> None:
    """400 rows in batches of 21: one row is left, and a batch has three parts."""
    own = settings | {"batch_size": 21, "max_steps": 1}
    notes = [compresskit.finetune(bench_folder / "model", accumulation=parts, **own).notes for parts in (1, 3)]
    told = [
        [note for note in found if note.startswith("1 of 400 sequences are left out of every pass")] for found in notes
    ]
    assert [len(found) for found in told] == [0, 1]


# -- early stopping ----------------------------------------------------------------------------------------------------

STOPPING = {"early_stopping": 3, "score_every": 20, "max_steps": 400, "batch_size": 16}


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_it_stops_and_keeps_the_best(bench_folder: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    made = compresskit.finetune(bench_folder / "model", output=tmp_path / "whole", **settings, **STOPPING)
    record = made.record
    steps, values = zip(*((entry["step"], entry["dev_score"]) for entry in record["dev_scores"]), strict=True)
    assert list(steps) == list(range(20, record["steps"] + 1, 20))
    assert record["steps"] < 400
    best = values.index(max(values))
    assert (record["best_step"], len(values)) == (steps[best], best + 4)
    assert record["scores"]["student_after"]["dev"]["accuracy"] == values[best] > 0.9
    assert record["epochs"] == pytest.approx(record["steps"] / 25)
    again = compresskit.evaluate(tmp_path / "whole", task="sst2", data=settings["data"], max_length=32, device="cpu")
    assert again.record["scores"]["dev"]["accuracy"] == values[best]


@pytest.mark.slow
def test_a_resumed_run_stops_where_the_other_did(bench_folder: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    made = compresskit.finetune(bench_folder / "model", output=tmp_path / "whole", **settings, **STOPPING)
    record, count = made.record, len(made.record["dev_scores"])
    in_memory = compresskit.finetune(bench_folder / "model", **settings, **STOPPING)
    for name, weight in made.model.state_dict().items():
        assert torch.equal(weight, in_memory.model.state_dict()[name])

    broken = settings | STOPPING | {"output": tmp_path / "broken"}
    with pytest.raises(KeyboardInterrupt):
        compresskit.finetune(bench_folder / "model", callbacks=[Interrupt(record["best_step"] + 1)], **broken)
    resumed = compresskit.finetune(bench_folder / "model", resume=True, **broken)
    assert same(tmp_path / "whole", tmp_path / "broken")
    assert resumed.record["dev_scores"] == record["dev_scores"]
    # Killed once it has stopped, while the result is scored: nothing is trained again.
    calls = []

    def scoring(what: str, done: int, total: int) -> None:
        calls.append(what)
        if len(calls) > 3 * (count + 1):
            raise KeyboardInterrupt

    late = settings | STOPPING | {"output": tmp_path / "late"}
    with pytest.raises(KeyboardInterrupt):
        compresskit.finetune(bench_folder / "model", progress=scoring, **late)
    compresskit.finetune(bench_folder / "model", resume=True, callbacks=[Interrupt(record["steps"] + 1)], **late)
    assert same(tmp_path / "whole", tmp_path / "late")


def test_without_progress_it_keeps_the_first(bench_folder: Path, settings: dict[str, Any]) -> None:
    own = settings | {"learning_rate": 1e-12, "early_stopping": 1}
    made = compresskit.distill(bench_folder / "student", bench_folder / "teacher", epochs=5, **own)
    assert [entry["step"] for entry in made.record["dev_scores"]] == [13, 26]  # after every pass over 400 rows
    assert (made.record["best_step"], made.record["steps"]) == (13, 26)
    at_the_end = compresskit.distill(
        bench_folder / "student", bench_folder / "teacher", max_steps=3, **settings, early_stopping=9
    )
    assert [entry["step"] for entry in at_the_end.record["dev_scores"]] == [3]


# -- gradient checkpointing --------------------------------------------------------------------------------------------


def test_checkpointing_changes_no_weight(bench_folder: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    own = settings | {"max_steps": 4, "dropout": 0.1, "losses": {"attention": 1}}
    models = {}
    for name, on in (("plain", False), ("less", True)):
        made = compresskit.distill(
            bench_folder / "student", bench_folder / "teacher", output=tmp_path / name, gradient_checkpointing=on, **own
        )
        assert made.record.get("gradient_checkpointing", False) is on
        models[name] = made.model
    assert same(tmp_path / "plain", tmp_path / "less")
    assert not models["less"].is_activation_checkpointing


def test_a_family_without_it_is_refused(bench_folder: Path, settings: dict[str, Any]) -> None:
    config = transformers.MPNetConfig(
        vocab_size=499, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model = transformers.MPNetForSequenceClassification(config)
    with pytest.raises(InputError, match="MPNetForSequenceClassification does not support it"):
        compresskit.finetune(
            model,
            tokenizer=AutoTokenizer.from_pretrained(bench_folder / "model"),
            gradient_checkpointing=True,
            **settings,
        )


def test_processes_without_an_output_share_no_best_weights(bench_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one alone writes them: the others would look for them in vain after the last step, and die."""
    monkeypatch.setattr(PartialState(cpu=True), "num_processes", 2)  # all instances have one state
    with pytest.raises(InputError, match=r"early_stopping: goes back to weights in a file, .* give an output"):
        compresskit.finetune(
            bench_folder / "teacher",
            task="sst2",
            data=bench_folder / "data",
            early_stopping=1,
            max_length=16,
            device="cpu",
        )
