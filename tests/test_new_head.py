"""Another start: a checkpoint whose head was trained on another task, with a new last layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused, tiny_bench, tiny_model
from transformers import AutoTokenizer

import compresskit
from compresskit import InputError
from compresskit.benchmark import keys
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.rows import Row
from compresskit.folders.training import read_stages
from compresskit.tasks.loading import load_task
from compresskit.training.reading import with_new_head

NAMES = ("entailment", "neutral", "contradiction")
SST2 = ("negative", "positive")
SETTINGS: dict[str, Any] = {"max_length": 32, "device": "cpu", "max_steps": 2}


def labelled(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


@pytest.fixture(scope="module")
def other(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``dense``, a classifier of three classes, and its student ``small``."""
    root = tmp_path_factory.mktemp("other")
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    tiny_model(head="classifier", **labelled(*NAMES)).save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    compresskit.compress(root / "dense", method="low-rank", ratio=3).save_pretrained(root / "small")
    tokenizer.save_pretrained(root / "small")
    return root


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("names", [NAMES, ("no", "yes")])
def test_the_last_layer_alone_is_new(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_model(family, "classifier", **labelled(*names)).half()
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"labels differ.*--new-head"):
        with_new_head(tmp_path / "m", load_task("sst2"), SST2)
    torch.manual_seed(5)
    found = with_new_head(tmp_path / "m", load_task("sst2"), SST2, forget=True)
    assert found.replaced_head == names
    assert any(f"the last layer of its head ({', '.join(names)}) is replaced" in note for note in found.notes)
    assert (found.model.dtype, found.model.config.num_labels) == (torch.float16, 2)
    assert found.model.config.id2label == dict(enumerate(SST2))
    new = {"classifier.weight", "classifier.bias"}
    new = {name.replace("classifier", "classifier.out_proj") for name in new} if family == "roberta" else new
    assert set(found.untrained) == new
    stored = model.state_dict()
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, stored[name]) != (name in new)
        if name in new:
            assert 0 <= weight.float().std(unbiased=False) < 0.03
    assert found.model(input_ids=torch.tensor([[2, 5, 3]]), attention_mask=torch.ones(1, 3)).logits.isfinite().all()


def test_heads_of_other_kinds_are_replaced_too(bench_folder: Path, tmp_path: Path) -> None:
    one, classes = load_task("stsb"), load_task("sst2")
    tiny_model(head="tokens", **labelled("O", "B-x", "I-x")).save_pretrained(tmp_path / "tags")
    assert with_new_head(tmp_path / "tags", classes, SST2, forget=True).model.config.num_labels == 2
    tiny_model(head="classifier", **labelled(*NAMES), problem_type="single_label_classification").save_pretrained(
        tmp_path / "mnli"
    )
    for task in (one, load_task("trecqa")):
        config = with_new_head(tmp_path / "mnli", task, (), forget=True).model.config
        assert config.num_labels == 1
        assert config.problem_type == ("regression" if task is one else None)
    tiny_model(head="classifier", num_labels=1, problem_type="regression").save_pretrained(tmp_path / "number")
    config = with_new_head(tmp_path / "number", classes, SST2, forget=True).model.config
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")
    # A checkpoint without a head gets a new one as ever.
    assert with_new_head(bench_folder / "model", classes, SST2, forget=True).replaced_head is None


