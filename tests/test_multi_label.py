"""Several labels for a text: reading, losses against plain arithmetic, scores against scikit-learn, distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NEGATIVE, POSITIVE, Run, refused, reviews, tiny_model
from datasets import Dataset
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional as F
from transformers import AutoTokenizer

import compresskit
from compresskit import InputError
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.multi_label import SeveralLabels
from compresskit.tasks.predictions import Counts
from compresskit.tasks.registry import KINDS, predictions_of
from compresskit.tasks.rows import Split, TaskData

METRICS = "[macro_f1, micro_f1, average_precision, exact_match]"
TASK = f"""version: 1
name: feelings
kind: multi-label
inputs: [text]
label: labels
files: {{train: train.FORMAT, dev: dev.FORMAT}}
metrics: {METRICS}
"""


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts with the labels good and bad, both, or none."""
    found = []
    for (first, _), (second, _) in zip(reviews(count, seed), reviews(count, seed + 100), strict=True):
        text = f"{first} {second}" if len(found) % 3 else "the"
        words = set(text.split())
        labels = [name for name, known in (("good", POSITIVE), ("bad", NEGATIVE)) if words & set(known)]
        found.append((text, ",".join(labels)))
    return found


def write(folder: Path, train: list[tuple[str, str]], dev: list[tuple[str, str]]) -> Path:
    for name, lines in (("train", train), ("dev", dev)):
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabels", *("\t".join(line) for line in lines)]) + "\n")
    (folder / "feelings.yaml").write_text(TASK.replace("FORMAT", "tsv"))
    return folder / "feelings.yaml"


def test_reading(tmp_path: Path) -> None:
    lines = [("x", "a,b"), ("y", ""), ("z", "b")]
    data = load_data(load_task(write(tmp_path, lines, lines)), tmp_path)
    assert data.labels == ("a", "b")
    assert data.splits["train"].targets == [("a", "b"), (), ("b",)]
    task = (tmp_path / "feelings.yaml").read_text().replace("tsv", "jsonl")
    (tmp_path / "feelings.yaml").write_text(task)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x", "labels": ["a", "b"]}\n{"text": "y", "labels": []}\n')
    assert load_data(load_task(tmp_path / "feelings.yaml"), tmp_path).splits["dev"].targets == [("a", "b"), ()]
    columns = task.replace("label: labels", "label: '*'\nlabels: {a: is_a, b: is_b}").replace("jsonl", "csv")
    (tmp_path / "feelings.yaml").write_text(columns)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,is_a,is_b\nx,1,0\ny,0,0\n")
    assert load_data(load_task(tmp_path / "feelings.yaml"), tmp_path).splits["dev"].targets == [("a",), ()]


def test_scores_count_labels_that_dev_lacks(tmp_path: Path) -> None:
    lines = [("x", "a"), ("y", "b")]
    data = load_data(load_task(write(tmp_path, lines, lines)), tmp_path)
    names = dict(enumerate("abc"))
    model = tiny_model(head="classifier", id2label=names, label2id={name: i for i, name in names.items()})
    kind = KINDS.get("multi-label")
    scores = [np.array([0.9, 0.1, 0.9]), np.array([0.1, 0.1, 0.9])]
    found = kind.measure(Scoring(model, None, 8), data, data.splits["dev"], scores)
    assert found["micro_f1"] == pytest.approx(2 / (2 + 2 + 1))  # one right, two wrong, one missed
    assert found["macro_f1"] == pytest.approx(1 / 3)
    assert kind.match(data, model) == "macro_f1 is the mean over 3 labels; dev has no row of c"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("train.tsv", "a,b", "0,1,0"), ["train.tsv, row 1", "flags of 0 and 1"]),
        (("train.tsv", "a,b", "['a', 'b']"), ["train.tsv, row 1", "no list of labels"]),
        (("train.tsv", "a,b", "a,nan"), ["train.tsv, row 1", "holds no label ('nan')"]),
        (("dev.tsv", "b\n", "c\n"), ["dev.tsv, row", "unknown label 'c'", "known: a, b"]),
        (("dev.tsv", "b\n", "B\n"), ["dev.tsv, row", "unknown label 'B'", "did you mean 'b'"]),
        (("feelings.yaml", "label: labels", "label: labels\nlabels: {A: '1', B: '1'}"), ["have the same value '1'"]),
        (("feelings.yaml", "label: labels", "label: '*'"), ["needs labels"]),
        (("feelings.yaml", "macro_f1", "accuracy"), ["unknown metric 'accuracy'"]),
        (("feelings.yaml", "metrics", "threshold: 30\nmetrics"), ["threshold", "less than 1"]),
    ],
)
def test_bad_input(
    bench_folder: Path, tmp_path: Path, run: Run, change: tuple[str, str, str], words: list[str]
) -> None:
    lines = [("x", "a,b"), ("z", "b")]
    task = write(tmp_path, lines, lines)
    file, before, after = change
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(before, after))
    model = bench_folder / "model"
    refused(run("finetune", "--model", model, "--task", task, "--data", tmp_path, "--output", tmp_path / "o"), *words)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["a;b", "a,b"], r"row 1 has ';' between labels \('a;b'\), row 2 has ',' between labels"),
        (["a", "b,a;c"], r"row 2 has ',' .*, row 2 has ';'"),
        (["a", "b,a;c|d"], r"row 2 has ',' .*, row 2 has ';'"),
        ([["a"], "a,b"], r"row 1 is a list \(\['a'\]\), row 2 has ','"),
        (["a,b", "A"], r"row 1 and row 2: labels 'a' and 'A'"),
        (["a", "b", "a b"], r"row 3: 'a b' seems to be several labels"),
        ([["a", 1], "b"], r"row 1 and row 1: labels 'a' and 1 .* different kinds"),
        ([[True, False], "b"], r"row 1: \[True, False\] is no list of labels"),
        ([None, "b"], "row 1: None is no list of labels"),
        ([[0, 1], [1, 0]], "holds 0 and 1 alone: flags take a column for each label"),
    ],
)
def test_columns_that_are_read_in_more_than_one_way(tmp_path: Path, cells: list[Any], words: str) -> None:
    for declared in ("", "labels: {a: a, b: b, c: c}\n"):
        if declared and any(found in words for found in ("labels '", "several", "alone")):
            continue
        (tmp_path / "feelings.yaml").write_text(TASK.replace("FORMAT", "jsonl") + declared)
        for name in ("train", "dev"):
            lines = [json.dumps({"text": "x", "labels": cell}) for cell in cells]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        with pytest.raises(InputError, match=words):
            load_data(load_task(tmp_path / "feelings.yaml"), tmp_path)


