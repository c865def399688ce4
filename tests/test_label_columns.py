"""Columns of labels in files and on the hub: what is no single label is refused with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import Run, refused
from datasets import ClassLabel, Dataset

from compresskit.errors import InputError
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import load_data, load_task

OWN = """version: 1
name: own
inputs: [text]
label: kind
files: {train: train.jsonl, dev: dev.jsonl}
metrics: [accuracy, f1]
"""


def own(folder: Path, train: list[Any], dev: list[Any], text: str = OWN) -> Path:
    """A task whose text is the label's word, where it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels in (("train", train), ("dev", dev)):
        rows = [json.dumps({"text": str(label), "kind": label}) for label in labels]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("", "holds no label ('')"),
        ("  ", "holds no label"),
        (None, "holds no label (None)"),
        (float("nan"), "holds no label (nan)"),
        ("NaN", "holds no label"),
        (["good", "bad"], "holds several labels, ['good', 'bad']"),
        ([], "holds no label ([])"),
        ({"name": "good"}, "holds several labels"),
        (0.5, "is a number with a fraction; numbers to predict take kind: regression"),
        ("2.5", "is a number with a fraction"),
        ("\ufeff", "holds no label"),
        ('""', "holds no label"),
        ("\u200b", "holds no label"),
        (-100, "marks what losses leave out"),
        ("-inf", "is no finite number"),
        (1e18, "too large to be exact"),
        ("['good']", "is a list as text"),
        ("[0 1]", "is a list as text"),
        ('"good"', "stands in quotation marks"),
    ],
)
def test_cells_that_hold_no_label(run: Run, bench_folder: Path, tmp_path: Path, cell: Any, words: str) -> None:
    task = own(tmp_path / "d", ["good", "bad", cell], ["good", "bad"])
    arguments = ("--model", bench_folder / "model", "--task", task, "--data", tmp_path / "d", "--max-length", "32")
    refused(run("finetune", *arguments, "--output", "out"), "train.jsonl, row 3", words)
    own(tmp_path / "d", ["good", "bad"], ["good", cell])
    refused(run("finetune", *arguments, "--output", "out"), "dev.jsonl, row 2", words)


def test_labels_of_any_type_in_files(tmp_path: Path) -> None:
    for given, names, expected in (
        ([True, False], ("False", "True"), ["True", "False"]),
        ([10, 9, 2], ("2", "9", "10"), ["10", "9", "2"]),
        ([10.0, 9.0, 2.0], ("2", "9", "10"), ["10", "9", "2"]),
        ([2**53 + 1, 2**53], ("9007199254740992", "9007199254740993"), ["9007199254740993", "9007199254740992"]),
        ([" good", "bad "], ("bad", "good"), ["good", "bad"]),
        (["e\u0301", "\xe9", "\ufeffb"], ("b", "\xe9"), ["\xe9", "\xe9", "b"]),
        (["[NEG]", "none"], ("[NEG]", "none"), ["[NEG]", "none"]),
    ):
        data = load_data(load_task(own(tmp_path, given, given)), tmp_path)
        assert data.labels == names
        assert data.splits["dev"].targets == expected
    declared = OWN + 'labels: {yes: "true", "no": "false", half: "0.5"}\n'.replace("yes", '"yes"')
    data = load_data(load_task(own(tmp_path, [True, False, 0.5], ["true", False], declared)), tmp_path)
    assert data.splits["train"].targets == ["yes", "no", "half"]
    # One file of whole numbers with a point, as pandas writes columns with a gap, and one without.
    data = load_data(load_task(own(tmp_path, [1.0, 0.0], [1, 0])), tmp_path)
    assert data.splits["train"].targets == data.splits["dev"].targets == ["1", "0"]


MISSING = ("NA", "N/A", "n/a", "NULL", "None", "NaT", "#N/A", "<NA>", "-1.#IND", "nan", "?", "-", "--", "n.a.")


