"""Tags for words: CoNLL and JSON lines, schemes, tokens that carry a tag, scores against seqeval, distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import FILLERS, NEGATIVE, POSITIVE, Run, refused, reviews, tiny_model
from seqeval.metrics import classification_report
from transformers import AutoTokenizer

import compresskit
from compresskit import InputError
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.registry import KINDS
from compresskit.tasks.tags import repaired

TASK = """version: 1
name: words
kind: tags
inputs: [tokens]
label: tags
files: {train: train.conll, dev: [dev.conll, dev.jsonl]}
metrics: [entity_f1, entity_precision, entity_recall, accuracy]
"""


def sentences(rows: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Words of which one is an entity, of a type that the word decides."""
    found = []
    for text, _ in reviews(rows, seed):
        words = text.split()
        tags = ["B-good" if word in POSITIVE else "B-bad" if word in NEGATIVE else "O" for word in words]
        found.append((words, tags))
    return found


def write(folder: Path, train: Any, dev: Any) -> Path:
    """A folder with a task of such sentences, ``train`` in columns and ``dev`` as JSON lines."""
    lines = ["-DOCSTART- O", ""]
    for words, tags in train:
        lines += [*(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)), "\t"]
    (folder / "train.conll").write_text("\n".join(lines))
    rows = (json.dumps({"tokens": words, "tags": tags}) for words, tags in dev)
    (folder / "dev.jsonl").write_text("\n".join(rows))
    (folder / "words.yaml").write_text(TASK)
    return folder / "words.yaml"


def test_schemes_are_spelt_alike() -> None:
    assert repaired(["I-a", "I-a", "O", "I-b", "B-b"], "") == ["B-a", "I-a", "O", "B-b", "B-b"]
    assert repaired(["B-a", "I-b"], "") == ["B-a", "B-b"]
    assert repaired(["U-a", "B-a", "L-a", "E-a"], "") == ["S-a", "B-a", "E-a", "S-a"]
    for tag in ("X-a", "B", "B-", "person"):
        with pytest.raises(InputError, match="row 3: tag"):
            repaired([tag], "row 3")


def test_reading(tmp_path: Path) -> None:
    task = write(tmp_path, [(["a", "b"], ["I-x", "O"]), (["c"], ["B-y"])], [(["a"], ["O"])])
    data = load_data(load_task(task), tmp_path)
    assert data.splits["train"].texts == [(["a", "b"],), (["c"],)]
    assert data.splits["train"].targets == [["B-x", "O"], ["B-y"]]
    assert data.labels == ("O", "B-x", "I-x", "B-y", "I-y")
    assert any("1 tags were rewritten" in note for note in data.notes)
    spaces = (tmp_path / "train.conll").read_text().replace("\t", " ")
    (tmp_path / "train.conll").write_text(spaces)
    assert load_data(load_task(task), tmp_path).splits["train"].targets == [["B-x", "O"], ["B-y"]]


@pytest.mark.parametrize(
    ("train", "dev", "words"),
    [
        ("a B-x\nb\n", None, ["train.conll, line 2", "1 columns, expected two or more"]),
        ("a B-x\nb Q-x\n", None, ["train.conll, row 1", "'Q-x' is neither O nor of the form"]),
        ("\n\n", None, ["train.conll", "no sentences"]),
        (None, {"tokens": ["a", "b"], "tags": ["O"]}, ["dev.jsonl, row 1", "has 2 words and 1 tags"]),
        (None, {"tokens": ["a"], "tags": ["B-new"]}, ["dev.jsonl, row 1", "unknown tag 'B-new'", "known: O, B-x"]),
        (None, {"tokens": "a", "tags": ["O"]}, ["dev.jsonl, row 1", "must hold a list of words"]),
        (None, {"tokens": ["a"], "tags": "O"}, ["dev.jsonl, row 1", "must hold a list of tags"]),
    ],
)
def test_bad_files(
    bench_folder: Path, tmp_path: Path, run: Run, train: str | None, dev: dict[str, Any] | None, words: list[str]
) -> None:
    task = write(tmp_path, [(["a", "b"], ["B-x", "O"])], [(["a"], ["O"])])
    if train is not None:
        (tmp_path / "train.conll").write_text(train)
    if dev is not None:
        (tmp_path / "dev.jsonl").write_text(json.dumps(dev))
    answer = run(
        "finetune", "--model", bench_folder / "model", "--task", task, "--data", tmp_path, "--output", tmp_path / "o"
    )
    refused(answer, *words)


