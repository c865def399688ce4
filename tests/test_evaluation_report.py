"""``evaluate --report``: the numbers of scikit-learn and seqeval, as a table and as files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from conftest import Run, refused, tiny_model
from scipy import stats
from seqeval.metrics import classification_report as of_entities
from transformers import AutoTokenizer

import compresskit
from compresskit.tasks import reports
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import Split
from compresskit.tasks.squad import Answers

CLASSES = ["a", "b", "c"]


def parts(kind: str, targets: list[Any], answers: Any, metrics: tuple[str, ...] = ()) -> reports.Report:
    """The report of a kind that asks no model."""
    labels = tuple(sorted({tag for tags in targets for tag in tags})) if kind == "tags" else ()
    data: Any = SimpleNamespace(task=SimpleNamespace(metrics=metrics), labels=labels)
    scoring: Any = None
    return KINDS.get(kind).report(scoring, data, Split([()] * len(targets), targets, "rows"), answers)


def same(ours: reports.Rows, theirs: dict[str, Any]) -> None:
    for name, values in theirs.items():
        if isinstance(values, dict):
            for key, value in values.items():
                assert ours[name][key.removesuffix("-score")] == pytest.approx(value)
    assert [name for name, values in theirs.items() if isinstance(values, dict)] == [n for n in ours if n != "accuracy"]


def test_classes_are_reported_as_by_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    targets, answers = (chance.choice(CLASSES[:2], 50).tolist() for _ in range(2))
    answers[0] = "c"  # a class without a target
    found = reports.of_classes(targets, answers, CLASSES)
    theirs = sklearn.metrics.classification_report(targets, answers, output_dict=True, zero_division=0)
    same(found.tables["by class"], theirs)
    assert found.tables["by class"]["accuracy"]["f1"] == pytest.approx(theirs["accuracy"])
    assert found.confusion == sklearn.metrics.confusion_matrix(targets, answers, labels=CLASSES).tolist()
    labels = chance.integers(0, 2, (30, 3)), chance.integers(0, 2, (30, 3))
    theirs = sklearn.metrics.classification_report(*labels, target_names=CLASSES, output_dict=True, zero_division=0)
    same(reports.of_labels(*labels, CLASSES).tables["by label"], theirs)


def test_classes_that_are_called_like_a_mean_keep_their_row() -> None:
    names = ["accuracy", "price", "macro avg"]
    targets = ["accuracy", "price", "price", "accuracy", "macro avg"]
    answers = ["accuracy", "accuracy", "price", "price", "macro avg"]
    found = reports.of_classes(targets, answers, names).tables["by class"]
    assert found["accuracy (class)"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["accuracy"] == {"f1": pytest.approx(0.6), "support": 5}
    assert found["macro avg (class)"]["f1"] == 1
    assert found["macro avg"]["f1"] == pytest.approx(2 / 3)
    flags = np.array([[1, 0], [0, 1]])
    by_label = reports.of_labels(flags, flags[::-1], ["micro avg", "b"]).tables["by label"]
    assert by_label["micro avg (class)"]["support"] == 1


def test_entities_are_reported_as_by_seqeval() -> None:
    targets = [["B-x", "I-x", "O"], ["B-y", "O", "B-x"]]
    answers = [["B-x", "O", "O"], ["B-y", "O", "B-y"]]
    found = parts("tags", targets, answers, ("entity_f1",))
    same(found.tables["by type"], of_entities(targets, answers, output_dict=True, zero_division=0))
    flat = [[tag for tags in rows for tag in tags] for rows in (targets, answers)]
    labels = sorted({*flat[0]})
    theirs = sklearn.metrics.classification_report(*flat, labels=labels, output_dict=True, zero_division=0)
    same(found.tables["by tag"], theirs)
    assert "by type" not in parts("tags", targets, answers, ("accuracy",)).tables
    stranger = parts("tags", [["A", "A"]], [["A", "C"]], ("accuracy",))  # a tag that these rows do not have
    assert (stranger.classes, stranger.confusion) == (("A", "C"), [[1, 1], [0, 0]])


def test_numbers_are_reported_by_fifths() -> None:
    chance = np.random.default_rng(1)
    targets = chance.normal(size=53)
    answers = targets + chance.normal(size=53)
    rows = reports.of_numbers(targets.tolist(), answers.tolist()).tables["by size of the target"]
    assert rows["all"]["pearson"] == pytest.approx(stats.pearsonr(targets, answers)[0])
    assert rows["all"]["spearman"] == pytest.approx(stats.spearmanr(targets, answers)[0])
    lowest = np.argsort(targets)[:11]
    assert rows["fifth 1"]["mean answer"] == pytest.approx(answers[lowest].mean())
    assert rows["fifth 1"]["spearman"] == pytest.approx(stats.spearmanr(targets[lowest], answers[lowest])[0])
    assert sum(rows[f"fifth {number}"]["support"] for number in range(1, 6)) == 53
    assert "pearson" not in reports.of_numbers([1.0, 1.0], [0.5, 0.6]).tables["by size of the target"]["all"]


def test_answers_and_rankings_are_reported_in_groups() -> None:
    targets = [Answers(("one",), (0,)), Answers(("one two three four",), (0,)), Answers((), ())]
    rows = parts("spans", targets, ["one", "one two", ""]).tables["by words of the answer"]
    assert rows["1 word"] == {"span_f1": 1.0, "exact_match": 1.0, "support": 1}
    assert rows["4 to 7 words"]["span_f1"] == pytest.approx(2 / 3)
    assert rows["no answer"]["exact_match"] == 1.0
    assert rows["all"]["support"] == 3
    found = parts("retrieval", [{0}, {1}, {9}, {500}], [[0, 1], [0, 1], [*range(20)], [1, 2]])
    ranks = found.tables["by rank of the first relevant document"]
    assert [row["support"] for row in ranks.values()] == [1, 1, 1, 0, 1]


def test_what_another_package_predicts_is_reported_by_its_form() -> None:
    assert set(reports.of_anything(["a", "b"], ["a", "a"]).tables) == {"by class"}
    assert set(reports.of_anything([1.0, 2.0], [1, 2]).tables) == {"by size of the target"}
    assert reports.of_anything([{1}], [{2}]).tables == {}


TASKS = {
    "multi-label": ("label: labels", "[macro_f1]", '{"text": "the film", "labels": ["b"]}', "by label"),
    "tags": ("label: tags", "[entity_f1]", '{"text": ["the", "film"], "tags": ["O", "B-x"]}', "by type"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_models_of_other_kinds_are_reported(bench_folder: Path, tmp_path: Path, kind: str) -> None:
    label, metrics, row, title = TASKS[kind]
    (tmp_path / "own.yaml").write_text(
        f"version: 1\nname: own\nkind: {kind}\ninputs: [text]\n{label}\nmetrics: {metrics}\nfiles: {{dev: dev.jsonl}}\n"
    )
    (tmp_path / "dev.jsonl").write_text(f"{row}\n{row}\n")
    names = dict(enumerate(("a", "b") if kind == "multi-label" else ("O", "B-x", "I-x")))
    config = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if kind == "multi-label":
        config["problem_type"] = "multi_label_classification"
    model = tiny_model(head="classifier" if kind == "multi-label" else "tokens", **config)
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    settings = {"task": tmp_path / "own.yaml", "data": tmp_path, "max_length": 32, "device": "cpu"}
    found = compresskit.evaluate(model, tokenizer=tokenizer, report=tmp_path / "report", **settings)
    table = found.record["report"]["dev"]["tables"][title]
    assert table["b" if kind == "multi-label" else "x"]["support"] == 2
    assert found.record["scores"]["dev"][metrics[1:-1]] == pytest.approx(
        table["macro avg" if kind == "multi-label" else "micro avg"]["f1"]
    )
    assert (tmp_path / "report" / "README.md").is_file()


def test_an_export_is_scored_as_its_model(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    small, device = tmp_path / "small", tmp_path / "device"
    teacher = bench_folder / "teacher"
    assert run("compress", "--model", teacher, "--method", "low-rank", "--ratio", 1.5, "--output", small).code == 0
    compresskit.export(small, format="onnx", output=device)
    settings: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "report": True}
    ours, theirs = (compresskit.evaluate(folder, **settings).record for folder in (small, device))
    assert ours["scores"] == theirs["scores"]
    assert ours["report"] == theirs["report"]


def test_a_report_on_the_screen_and_in_a_folder(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    command = ("evaluate", "--model", bench_folder / "teacher", "--task", "sst2", "--data", bench_folder / "data")
    command = (*command, "--max-length", 32)
    plain, shown = run(*command), run(*command, "--report")
    assert "precision" not in plain.out
    for word in ("by class", "precision", "recall", "support", "macro avg", "positive"):
        assert word in shown.out
    folder = tmp_path / "report"
    written = run(*command, "--report", folder)
    assert written.code == 0
    assert "report.json" in written.out
    assert {path.name for path in folder.iterdir()} == {"report.json", "README.md", "confusion-dev.png"}
    record = json.loads((folder / "report.json").read_text())
    table = record["report"]["dev"]["tables"]["by class"]
    assert table["accuracy"]["f1"] == pytest.approx(record["scores"]["dev"]["accuracy"])
    assert sum(map(sum, record["report"]["dev"]["confusion"]["true by row, predicted by column"])) == 80
    assert "| positive |" in (folder / "README.md").read_text()
    refused(run(*command, "--report", folder), f"output {folder}", "exists", "--overwrite")
    assert run(*command, "--report", folder, "--overwrite").code == 0
    settings = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu"}
    found = compresskit.evaluate(bench_folder / "teacher", report=True, **settings)
    assert found.record["report"] == record["report"]
    assert found.folder is None