def test_heads_of_another_kind_are_refused(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    task = write(tmp_path, [("x", "a,b")], [("x", "b")])
    answer = run(
        "evaluate", "--model", bench_folder / "teacher", "--task", task, "--data", tmp_path, "--max-length", 16
    )
    refused(answer, "needs a head for several labels at once")


def test_losses_are_plain_arithmetic() -> None:
    model = tiny_model(head="classifier", num_labels=3, problem_type="multi_label_classification")
    predictions = predictions_of(model)
    assert isinstance(predictions, SeveralLabels)
    chance = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(4, 3, generator=chance), torch.randn(4, 3, generator=chance)
    labels = torch.randint(2, (4, 3), generator=chance).float()
    mask, count = (
        torch.ones(4, 5),
        Counts(*(torch.tensor(float(n)) for n in (20, 100, 4, predictions.count({"labels": labels}), 12, 20))),
    )
    supervised = predictions.supervised_loss({"logits": ours}, mask, {"labels": labels}, count)
    assert supervised.item() == pytest.approx(F.binary_cross_entropy_with_logits(ours, labels).item())
    options = {"form": "kl", "temperature": 2.0}
    taught = predictions.logits_loss({"logits": ours}, {"logits": theirs}, mask, {}, count, **options)
    p, q = torch.sigmoid(theirs / 2), torch.sigmoid(ours / 2)
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert taught.item() == pytest.approx(4 * divergence.mean().item(), rel=1e-4)
    same = predictions.logits_loss({"logits": ours}, {"logits": ours}, mask, {}, count, **options)
    assert same.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_from_a_table_to_a_student(bench_folder: Path, tmp_path: Path) -> None:
    task = write(tmp_path, rows(300, 0), rows(60, 1))
    settings = {"task": task, "data": tmp_path, "max_length": 40, "device": "cpu", "learning_rate": 5e-3, "epochs": 6}
    teacher = compresskit.finetune(bench_folder / "model", output=tmp_path / "teacher", **settings)
    taught = teacher.record["scores"]["student_after"]["dev"]
    assert taught["macro_f1"] > 0.75
    student = compresskit.distill(
        bench_folder / "student", tmp_path / "teacher", output=tmp_path / "student", **settings
    )
    assert "logits" in student.record["losses"]
    before, after = (student.record["scores"][who]["dev"] for who in ("student_before", "student_after"))
    assert after["macro_f1"] > before["macro_f1"] + 0.1
    assert after["average_precision"] > before["average_precision"]
    again = compresskit.evaluate(tmp_path / "student", task=task, data=tmp_path, max_length=40, device="cpu")
    assert again.record["scores"]["dev"] == pytest.approx(after)


def test_scores_are_those_of_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    wanted, scores = chance.integers(0, 2, (30, 3)), chance.random((30, 3))
    task = Task(version=1, name="x", kind="multi-label", inputs=("t",), label="l", metrics=("macro_f1",))
    targets = [tuple(name for name, flag in zip("abc", row, strict=True) if flag) for row in wanted]
    split = Split([("",)] * 30, targets, "x")
    names = dict(enumerate("abc"))
    model = tiny_model(head="classifier", id2label=names, label2id={name: i for i, name in names.items()})
    scoring = Scoring(model, None, 8)
    found = KINDS.get("multi-label").measure(
        scoring, TaskData(task, {"dev": split}, ("a", "b", "c")), split, list(scores)
    )
    assert found["macro_f1"] == pytest.approx(f1_score(wanted, scores >= 0.5, average="macro"))
    assert found["micro_f1"] == pytest.approx(f1_score(wanted, scores >= 0.5, average="micro"))
    assert found["average_precision"] == pytest.approx(average_precision_score(wanted, scores))


def test_a_declared_threshold_decides_what_counts(tmp_path: Path) -> None:
    chance = np.random.default_rng(2)
    wanted, scores = chance.integers(0, 2, (30, 2)), chance.random((30, 2))
    lines = [("x", ",".join(name for name, flag in zip("ab", row, strict=True) if flag)) for row in wanted]
    path = write(tmp_path, lines, lines)
    path.write_text(path.read_text() + "threshold: 0.3\n")
    data = load_data(load_task(path), tmp_path)
    names = dict(enumerate("ab"))
    model = tiny_model(head="classifier", id2label=names, label2id={name: i for i, name in names.items()})
    kind, scoring, dev = KINDS.get("multi-label"), Scoring(model, None, 8), data.splits["dev"]
    found = kind.measure(scoring, data, dev, list(scores))
    assert found["macro_f1"] == pytest.approx(f1_score(wanted, scores >= 0.3, average="macro"))
    assert found["macro_f1"] != pytest.approx(f1_score(wanted, scores >= 0.5, average="macro"))
    tables = kind.report(scoring, data, dev, list(scores)).tables
    assert tables["by label"]["macro avg"]["f1"] == pytest.approx(found["macro_f1"])
    assert tables["by threshold"]["from 0.3"]["macro_f1"] == pytest.approx(found["macro_f1"])
    tried = tables["by threshold"]["from 0.7"]["micro_f1"]
    assert tried == pytest.approx(f1_score(wanted, scores >= 0.7, average="micro"))
    other = path.read_text().replace("multi-label", "classification").replace(METRICS, "[accuracy]")
    path.write_text(other)
    with pytest.raises(InputError, match="threshold is for kinds with several labels"):
        load_task(path)


def test_one_label_is_scored_by_itself() -> None:
    """scikit-learn takes one column for two classes, of which it gives the mean."""
    chance = np.random.default_rng(1)
    wanted, scores = chance.integers(0, 2, 30), chance.random(30)
    task = Task(version=1, name="x", kind="multi-label", inputs=("t",), label="l", metrics=("macro_f1",))
    split = Split([("",)] * 30, [("spam",) if flag else () for flag in wanted], "x")
    model = tiny_model(head="classifier", id2label={0: "spam"}, label2id={"spam": 0})
    kind, data, answers = KINDS.get("multi-label"), TaskData(task, {"dev": split}, ("spam",)), list(scores[:, None])
    found = kind.measure(Scoring(model, None, 8), data, split, answers)
    assert found["macro_f1"] == found["micro_f1"] == pytest.approx(f1_score(wanted, scores >= 0.5))
    assert found["average_precision"] == pytest.approx(average_precision_score(wanted, scores))
    row = kind.report(Scoring(model, None, 8), data, split, answers).tables["by label"]["spam"]
    assert row["f1"] == pytest.approx(found["macro_f1"])
    assert row["support"] == wanted.sum()


def test_a_data_set_from_python(bench_folder: Path) -> None:
    config = {"num_labels": 3, "problem_type": "multi_label_classification"}
    teacher = tiny_model(head="classifier", **config)
    student = compresskit.compress(tiny_model(head="classifier", **config), method="low-rank", ratio=2)
    rows = [{"input_ids": [2, *range(5, 6 + n), 3], "labels": [n % 2, 1, 0]} for n in range(12)]
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    result = compresskit.distill(
        student, teacher, dataset=Dataset.from_list(rows), tokenizer=tokenizer, max_steps=2, device="cpu", batch_size=4
    )
    assert {"logits", "supervised"} <= set(result.record["losses"])


def test_a_teacher_of_another_problem_type_is_refused(bench_folder: Path, tmp_path: Path) -> None:
    plain, several = (tiny_model(head="classifier", problem_type=kind) for kind in (None, "multi_label_classification"))
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    for name, model in (("plain", plain), ("several", several)):
        model.save_pretrained(tmp_path / name)
        compresskit.compress(model, method="low-rank", ratio=2).save_pretrained(tmp_path / f"{name}-small")
        for folder in (name, f"{name}-small"):
            tokenizer.save_pretrained(tmp_path / folder)
    rows = Dataset.from_list([{"input_ids": [2, 7, 8, 3]}] * 4)
    for student, teacher in (("plain-small", "several"), ("several-small", "plain")):
        with pytest.raises(InputError, match="its head is for"):
            compresskit.distill(tmp_path / student, tmp_path / teacher, dataset=rows, device="cpu", max_steps=1)