def test_the_first_token_of_a_word_carries_its_tag(bench_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    long = "".join(FILLERS[:2])  # of several pieces
    rows = [(["the", long, "x"], ["O", "B-x", "O"]), (["the", "x"] * 5, ["O", "O"] * 5)]
    data = load_data(load_task(write(tmp_path, rows, rows)), tmp_path)
    names = dict(enumerate(data.labels))
    model = tiny_model(head="tokens", id2label=names, label2id={name: number for number, name in names.items()})
    kind = KINDS.get("tags")
    encoded = kind.encode(data, data.splits["train"], tokenizer, 32, model)
    pieces = len(tokenizer(long, add_special_tokens=False)["input_ids"])
    assert pieces > 1
    assert encoded["labels"][0] == [-100, 0, 1, *[-100] * (pieces - 1), 0, -100]
    short = kind.encode(data, data.splits["train"], tokenizer, 3, model)
    assert (
        kind.cut(data.splits["train"], short, 3) == "11 of 13 training words have no token of their own within 3 tokens"
    )
    assert kind.cut(data.splits["train"], encoded, 32) is None
    answers, _ = kind.answers(Scoring(model, tokenizer, 3), data, data.splits["dev"])
    assert len(answers) == 3
    assert answers[1:] == ["O", "O"]  # what was cut off is outside
    whole = Scoring(model, tokenizer, 32)
    right = kind.answers(whole, data, data.splits["dev"])
    tokenizer.padding_side = "left"
    assert kind.answers(whole, data, data.splits["dev"]) == right


@pytest.mark.slow
def test_from_columns_to_a_student(bench_folder: Path, tmp_path: Path) -> None:
    task = write(tmp_path, sentences(300, 0), sentences(60, 1))
    settings = {"task": task, "data": tmp_path, "max_length": 32, "device": "cpu"}
    teacher = compresskit.finetune(
        bench_folder / "model", output=tmp_path / "teacher", learning_rate=5e-3, epochs=6, **settings
    )
    taught = teacher.record["scores"]["student_after"]["dev"]
    assert taught["entity_f1"] > 0.9
    student = compresskit.distill(
        bench_folder / "student",
        tmp_path / "teacher",
        learning_rate=5e-3,
        epochs=6,
        teacher_outputs=tmp_path / "outputs",
        output=tmp_path / "student",
        **settings,
    )
    assert set(student.record["losses"]) == {"embedding", "attention", "hidden", "logits", "supervised"}
    scores = student.record["scores"]["student_after"]["dev"]
    assert scores["entity_f1"] > 0.8
    again = compresskit.evaluate(tmp_path / "student", task=task, data=tmp_path, max_length=32, device="cpu")
    assert again.record["scores"]["dev"] == pytest.approx(scores)
    data = load_data(load_task(task), tmp_path, train=False)
    model = compresskit.load(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    answers = KINDS.get("tags").answers(Scoring(model, tokenizer, 32), data, data.splits["dev"])
    report = classification_report(data.splits["dev"].targets, answers, output_dict=True)
    assert scores["entity_f1"] == pytest.approx(report["micro avg"]["f1-score"])
    compresskit.compress(  # calibration on a task's rows, weighed by predictions
        tmp_path / "teacher", method="low-rank", ratio=3, allocation="error", calibration_task=task, data=tmp_path
    )
