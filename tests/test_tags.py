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
from compresskit.tasks.rows import TaskData
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


def columns(folder: Path, train: str, more: str = "", metrics: str = "accuracy") -> TaskData:
    """The rows of a file of columns that is both train and dev."""
    for name in ("train", "dev"):
        (folder / f"{name}.conll").write_text(train, encoding="utf-8")
    text = TASK.replace("entity_f1, entity_precision, entity_recall, accuracy", metrics)
    (folder / "words.yaml").write_text(text + more, encoding="utf-8")
    return load_data(load_task(folder / "words.yaml"), folder)


POS = "the\tDET\n#\tSYM\n\n#tag\tX\ncat\tNOUN\n"
WORDS = [(["the", "#"],), (["#tag", "cat"],)]
UNIVERSAL = """# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\tSpaceAfter=No
2.1\tse\t_\tPRON\t_\t_\t_\t_\t_\t_
"""
NAMES = "columns: [id, tokens, lemma, tags, xpos, feats, head, deprel, deps, misc]\n"


def test_comments_and_heads_are_no_words(tmp_path: Path) -> None:
    for before in (
        "",
        "# id 1\n# text = the #\n",
        "#id=1\n",
        "# id\t1\n",
        "tokens\ttags\n",
        "Tokens\tTAGS\n\n",
        "\ufeff",
    ):
        data = columns(tmp_path, before + POS)
        assert data.splits["train"].texts == WORDS
        assert data.labels == ("DET", "NOUN", "SYM", "X")
        assert any("left out" in note for note in data.notes) == (before not in ("", "\ufeff"))
    spaced = columns(tmp_path, "# id 1\n" + POS.replace("\t", " ").replace("\n", "\r\n"))
    assert spaced.splits["train"].texts == WORDS
    data = columns(tmp_path, UNIVERSAL, NAMES)
    assert data.splits["train"].texts == [(["vamos", "nos"],)]
    assert data.splits["train"].targets == [["VERB", "PRON"]]
    assert any("2 lines of comments were left out" in note for note in data.notes)
    assert any("2 lines of CoNLL-U that are no words" in note for note in data.notes)


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        (POS + "\ndog\tnan\n", "", r"train.conll, line 7: holds no tag \('nan'\)"),
        (POS + "\ndog\tN/A\n", "", r"line 7: holds no tag"),
        (POS + "\ndog\t_\n", "", r"line 7: holds no tag"),
        (POS + "\ndog\t\u00a0\n", "", r"line 7: holds no tag"),
        (POS + "\ndog\t\n", "", r"line 7: has 1 columns, expected 2"),
        (POS + "\n\tNOUN\n", "", r"line 7: has 1 columns, expected 2"),
        (POS + "\n#dog\n", "", r"line 7: has 1 columns, expected 2"),
        (POS + "\nthe\tbig\tNOUN\n", "", r"line 7: has 3 columns, expected 2"),
        ("a X\n\n# 17\nb X\n", "", r"line 3: '# 17' may be a comment as well as the word '#'"),
        ("token\tner\n" + POS, "", r"line 1: 'token\\tner' seems to name the columns"),
        ("FORM\tUPOS\n" + POS, "", r"line 1: .* seems to name the columns"),
        (UNIVERSAL, "", "first column holds numbers"),
        (POS + "\ndog\tnoun\n", "", r"row 2 and row 3: labels 'NOUN' and 'noun'"),
    ],
)
def test_lines_that_are_no_words_or_lack_a_tag(tmp_path: Path, text: str, more: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        columns(tmp_path, text, more)


def test_declared_tags_may_be_called_anything(tmp_path: Path) -> None:
    data = columns(tmp_path, "# 17\na _\nb nan\n", "labels: {none: _, number: '17', nan: nan}\n")
    assert data.splits["train"].targets == [["number", "none", "nan"]]


def json_tags(folder: Path, tags: Any, more: str = "", metrics: str = "accuracy") -> list[Any]:
    """The tags of a row of JSON lines whose words are a and b."""
    (folder / "dev.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "tags": tags}) + "\n")
    text = TASK.replace("entity_f1, entity_precision, entity_recall, accuracy", metrics)
    (folder / "words.yaml").write_text(text + more)
    return load_data(load_task(folder / "words.yaml"), folder, train=False).splits["dev"].targets


def test_tags_as_numbers(tmp_path: Path) -> None:
    labels = 'labels: {O: "0", B-x: "1", I-x: "2"}\n'
    for metrics in ("accuracy", "entity_f1"):
        for tags in ([0, 1], ["0", "1"], [0.0, 1.0]):
            assert json_tags(tmp_path, tags, labels, metrics) == [["O", "B-x"]]
    assert json_tags(tmp_path, ["0", "2"], labels, "entity_f1") == [["O", "B-x"]]  # an entity begins with B
    assert json_tags(tmp_path, [10, 9]) == [["10", "9"]]
    with pytest.raises(InputError, match=r"row 1: tag 0 is a number: list the tags under labels \(name: number\)"):
        json_tags(tmp_path, [0, 1], metrics="entity_f1")


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ("O B-x", r"row 1: .* must hold a list of tags, such as \[.*\] in JSON, not 'O B-x'"),
        (["X", None], "row 1, tag 2: holds no tag"),
        (["X", ""], "row 1, tag 2: holds no tag"),
        (["X", float("nan")], "row 1, tag 2: holds no tag"),
        (["X", "None"], "row 1, tag 2: holds no tag"),
        (["X", ["Y"]], "row 1, tag 2: holds several tags"),
        (["X", 1], "row 1 and row 1: labels 'X' and 1"),
    ],
)
def test_tags_that_are_none(tmp_path: Path, tags: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        json_tags(tmp_path, tags)
    if isinstance(tags, str):
        with pytest.raises(InputError, match=words):
            json_tags(tmp_path, tags, metrics="entity_f1")


def test_labels_of_bilou_are_those_of_the_model(tmp_path: Path, bench_folder: Path) -> None:
    names = ("O", "B-x", "I-x", "L-x", "U-x")
    labels = f"labels: {{{', '.join(f'{name}: {name}' for name in names)}}}\n"
    text = "good U-x\nthe O\nbad B-x\nbad I-x\nbad L-x\n"
    model = tiny_model(head="tokens", id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    for given in (text, text.replace("U-", "S-").replace("L-", "E-")):
        data = columns(tmp_path, given, labels, "entity_f1, entity_recall")
        split = data.splits["dev"]
        assert split.targets == [["U-x", "O", "B-x", "I-x", "L-x"]]
        kind = KINDS.get("tags")
        scoring = Scoring(model, tokenizer, 32)
        assert kind.measure(scoring, data, split, split.targets)["entity_f1"] == 1
        assert kind.measure(scoring, data, split, [["U-x", "O", "O", "O", "O"]])["entity_recall"] == 0.5
        assert kind.encode(data, split, tokenizer, 32, model)["labels"] == [[-100, 4, 0, 1, 2, 3, -100]]
    with pytest.raises(InputError, match=r"IOBES \(E, S\) as well as of BILOU"):
        columns(tmp_path, text, labels.replace("O: O", "S-x: S-x"), "entity_f1")


def test_a_word_that_was_cut_off_is_wrong_where_no_tag_is_outside(bench_folder: Path, tmp_path: Path) -> None:
    names = ("B-x", "I-x")
    labels = f"labels: {{{', '.join(f'{name}: {name}' for name in names)}}}\n"
    data = columns(tmp_path, "good B-x\nbad I-x\nthe B-x\n", labels, "entity_recall, accuracy")
    model = tiny_model(head="tokens", id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    kind, scoring, split = KINDS.get("tags"), Scoring(model, None, 32), data.splits["dev"]
    found = kind.measure(scoring, data, split, [["B-x", "I-x", ""]])
    assert found["entity_recall"] == 0.5
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert kind.report(scoring, data, split, [["B-x", "I-x", ""]]).tables["by type"]["x"]["recall"] == 0.5


def test_evaluation_says_what_was_cut(bench_folder: Path, tmp_path: Path) -> None:
    rows = [(["the", "x"] * 5, ["O", "B-x"] * 5)]
    task = write(tmp_path, rows, rows)
    names = ("O", "B-x", "I-x")
    model = tiny_model(head="tokens", id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    arguments = {"task": task, "data": tmp_path, "tokenizer": tokenizer, "device": "cpu"}
    notes = compresskit.evaluate(model, max_length=8, **arguments).notes
    assert "4 of 10 words of dev.jsonl have no token of their own within 8 tokens" in notes
    assert not any("within" in note for note in compresskit.evaluate(model, max_length=32, **arguments).notes)


@pytest.mark.parametrize(
    ("train", "dev", "words"),
    [
        ("a B-x\nb\n", None, ["train.conll, line 2", "1 columns, expected 2"]),
        ("a B-x\nb Q-x\n", None, ["train.conll, row 1", "'Q-x' is neither O nor of the form"]),
        ("\n\n", None, ["train.conll", "no sentences"]),
        (None, {"tokens": ["a", "b"], "tags": ["O"]}, ["dev.jsonl, row 1", "has 2 words and 1 tags"]),
        (None, {"tokens": ["a"], "tags": ["B-new"]}, ["dev.jsonl, row 1", "unknown tag 'B-new'", "known: O, B-x"]),
        (None, {"tokens": ["a"], "tags": []}, ["dev.jsonl, row 1", "has 1 words and 0 tags"]),
        (None, {"tokens": [], "tags": []}, ["dev.jsonl, row 1", "holds no words ([]): leave the row out"]),
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


def test_a_metric_of_another_kind_hints_at_the_own_one(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "version: 1\nname: own\nkind: tags\ninputs: [tokens]\nlabel: tags\nmetrics: [f1]\n"
    )
    with pytest.raises(InputError, match="unknown metric 'f1': did you mean 'entity_f1'"):
        load_task(tmp_path / "own.yaml")


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
        kind.cut(data.splits["train"], short, 3)
        == "11 of 13 words of train.conll have no token of their own within 3 tokens"
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