@pytest.mark.parametrize("cell", MISSING)
def test_what_stands_for_a_missing_label_is_one_only_where_it_is_declared(tmp_path: Path, cell: str) -> None:
    task = own(tmp_path, ["good", "bad", cell], ["good", cell])
    with pytest.raises(InputError, match=r"train.jsonl, row 3: holds no label .* list it under labels"):
        load_data(load_task(task), tmp_path)
    task = own(tmp_path, ["good", cell], ["good", cell], OWN + f"labels: {{good: good, missing: '{cell}'}}\n")
    assert load_data(load_task(task), tmp_path).splits["dev"].targets == ["good", "missing"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([True, False, "true"], r"row 1 and row 3: labels True and 'true' .* different kinds"),
        ([1, 0, "1"], r"row 1 and row 3: labels 1 and '1'"),
        ([1, 0, 1.0], r"row 1 and row 3: labels 1 and 1.0"),
        ([True, 0], r"row 1 and row 2: labels True and 0"),
        (["0", "1", "00"], r"row 1 and row 3: labels '0' and '00' .* look like one"),
        (["1", "0", "1.0"], r"row 1 and row 3: labels '1' and '1.0' .* one number in two spellings"),
        (["a", "Good", "good"], r"row 2 and row 3: labels 'Good' and 'good' .* look like one"),
        (["not good", "not  good", "a"], r"row 1 and row 2"),
        (["go\u200bod", "good"], r"row 1 and row 2"),
        (["good\0", "good"], r"row 1 and row 2"),
        (["\u2764\ufe0f", "\u2764"], r"row 1 and row 2"),
        (["1", "\uff11"], r"row 1 and row 2"),
        (["a", "b", "a,b"], r"row 3: 'a,b' seems to be several labels"),
        (["0", "27", "0 27"], r"row 3: '0 27' seems to be several labels"),
    ],
)
def test_labels_that_look_alike_are_refused_unless_they_are_declared(
    tmp_path: Path, labels: list[Any], words: str
) -> None:
    task = load_task(own(tmp_path, labels, labels))
    for train in (True, False):
        with pytest.raises(InputError, match=words):
            load_data(task, tmp_path, train=train)


def test_spellings_of_two_files_are_compared_too(tmp_path: Path) -> None:
    text = OWN.replace("train: train.jsonl, dev", "dev: train.jsonl, test")
    task = load_task(own(tmp_path, ["Good", "bad"], ["good", "bad"], text))
    with pytest.raises(InputError, match=r"train.jsonl, row 1 and data dev.jsonl, row 1: labels 'Good' and 'good'"):
        load_data(task, tmp_path, train=False)


def test_an_unknown_label_names_the_nearest(tmp_path: Path) -> None:
    task = own(tmp_path, ["good", "Bad"], ["good"], OWN + "labels: {good: good, bad: bad}\n")
    with pytest.raises(InputError, match=r"row 2: unknown label 'Bad': did you mean 'bad'\? known: good, bad"):
        load_data(load_task(task), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("csv", "text,kind,kind\na,x,y\n", "column 'kind' comes twice"),
        ("jsonl", '{"text": "a", "kind": "x", "kind": "y"}\n', "line 1: .*key 'kind' comes twice"),
        ("json", '[{"text": "a", "kind": "x", "kind": "y"}]', "key 'kind' comes twice"),
        ("csv", "text,kind\na,x\nb,y\ntext,kind\nc,x\n", "line 4: holds names of columns"),
        ("tsv", "Text\tKIND\na\tx\nb\ty\n", "line 1: holds names of columns .* name the columns alike"),
        ("tsv", "sentence\tclass\na\tx\nb\ty\n", "line 1: holds names of columns"),
    ],
)
def test_columns_that_come_twice_and_heads_among_the_rows(tmp_path: Path, name: str, content: str, words: str) -> None:
    text = OWN.replace("jsonl", name) + ("columns: [text, kind]\n" if name == "tsv" else "")
    (tmp_path / "own.yaml").write_text(text)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.{name}").write_text(content)
    with pytest.raises(InputError, match=words):
        load_data(load_task(tmp_path / "own.yaml"), tmp_path)


