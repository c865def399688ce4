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
        ({"name": "good"}, "holds several labels"),
        (0.5, "is a number with a fraction; numbers to predict take kind: regression"),
        ("2.5", "is a number with a fraction"),
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
        ([10, 9, 2.0, "2"], ("2", "9", "10"), ["10", "9", "2", "2"]),
        ([" good", "bad "], ("bad", "good"), ["good", "bad"]),
        (["None", "NA"], ("NA", "None"), ["None", "NA"]),
    ):
        data = load_data(load_task(own(tmp_path, given, given)), tmp_path)
        assert data.labels == names
        assert data.splits["dev"].targets == expected
    declared = OWN + 'labels: {yes: "true", "no": "false", half: "0.5"}\n'.replace("yes", '"yes"')
    data = load_data(load_task(own(tmp_path, [True, False, 0.5], ["true", False], declared)), tmp_path)
    assert data.splits["train"].targets == ["yes", "no", "half"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("{yes: '1', no: '0'}", ["labels", "write it in quotes", "yes"]),
        ("{good: true, bad: false}", ["labels.good", "write it in quotes"]),
        ("{good: 1, bad: 0}", ["labels.good", "write it in quotes"]),
        ("{good: '1'}", ["labels: 1 are listed"]),
        ("{good: '1', bad: ' 1'}", ["'good' and 'bad' have the same value"]),
        ("{good: '1', bad: ''}", ["must not be empty"]),
    ],
)
def test_bad_maps_of_labels(run: Run, bench_folder: Path, tmp_path: Path, labels: str, words: list[str]) -> None:
    task = own(tmp_path / "d", [1, 0], [1, 0], OWN + f"labels: {labels}\n")
    refused(run("evaluate", "--model", bench_folder / "teacher", "--task", task, "--data", tmp_path / "d"), *words)


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