def test_teacher_and_student_start_from_another_task(bench_folder: Path, other: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"task": "sst2", "data": bench_folder / "data"}
    with pytest.raises(InputError, match=r"labels differ.*--new-head"):
        compresskit.finetune(other / "dense", **settings)
    compresskit.finetune(other / "dense", output=tmp_path / "teacher", new_head=True, **settings)
    (record,) = read_stages(tmp_path / "teacher")
    assert record["student"]["replaced_head"] == list(NAMES)
    assert any("is replaced" in note for note in record["notes"])
    tuned = compresskit.finetune(other / "small", new_head=True, **settings)
    assert tuned.record["student"]["replaced_head"] == list(NAMES)

    with pytest.raises(InputError, match=r"labels differ.*--new-head"):
        compresskit.distill(other / "small", tmp_path / "teacher", **settings)
    made = compresskit.distill(
        other / "small", tmp_path / "teacher", output=tmp_path / "student", new_head=True, **settings
    )
    assert made.record["student"]["replaced_head"] == list(NAMES)
    assert "replaced_head" not in made.record["teacher"]
    assert any("copied from the teacher: classifier.bias, classifier.weight" in note for note in made.notes)
    assert compresskit.load(tmp_path / "student").config.id2label == dict(enumerate(SST2))
    plain = compresskit.distill(bench_folder / "student", tmp_path / "teacher", **settings)
    assert "replaced_head" not in plain.record["student"]


def test_where_it_has_no_meaning_it_is_refused(bench_folder: Path, other: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("distill", "--student", other / "small", "--teacher", other / "dense", "--new-head")
    refused(run(*arguments, "--text", bench_folder / "text.txt", "--output", "out"), "new_head: is for tasks")
    settings = SETTINGS | {"task": "sst2", "data": bench_folder / "data", "new_head": True}
    with pytest.raises(InputError, match="is for a model in a folder"):
        compresskit.finetune(tiny_model(head="classifier"), **settings)
    recipe = tmp_path / "last.yaml"
    recipe.write_text("version: 1\nname: last\nrules:\n  - {match: classifier, method: low-rank, rank: 1}\n")
    compresskit.compress(other / "dense", recipe=recipe).save_pretrained(tmp_path / "last")
    AutoTokenizer.from_pretrained(other / "dense").save_pretrained(tmp_path / "last")
    with pytest.raises(InputError, match="the head, classifier, is factorised and cannot be replaced"):
        compresskit.finetune(tmp_path / "last", **settings)


def test_a_run_with_a_new_head_is_resumed_with_it(bench_folder: Path, other: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"task": "sst2", "data": bench_folder / "data", "output": tmp_path / "out"}
    tokenizer = AutoTokenizer.from_pretrained(other / "dense")
    tiny_model(head="classifier", **labelled("POSITIVE", "NEGATIVE")).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compresskit.finetune(tmp_path / "m", new_head=True, progress=stop, **settings)
    with pytest.raises(InputError, match="belongs to a run with another student"):
        compresskit.finetune(tmp_path / "m", resume=True, **settings)
    compresskit.finetune(tmp_path / "m", resume=True, new_head=True, **settings)


def test_benchmark_of_teachers_with_a_new_head(bench_folder: Path, other: Path, tmp_path: Path) -> None:
    ground = keys.Ground({"name": "bert"}, {"source": "text"}, {}, None, {"name": "sst2"}, {})
    row = Row(None, "sst2", 0, "dense", baseline="dense")
    usual = {"tasks": ("sst2",), "general": False, "students_from": "teacher"}
    settings = [keys.settings(row, Grid(**usual, teacher=teacher), ground) for teacher in ({}, {"new_head": True})]
    assert settings[0] != settings[1]
    assert settings[0] == keys.settings(row, Grid(**usual, teacher={"new_head": False}), ground)
    for wrong in ({"task": {"new_head": True}}, {"teacher": {"new_head": True}, "students_from": "checkpoint"}):
        with pytest.raises(InputError, match="new_head is for teacher"):
            Grid(**(usual | wrong)).checked()
    short = {"max_steps": 2, "max_length": 32}
    changes = usual | {"data": str(bench_folder / "data"), "teacher": short | {"new_head": True}, "task": short}
    result = tiny_bench(bench_folder, tmp_path / "bench", models=(str(other / "dense"),), **changes)
    assert {record.status for record in result.records} == {"finished"}
    page = (tmp_path / "bench" / "README.md").read_text()
    assert "from a head of another task" in page