def test_notes_on_texts(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN.replace("jsonl", "tsv"))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text('text\tkind\n"a ""b"" c"\tx\n \ty\n"b"\tx\n')
    notes = load_data(load_task(tmp_path / "own.yaml"), tmp_path).notes
    assert any("dev.tsv: 1 rows have texts in quotation marks, which stay" in note for note in notes)
    assert "data dev.tsv: 1 of 3 texts are empty; they are taken as they are" in notes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("label: kind", "label: text"), "inputs and label: 'text' comes twice"),
        (("inputs: [text]", "inputs: [text, text]"), "inputs and label: 'text' comes twice"),
        (("label: kind", "label: kind\ncolumns: [text, kind, kind]"), "columns: 'kind' comes twice"),
    ],
)
def test_declarations_that_name_a_column_twice(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_task(own(tmp_path, ["a", "b"], ["a"], OWN.replace(*change)))


@pytest.mark.parametrize(
    "cell", ["1_0", "\uff11", "1,5", "inf", "nan", "NaN", "", "true", True, None, [1.0], 1e39, 10**400]
)
def test_cells_that_hold_no_number(tmp_path: Path, cell: Any) -> None:
    text = OWN.replace("[accuracy, f1]", "[pearson]") + "kind: regression\n"
    task = load_task(own(tmp_path, [1, 2.5, "-3", " .5e1 ", cell], [1], text))
    with pytest.raises(InputError, match=r"train.jsonl, row 5: column 'kind' must hold (finite )?numbers"):
        load_data(task, tmp_path)
    task = load_task(own(tmp_path, [1, 2.5, "-3", " .5e1 "], [1], text))
    assert load_data(task, tmp_path).splits["train"].targets == [1, 2.5, -3, 5]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("{yes: '1', no: '0'}", ["labels", "write it in quotes", "yes"]),
        ("{good: true, bad: false}", ["labels.good", "write it in quotes"]),
        ("{good: 1, bad: 0}", ["labels.good", "write it in quotes"]),
        ("{good: '1'}", ["labels: 1 are listed"]),
        ("{good: '1', bad: ' 1'}", ["'good' and 'bad' have the same value"]),
        ("{good: '1', bad: ''}", ["must not be empty"]),
        ("{LABEL_1: '1', LABEL_0: '0'}", ["LABEL_i is class i", "in the order LABEL_0, LABEL_1"]),
        ("{'e\u0301': '1', '\xe9': '0'}", ["are the same name"]),
    ],
)
def test_bad_maps_of_labels(run: Run, bench_folder: Path, tmp_path: Path, labels: str, words: list[str]) -> None:
    task = own(tmp_path / "d", [1, 0], [1, 0], OWN + f"labels: {labels}\n")
    refused(run("evaluate", "--model", bench_folder / "teacher", "--task", task, "--data", tmp_path / "d"), *words)


def test_several_refused_cells_are_shown_at_once(tmp_path: Path) -> None:
    cells = ["good", "bad", "", "good", None, [], "n/a", 0.5]
    with pytest.raises(InputError) as refusal:
        load_data(load_task(own(tmp_path / "many", cells, ["good"])), tmp_path / "many")
    assert str(refusal.value) == (
        "data train.jsonl, row 3: holds no label (''): fill it in or leave the row out (4 more refused: row 5: "
        "holds no label (None); row 6: holds no label ([]); ...)"
    )
    with pytest.raises(InputError, match=r"row 2: unknown label 'x'.* \(1 more refused: row 3: unknown label 'y'\)"):
        load_data(load_task(own(tmp_path / "two", ["good", "bad"], ["good", "x", "y"])), tmp_path / "two")
    with pytest.raises(InputError, match="at least 100 more refused"):
        load_data(load_task(own(tmp_path / "all", ["good", "bad"], ["x"] * 200)), tmp_path / "all")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label: kind", "labels: kind"),
        ("label: kind", "labels: [good, bad]\nlabel: kind"),
    ],
)
def test_labels_that_are_no_pairs(tmp_path: Path, text: str, words: str) -> None:
    task = own(tmp_path, ["good", "bad"], ["good"], OWN.replace(text, words))
    with pytest.raises(InputError, match=r"labels: takes pairs of names and values") as refusal:
        load_task(task)
    assert ("Then write label: kind" in str(refusal.value)) == (words == "labels: kind")


def test_more_classes_than_there_may_be_says_what_to_do(tmp_path: Path) -> None:
    task = load_task(own(tmp_path, [f"n{i}" for i in range(1001)], ["n1"]))
    with pytest.raises(InputError, match=r"1001 different values.*list them under labels.*kind: regression"):
        load_data(task, tmp_path)


def test_classes_of_the_hub_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": ClassLabel(names=["positive", "negative"])}
    )
    data = Dataset.from_dict({"sentence": ["good", "bad"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert load_data(load_task("sst2"), None).splits["dev"].targets == ["positive", "negative"]
    plain = data.cast_column("label", datasets.Value("int64"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: plain)
    assert load_data(load_task("sst2"), None).splits["dev"].targets == ["negative", "positive"]  # as declared
    undeclared = load_task("sst2").model_copy(update={"labels": None})
    assert load_data(undeclared, None).labels == ("0", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert load_data(undeclared, None).splits["dev"].targets == ["positive", "negative"]


@pytest.mark.parametrize("declared", [None, {"B-x": "B-x", "I-x": "I-x", "O": "O"}, {"I-x": "2", "O": "0", "B-x": "1"}])
def test_tags_of_the_hub_go_by_name(monkeypatch: pytest.MonkeyPatch, declared: dict[str, str] | None) -> None:
    names = datasets.Sequence(ClassLabel(names=["O", "B-x", "I-x"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner": names})
    data = Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner": [[1, 2], [0]]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    about = {"inputs": ["tokens"], "label": "ner", "metrics": ["entity_f1"], "hub": {"path": "a/b"}}
    task = Task(version=1, name="words", kind="tags", labels=declared, **about)
    assert load_data(task, None).splits["dev"].targets == [["B-x", "I-x"], ["O"]]
