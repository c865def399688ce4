"""Tasks: declarations, reading, labels, scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import transformers
from conftest import tiny_model, write_tsv

import compresskit
from compresskit.errors import InputError
from compresskit.model.positions import positions
from compresskit.storage.files import read_rows
from compresskit.tasks import metrics
from compresskit.tasks.labels import map_labels
from compresskit.tasks.loading import load_data, load_task, shipped_tasks
from compresskit.tasks.registry import KINDS

GLUE = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}

OWN = """version: 1
name: own
inputs: [text]
label: kind
files: {train: train.FORMAT, dev: dev.FORMAT}
metrics: [accuracy, f1]
"""


def own_task(folder: Path, kind: str, text: str = OWN) -> Path:
    path = folder / "own.yaml"
    path.write_text(text.replace("FORMAT", kind), encoding="utf-8")
    return path


def test_shipped_tasks_are_valid() -> None:
    tasks = {name: load_task(name) for name in shipped_tasks()}
    assert set(tasks) >= GLUE | {"squad", "squad_v2", "imdb", "paws", "hans"}
    for name, task in tasks.items():
        assert task.name == name
        assert task.hub is not None or name in {
            "conll2003",
            "wnut17",
            "trecqa",
        }  # their files alone are known to be readable
        for other in task.transfer_of:
            labels = {task.map_labels.get(label, label) for label in tasks[other].labels}
            assert labels == set(task.labels)  # every label of the source means something here


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet", "csv.gz"])
def test_own_task_in_every_format(tmp_path: Path, kind: str) -> None:
    rows = [{"text": 'a "quoted", text', "kind": "x"}, {"text": "b\tc" if kind != "tsv" else "b c", "kind": "y"}]
    for split in ("train", "dev"):
        path = tmp_path / f"{split}.{kind}"
        if kind == "parquet":
            pandas.DataFrame(rows).to_parquet(path)
        elif kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        elif kind == "tsv":
            write_tsv(path, "text\tkind", [(row["text"], row["kind"]) for row in rows])
        else:
            pandas.DataFrame(rows).to_csv(path, index=False)
    data = load_data(load_task(own_task(tmp_path, kind)), tmp_path)
    assert data.labels == ("x", "y")
    assert list(data.splits["dev"].texts) == [(row["text"],) for row in rows]
    assert data.splits["train"].targets == ["x", "y"]
    assert data.notes == ("task own: labels found: x, y",)


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '\n [\n{"a": 1},\n{"a": 2}\n]\n', '{"a": 1}\n\n{"a": 2}\n'])
def test_json_is_one_object_a_line_or_one_array(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert read_rows(path) == ([{"a": 1}, {"a": 2}], 0)
    for bad, words in (
        ("[1, 2]", "entry 1: must be a JSON object"),
        ("[{}, ", "not a valid JSON array"),
        ("[]", "no rows"),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=words):
            read_rows(path)


def test_glue_layout_variants_and_hold_out(tmp_path: Path) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [(str(i), "0", "0", f"question {i}", "other", str(i % 2)) for i in range(50)]
    write_tsv(tmp_path / "QQP" / "train.sample.tsv", header, [*rows, ("broken", "line")])
    data = load_data(load_task("qqp"), tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 45, "dev": 5}
    assert set(data.splits["train"].texts).isdisjoint(data.splits["dev"].texts)
    assert "sample" in data.splits["train"].remark
    assert "seed 0" in data.splits["dev"].remark
    assert any("1 lines with the wrong number of fields" in note for note in data.notes)
    assert data.splits["dev"].texts == load_data(load_task("qqp"), tmp_path / "QQP").splits["dev"].texts
    assert data.record()["train"]["sha256"]
    # Evaluating alone needs no training rows.
    assert set(load_data(load_task("qqp"), tmp_path, train=False).splits) == {"dev"}


def test_a_folder_of_several_tasks(tmp_path: Path) -> None:
    """Each in a folder by its name; what lies in the folder itself comes first."""
    write_tsv(tmp_path / "goemotions" / "train.tsv", "good plot\t0,3\tx", [("bad", "1", "y"), ("it is", "0", "z")] * 9)
    (tmp_path / "wnut17").mkdir()
    (tmp_path / "wnut17" / "train.conll").write_text("Ada\tB-person\nwrote\tO\n\n" * 9)
    for name, source in (("goemotions", "train.tsv"), ("wnut17", "train.conll")):
        assert load_data(load_task(name), tmp_path).splits["train"].source.startswith(source)
    (tmp_path / "train.conll").write_text("Ada\tB-group\nwrote\tO\n\n" * 9)
    assert load_data(load_task("wnut17"), tmp_path).labels == ("O", "B-group", "I-group")
    with pytest.raises(InputError, match=r"has no .*train.csv .*\(task trecqa\)"):
        load_data(load_task("trecqa"), tmp_path)


def test_exact_file_wins_over_a_variant(tmp_path: Path) -> None:
    for name in ("train.tsv", "train.sample.tsv", "dev.tsv"):
        write_tsv(tmp_path / "SST-2" / name, "sentence\tlabel", [("a", "0"), (name, "1")])
    data = load_data(load_task("sst2"), tmp_path)
    assert data.splits["train"].texts[1] == ("train.tsv",)
    assert data.splits["train"].remark == ""


def test_labels_follow_the_model() -> None:
    task = load_task("sst2")
    model = tiny_model(head="classifier")
    labels = ("negative", "positive")
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    assert map_labels(task, labels, model).single == {"negative": 1, "positive": 0}
    assert map_labels(task, labels, model).note is None
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    found = map_labels(task, labels, model)
    assert found.single == {"negative": 0, "positive": 1}
    assert "negative, positive" in (found.note or "")
    model.config.id2label = {0: "yes", 1: "no"}
    with pytest.raises(InputError, match="the model has yes, no; task sst2 has negative, positive"):
        map_labels(task, labels, model)


def test_labels_that_differ_in_case_only(tmp_path: Path) -> None:
    task = load_task(own_task(tmp_path, "tsv"))
    model = tiny_model(head="classifier")
    model.config.id2label = {0: "a", 1: "A"}
    assert map_labels(task, ("A", "a"), model).single == {"A": 1, "a": 0}


def test_a_dev_file_may_lack_a_rare_label(tmp_path: Path) -> None:
    task = load_task(own_task(tmp_path, "tsv"))
    model = tiny_model(head="classifier", num_labels=3)
    model.config.id2label = {0: "x", 1: "rare", 2: "y"}
    assert map_labels(task, ("x", "y"), model).numbers == {"x": (0,), "y": (2,), "rare": (1,)}


def test_transfer_adds_up_labels_that_mean_the_same() -> None:
    model = tiny_model(head="classifier", num_labels=3)
    hans = load_task("hans")
    for names in (("entailment", "neutral", "contradiction"), ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")):
        model.config.id2label = dict(enumerate(names))
        found = map_labels(hans, tuple(hans.labels), model)
        entails = [name.lower() for name in names].index("entailment")
        assert found.numbers == {
            "entailment": (entails,),
            "non-entailment": tuple(number for number in range(3) if number != entails),
        }
        assert " or " in (found.note or "")  # the mapping is stated
    model.config.id2label = {0: "not_entailment", 1: "entailment", 2: "other"}
    with pytest.raises(InputError, match="labels differ"):
        map_labels(hans, tuple(hans.labels), model)


def test_paws_with_and_without_a_header(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a" / "paws_wiki_dev.tsv", "one\ttwo\t1", [("three", "four", "0")])
    write_tsv(tmp_path / "b" / "paws_wiki_dev.tsv", "id\tsentence1\tsentence2\tlabel",
              [("1", "one", "two", "1"), ("2", "three", "four", "0")])  # fmt: skip
    found = [load_data(load_task("paws"), tmp_path / name, train=False).splits["dev"] for name in ("a", "b")]
    assert found[0].texts == found[1].texts == [("one", "two"), ("three", "four")]
    assert found[0].targets == found[1].targets == ["paraphrase", "different"]


def test_evaluation_against_a_plain_loop(bench_folder: Path) -> None:
    import torch

    model = transformers.AutoModelForSequenceClassification.from_pretrained(bench_folder / "teacher").eval()
    words = transformers.AutoTokenizer.from_pretrained(bench_folder / "teacher")
    right = []
    for line in (bench_folder / "data" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]:
        text, label = line.split("\t")
        with torch.no_grad():
            right.append(int(model(**words(text, return_tensors="pt")).logits.argmax()) == int(label))
    result = compresskit.evaluate(bench_folder / "teacher", task="sst2", data=bench_folder / "data", max_length=32)
    assert result.record["scores"] == {"dev": {"accuracy": pytest.approx(np.mean(right))}}
    assert result.record["data"]["dev"]["rows"] == len(right)


def test_regression_and_pairs(bench_folder: Path, tmp_path: Path) -> None:
    task = tmp_path / "similar.yaml"
    task.write_text(
        "version: 1\nname: similar\nkind: regression\ninputs: [one, two]\nlabel: score\n"
        "files: {train: rows.tsv}\nmetrics: [pearson_spearman, pearson, spearman]\n"
    )
    rows = [(w, "good" if i % 2 else "bad", str(5 * (i % 2) + i / 100)) for i, w in enumerate(["the", "film"] * 60)]
    write_tsv(tmp_path / "rows.tsv", "one\ttwo\tscore", rows)
    result = compresskit.finetune(
        bench_folder / "model", task=task, data=tmp_path, learning_rate=3e-3, epochs=10, max_length=16, device="cpu"
    )
    assert result.model.config.num_labels == 1
    scores = result.record["scores"]["student_after"]["dev"]
    assert scores["pearson"] > 0.8
    assert scores["pearson_spearman"] == pytest.approx((scores["pearson"] + scores["spearman"]) / 2)
    assert any("held out" in note for note in result.notes)


def test_metrics() -> None:
    truth, guess = np.array([1, 0, 1, 1, 0, 0]), np.array([1, 0, 0, 1, 1, 0])
    assert metrics.OF_CLASSES["accuracy"](truth, guess, 2) == pytest.approx(4 / 6)
    assert metrics.OF_CLASSES["f1"](truth, guess, 2) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.OF_CLASSES["matthews"](truth, guess, 2) == pytest.approx((2 * 2 - 1 * 1) / 9)
    three = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])
    assert metrics.OF_CLASSES["f1"](*three, 3) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)  # macro
    assert metrics.OF_CLASSES["f1"](truth, guess, 3) == pytest.approx(4 / 9)  # also over the class that no row has
    numbers = np.array([1.0, 2.0, 3.0, 4.0])
    assert metrics.OF_NUMBERS["spearman"](numbers, numbers**3, 0) == pytest.approx(1)
    assert metrics.OF_NUMBERS["pearson"](numbers, 2 * numbers + 1, 0) == pytest.approx(1)
    assert metrics.OF_NUMBERS["pearson"](numbers, np.ones(4), 0) == 0  # no correlation is defined
    assert metrics.OF_NUMBERS["spearman"](numbers[:1], numbers[:1], 0) == 0


def test_positions() -> None:
    assert positions(tiny_model("bert")) == 40
    assert positions(tiny_model("roberta")) == 38  # it starts to count behind the padding


def test_encoding_cuts_and_keeps_lengths(tokenizer, tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", "text\tkind", [("the film " * 20, "x"), ("good", "y")])
    write_tsv(tmp_path / "dev.tsv", "text\tkind", [("good", "y")])
    task = load_task(own_task(tmp_path, "tsv"))
    data = load_data(task, tmp_path)
    model = tiny_model(head="classifier", id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    encoded = KINDS.get(task.kind).encode(data, data.splits["train"], tokenizer, 12, model)
    assert encoded["length"] == [12, 3]
    assert encoded["labels"] == [0, 1]
    assert "attention_mask" not in encoded.column_names
