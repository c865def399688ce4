"""Rankings: scores against scikit-learn and plain arithmetic, left-out queries, margins, CrossEncoder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FILLERS, NEGATIVE, Run, refused, reviews, tiny_model
from datasets import Dataset
from sklearn.metrics import average_precision_score, ndcg_score
from torch.nn import functional as F
from transformers import AutoTokenizer

import compresskit
from compresskit import InputError
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.predictions import Counts
from compresskit.tasks.ranking import Relevance, of_query
from compresskit.tasks.registry import KINDS
from compresskit.training.batches import LengthBatchSampler

TASK = """version: 1
name: answers
kind: ranking
inputs: [question, text]
label: relevance
files: {train: train.csv, dev: dev.csv}
metrics: [map, mrr@10, ndcg@10]
"""
Lines = list[tuple[str, str, str]]
SETTINGS: dict[str, Any] = {"max_length": 40, "device": "cpu", "learning_rate": 5e-3}


def questions(count: int, seed: int) -> Lines:
    """Queries of six texts each, of which those with a positive word are relevant; every query has both sorts."""
    lines: Lines = []
    for query in range(count):
        texts = reviews(4, 1000 * seed + query)
        texts += [(f"{NEGATIVE[query % 4]} movie", "0"), (f"{FILLERS[query % 15]} great", "1")]
        lines += [(f"{FILLERS[query % 15]} {FILLERS[query // 15]}", text, label) for text, label in texts]
    return lines


def write(folder: Path, train: Lines, dev: Lines | None = None) -> Path:
    for name, lines in (("train", train), ("dev", train if dev is None else dev)):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("question", "text", "relevance"), *lines])
    (folder / "answers.yaml").write_text(TASK)
    return folder / "answers.yaml"


def test_scores_are_those_of_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    for size in (2, 7, 30):
        for graded in (False, True):
            targets = chance.integers(0, 4 if graded else 2, size).astype(float)
            targets[:2] = 0, 1
            scores = chance.standard_normal(size)
            found = of_query(targets, scores)
            assert found is not None
            assert found[0] == pytest.approx(average_precision_score(targets > 0, scores))
            assert found[2] == pytest.approx(ndcg_score([targets], [scores], k=10))
            ranks = 1 + np.flatnonzero(targets[np.argsort(-scores)] > 0)
            assert found[1] == (1 / ranks[0] if ranks[0] <= 10 else 0)


def test_equal_scores_gain_nothing_by_the_order_of_the_file() -> None:
    flat = np.zeros(12)
    best = np.array([1.0, *[0.0] * 11])
    assert of_query(best, flat) == of_query(best[::-1], flat) == (pytest.approx(1 / 12), 0.0, 0.0)
    assert of_query(np.ones(3), flat[:3]) is None
    assert of_query(np.zeros(3), flat[:3]) is None


def test_queries_without_both_sorts_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [("a", "x", "1"), ("b", "x", "0"), ("a", "y", "0"), ("b", "y", "0"), ("c", "x", "2"), ("d", "x", "0")]
    data = load_data(load_task(write(tmp_path, lines)), tmp_path)
    kind, model = KINDS.get("ranking"), tiny_model(head="classifier", num_labels=1)
    assert kind.match(data, model) == (
        "dev: 3 of 4 queries are left out of the scores: 2 have no relevant text, 1 no other"
    )
    scores = kind.measure(Scoring(model, None, 8), data, data.splits["dev"], [2.0, 9.0, 1.0, 8.0, 7.0, 9.0])
    assert scores == {"map": 1.0, "mrr@10": 1.0, "ndcg@10": 1.0}
    assert data.splits["train"].targets == [1.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    columns = kind.numbered(data, data.splits["train"], {}, model)
    assert columns == {"labels": [0.5, 0.0, 0.0, 0.0, 1.0, 0.0]}  # shares of the highest relevance
    two = tiny_model(head="classifier", num_labels=2, id2label={0: "Yes", 1: "No"}, label2id={"Yes": 0, "No": 1})
    assert kind.numbered(data, data.splits["train"], {}, two) == {"labels": [0, 1, 1, 1, 0, 1]}


def test_whole_queries_are_held_out(tmp_path: Path) -> None:
    task = write(tmp_path, questions(20, 0))
    (tmp_path / "dev.csv").unlink()
    data = load_data(load_task(task), tmp_path)
    train, dev = ({texts[0] for texts in data.splits[name].texts} for name in ("train", "dev"))
    assert (len(train), len(dev), len(data.splits["dev"])) == (18, 2, 12)
    assert train.isdisjoint(dev)
    (tmp_path / "train.csv").write_text("question,text,relevance\na,x,1\na,y,0\n")
    with pytest.raises(InputError, match="1 groups of rows"):
        load_data(load_task(task), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("dev.csv", ",1\n", ",good\n"), ["dev.csv, row", "column 'relevance' must hold numbers"]),
        (("dev.csv", ",1\n", ",\n"), ["dev.csv, row", "must hold numbers"]),
        (("dev.csv", ",1\n", ",-1\n"), ["dev.csv, row", "must be at least 0, not -1"]),
        (("dev.csv", ",1\n", ",0\n"), ["dev.csv", "no query has relevant texts"]),
        (("answers.yaml", "[map,", "[accuracy,"), ["unknown metric 'accuracy'"]),
        (("answers.yaml", "[question, text]", "[text]"), ["takes 2 inputs: query and text"]),
        (("answers.yaml", "label: relevance", "label: relevance\nlabels: {bad: '0', good: '2'}"), ["'1'"]),
    ],
)
def test_bad_input(
    bench_folder: Path, tmp_path: Path, run: Run, change: tuple[str, str, str], words: list[str]
) -> None:
    task = write(tmp_path, questions(3, 0))
    file, before, after = change
    text = (tmp_path / file).read_bytes().decode().replace("\r\n", "\n")
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    model = bench_folder / "model"
    arguments = (
        "finetune",
        "--model",
        model,
        "--task",
        task,
        "--data",
        tmp_path,
        "--max-length",
        32,
        "--output",
        "out",
    )
    refused(run(*arguments), *words)


def test_heads_that_give_no_score_are_refused(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    task = write(tmp_path, questions(3, 0))
    arguments = ("evaluate", "--task", task, "--data", tmp_path, "--max-length", 32)
    folder = tmp_path / "three"
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    tiny_model(head="classifier", num_labels=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    refused(run(*arguments, "--model", folder), "needs a head with one number or two classes; the model has 3 classes")
    names = {"id2label": {0: "apple", 1: "pear"}, "label2id": {"apple": 0, "pear": 1}}
    tiny_model(head="classifier", **names).save_pretrained(folder)
    refused(run(*arguments, "--model", folder), "which class of the model is the relevant one, apple or pear?")
    task.write_text(TASK + "labels: {apple: '0', pear: '1'}\n")
    assert run(*arguments, "--model", folder).code == 0
    arguments = ("distill", "--teacher", bench_folder / "teacher", "--student", bench_folder / "student")
    arguments = (*arguments, "--logits-loss", "margin", "--output", "out", "--max-length", 32)
    refused(run(*arguments, "--task", "sst2", "--data", bench_folder / "data"), "margin: is for kind ranking")
    refused(run(*arguments, "--text", bench_folder / "text.txt"), "margin: is for pairs of texts")


def test_losses_are_plain_arithmetic() -> None:
    chance = torch.Generator().manual_seed(0)
    predictions = Relevance()
    mask = torch.ones(6, 5)
    count = Counts(*(torch.tensor(float(n)) for n in (30, 150, 6, 6, 30, 30)))
    for outputs in (1, 2):
        ours, theirs = (torch.randn(6, outputs, generator=chance) for _ in range(2))
        labels = torch.tensor([1, 0, 1, 0, 1, 0]).float() if outputs == 1 else torch.tensor([1, 0, 1, 0, 1, 0])
        supervised = predictions.supervised_loss({"logits": ours}, mask, {"labels": labels}, count)
        one = F.binary_cross_entropy_with_logits(ours[:, 0], labels.float())
        assert supervised.item() == pytest.approx(
            (one if outputs == 1 else F.cross_entropy(ours, labels.long())).item()
        )
        models = {"logits": ours}, {"logits": theirs}
        score, taught = (x[:, 0] if outputs == 1 else x[:, 1] - x[:, 0] for x in (ours, theirs))
        margins = F.mse_loss(score[::2] - score[1::2], taught[::2] - taught[1::2])
        found = predictions.logits_loss(*models, mask, {}, count, form="margin", temperature=1)
        assert found.item() == pytest.approx(margins.item(), rel=1e-5)
        # The margin does not see a number that all scores of a query have in common; the squared error does.
        moved = ours + 7 * (torch.arange(outputs) + 1)
        again = predictions.logits_loss({"logits": moved}, models[1], mask, {}, count, form="margin", temperature=1)
        assert again.item() == pytest.approx(found.item(), rel=1e-4)
        squares = predictions.logits_loss(*models, mask, {}, count, form="mse", temperature=1)
        assert squares.item() == pytest.approx(F.mse_loss(ours, theirs).item(), rel=1e-5)


def test_pairs_take_all_texts_and_stay_together(tmp_path: Path) -> None:
    lines = [("a", "x", "1"), ("a", "y", "0"), ("b", "x", "0"), ("a", "z", "0"), ("a", "w", "0"), ("c", "x", "1")]
    split = load_data(load_task(write(tmp_path, lines)), tmp_path).splits["train"]
    assert KINDS.get("ranking").pairs(split) == [0, 1, 0, 3, 0, 4]
    lengths = np.random.default_rng(0).integers(3, 60, 2 * 101)
    whole = list(LengthBatchSampler(lengths, 16, together=2))
    assert sorted(row for batch in whole for row in batch) == list(range(202))
    shares = [
        list(LengthBatchSampler(lengths, 16, world=2, rank=rank, accumulation=2, together=2)) for rank in range(2)
    ]
    for step, batch in enumerate(whole[:-1]):
        parts = [part for share in shares for part in share[2 * step : 2 * step + 2]]
        assert sorted(row for part in parts for row in part) == sorted(batch)
        for part in parts:
            assert [row + 1 for row in part[::2]] == part[1::2]
            assert all(row % 2 == 0 for row in part[::2])


def test_from_a_table_to_a_student(bench_folder: Path, tmp_path: Path) -> None:
    """A teacher, and a student by margins, evaluated from its folder."""
    task = write(tmp_path, questions(60, 0), questions(15, 1))
    settings = SETTINGS | {"task": task, "data": tmp_path}
    teacher = compresskit.finetune(bench_folder / "model", output=tmp_path / "teacher", epochs=6, **settings)
    taught = teacher.record["scores"]["student_after"]["dev"]
    assert set(taught) == {"map", "mrr@10", "ndcg@10"}
    assert taught["map"] > 0.9
    assert teacher.model.config.num_labels == 1
    settings |= {"logits_loss": "margin", "losses": {"supervised": 0, "attention": 0}}
    made = compresskit.distill(
        bench_folder / "student", tmp_path / "teacher", output=tmp_path / "one", max_steps=12, **settings
    )
    record = made.record
    assert set(record["losses"]) == {"embedding", "hidden", "logits"}
    assert any("pairs of a relevant and an irrelevant text" in note for note in record["notes"])
    assert record["scores"]["student_after"]["dev"]["map"] > record["scores"]["student_before"]["dev"]["map"]
    again = compresskit.evaluate(tmp_path / "one", task=task, data=tmp_path, max_length=40, device="cpu")
    assert again.record["scores"]["dev"] == pytest.approx(record["scores"]["student_after"]["dev"])
    with pytest.raises(InputError, match="batch size 6: must be a multiple of 4"):
        compresskit.distill(
            bench_folder / "student", tmp_path / "teacher", batch_size=6, accumulation=2, max_steps=1, **settings
        )


@pytest.mark.parametrize("outputs", [1, 2])
def test_cross_encoder_gives_the_same_scores(bench_folder: Path, tmp_path: Path, outputs: int) -> None:
    """Its own default for one number is a sigmoid, which flattens them: raw logits are compared."""
    package = pytest.importorskip("sentence_transformers")
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    dense = tiny_model(head="classifier", num_labels=outputs)
    dense.classifier.weight.data *= 100  # scores that a sigmoid cannot tell apart
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    student = compresskit.compress(tmp_path / "dense", method="low-rank", ratio=2)
    student.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    lines = questions(4, 3)
    data = load_data(load_task(write(tmp_path, lines)), tmp_path)
    ours = KINDS.get("ranking").answers(Scoring(student, tokenizer, 40), data, data.splits["dev"])
    model = package.CrossEncoder(str(tmp_path / "small"), device="cpu", max_length=40)
    assert any(type(module).__name__ == "LowRankLinear" for module in model.modules())
    pairs = [line[:2] for line in lines]
    theirs = model.predict(pairs, activation_fn=torch.nn.Identity())
    scores = theirs if outputs == 1 else theirs[:, 1] - theirs[:, 0]
    np.testing.assert_allclose(ours, scores, rtol=1e-4, atol=1e-4)
    if outputs == 1:
        flat = model.predict(pairs)
        np.testing.assert_allclose(flat, 1 / (1 + np.exp(-np.array(ours))), atol=1e-5)


def test_a_reranker_trains_from_python_as_any_head_for_a_number(bench_folder: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[2, 5, 3, 6, 3]] * 8, "labels": [0.0, 1.0] * 4})
    teacher = tiny_model(head="classifier", num_labels=1)
    student = compresskit.compress(tiny_model(head="classifier", num_labels=1), method="low-rank", ratio=2)
    made = compresskit.distill(
        student, teacher, dataset=rows, tokenizer=AutoTokenizer.from_pretrained(bench_folder / "model"), max_steps=1
    )
    assert "logits" in made.record["losses"]


def test_two_classes_where_the_declaration_names_them(bench_folder: Path, tmp_path: Path) -> None:
    """In the order of the declaration, of which the relevant one is the first here."""
    task = write(tmp_path, questions(60, 0), questions(15, 1))
    task.write_text(TASK + "labels: {relevant: '1', irrelevant: '0'}\n")
    settings = SETTINGS | {"task": task, "data": tmp_path}
    teacher = compresskit.finetune(bench_folder / "model", output=tmp_path / "teacher", epochs=6, **settings)
    assert teacher.model.config.id2label == {0: "relevant", 1: "irrelevant"}
    assert teacher.record["scores"]["student_after"]["dev"]["map"] > 0.9
    task.write_text(TASK)  # the names alone say it too
    student = compresskit.distill(bench_folder / "student", tmp_path / "teacher", max_steps=2, **settings)
    assert student.record["scores"]["teacher"] == teacher.record["scores"]["student_after"]
    assert student.record["losses"]["logits"] == 1
    weighed = compresskit.finetune(tmp_path / "teacher", new_head=True, max_steps=1, **settings)
    assert weighed.model.config.num_labels == 1
    with pytest.raises(InputError, match="are for heads with classes; this one gives one number"):
        compresskit.finetune(bench_folder / "model", class_weights="balanced", **settings)
