"""Where labels meet, names decide: models, data sets, scores. Heads for several answers are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Run, refused, tiny_model, write_tsv
from datasets import ClassLabel, Dataset
from sklearn.metrics import f1_score
from test_label_columns import own
from transformers import PreTrainedModel

import compresskit
from compresskit.errors import InputError
from compresskit.model.classes import Lookup, class_order, in_order
from compresskit.tasks.labels import map_labels
from compresskit.tasks.loading import load_data, load_task
from compresskit.training.objective import Objective

WORDS = ("good", "bad", "fine")


def named(*names: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return tiny_model(head="classifier", seed=seed, **labels, **changes)


def reordered(model: PreTrainedModel, order: list[int]) -> PreTrainedModel:
    """The same model with its classes in another order, head and names."""
    other = copy.deepcopy(model)
    names = [model.config.id2label[number] for number in order]
    other.config.id2label = dict(enumerate(names))
    other.config.label2id = {name: number for number, name in enumerate(names)}
    for parameter in other.classifier.parameters():
        parameter.data = parameter.data[order]
    return other


@pytest.fixture(scope="module")
def tokenizer(bench_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(bench_folder / "model")


def rows(labels: list[Any] | None, count: int = 24, **columns: Any) -> Dataset:
    ids = [[2, 5 + number % 8, 20 + number % 30, 3] for number in range(count)]
    return Dataset.from_dict({"input_ids": ids, **({} if labels is None else {"labels": labels}), **columns})


# -- names -----------------------------------------------------------------------------------------------------------


def test_found_names_are_in_the_order_of_their_numbers() -> None:
    assert in_order({"10", "9", "-1", "0"}) == ("-1", "0", "9", "10")
    assert in_order({f"LABEL_{i}" for i in range(12)}) == tuple(f"LABEL_{i}" for i in range(12))
    assert in_order({"10", "9", "b"}) == ("10", "9", "b")  # names among them: as text
    assert in_order({"02", "1"}) == ("1", "02")


def test_order_of_classes() -> None:
    assert class_order(("a", "b", "c"), ("c", "a", "b")) == (1, 2, 0)
    assert class_order(("Good", "BAD"), ("bad", "good")) == (1, 0)
    assert class_order(("A", "a"), ("a", "A")) == (1, 0)  # case counts where it tells them apart
    assert class_order(("1", "2"), ("2.0", "01")) == (1, 0)
    assert class_order(("e\u0301", "very good"), ("Very  good", "\ufeff\xe9")) == (1, 0)
    assert class_order(("LABEL_0", "LABEL_1"), ("x", "y")) == class_order(("x", "y"), ("LABEL_0", "LABEL_1")) == (0, 1)
    assert class_order(("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1")) == (0, 1)
    assert class_order(("a", "b"), ("a", "c")) is None
    assert class_order(("a", "b"), ("a", "b", "c")) is None
    assert class_order(("a", "a"), ("a", "b")) is None
    assert Lookup(("1", "01"))("1.0") is None  # nobody can tell which one


@pytest.mark.parametrize(("numbers", "shown"), [((0, 2), "0, 2"), ((1, 2), "1, 2")])
def test_numbers_of_classes_with_a_hole_are_refused(numbers: tuple[int, int], shown: str, tokenizer: Any) -> None:
    """Output 1 of a head that names 0 and 2 would be taken for one of them, without a word."""
    model = named("bad", "good")
    model.config.id2label = dict(zip(numbers, ("bad", "good"), strict=True))
    says = rf"numbers its 2 classes {shown}; the outputs of its head are numbered 0 to 1: mend id2label"
    with pytest.raises(InputError, match=says):
        compresskit.predict(model, ["a text"], tokenizer=tokenizer)


def test_classes_of_one_name_are_named(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="classes 0, 2 of the model are all called 'bad': give them different names"):
        compresskit.predict(named("bad", "good", "bad"), ["a text"], tokenizer=tokenizer)


def test_a_model_without_names_has_integers_as_numbers(tmp_path: Path) -> None:
    model = tiny_model(head="classifier", num_labels=12)
    task = load_task(own(tmp_path, [0, 1], [0]))
    for labels in (("2", "11"), ("7",)):
        found = map_labels(task, labels, model)
        assert [found.single[label] for label in labels] == [int(label) for label in labels]
        assert len(found.classes) == 12
        assert "does not name its labels" in (found.note or "")
    stars = map_labels(task, ("1", "2", "3"), tiny_model(head="classifier", num_labels=3))
    assert stars.single == {"1": 0, "2": 1, "3": 2}  # in their order
    assert "declare" not in (stars.note or "")
    words = map_labels(task, ("bad", "good"), tiny_model(head="classifier"))
    assert "taken as bad, good, in this order (the alphabet's; if the model has another one, declare" in words.note
    with pytest.raises(InputError, match=r"labels differ.*id2label"):
        map_labels(task, ("good", "bad"), model)
    with pytest.raises(InputError, match=r"labels differ.*LABEL_2"):  # not in their order: LABEL_1 is class 1
        map_labels(task, ("LABEL_1", "LABEL_2"), tiny_model(head="classifier"))
    with pytest.raises(InputError, match=r"labels: \{nice: \.\.\., poor: \.\.\.\}"):  # ready to be filled in
        map_labels(task, ("good", "bad"), named("nice", "poor"))


def test_a_transfer_takes_the_order_of_its_source(bench_folder: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "hans.txt", "sentence1\tsentence2\tgold_label", [("good", "bad", "entailment")])
    data = load_data(load_task("hans"), tmp_path, train=False)
    for count, entails in ((2, 0), (3, 0)):
        found = map_labels(data.task, data.labels, tiny_model(head="classifier", num_labels=count), data.sources)
        assert found.numbers["entailment"] == (entails,)
        assert found.numbers["non-entailment"] == tuple(range(1, count))
    unknown = data.task.model_copy(update={"transfer_of": ("mine",)})
    with pytest.raises(InputError, match="labels differ"):
        map_labels(unknown, data.labels, tiny_model(head="classifier"))


# -- teacher and student ---------------------------------------------------------------------------------------------


def test_a_teacher_with_another_order_of_classes(tokenizer: Any, tmp_path: Path) -> None:
    teacher = named("good", "bad", "fine", initializer_range=0.5)
    student = reordered(teacher, [2, 0, 1])
    compressed = compresskit.compress(student, method="low-rank", ratio=1.2)
    told = compresskit.DistillationTrainer(
        student, teacher, stage=compresskit.Stage(losses={"logits": 1}), train_dataset=rows([0, 1, 2] * 8),
        args=transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    batch = told.data_collator([{"input_ids": ids} for ids in rows(None)["input_ids"]])
    assert told.compute_loss(student, dict(batch)).item() == pytest.approx(0, abs=1e-6)
    straight = compresskit.distill(
        compresskit.compress(teacher, method="low-rank", ratio=1.2), teacher, dataset=rows(None), tokenizer=tokenizer,
        device="cpu", max_steps=1, teacher_outputs=tmp_path / "outputs",
    )  # fmt: skip
    other = compresskit.distill(
        compressed, teacher, dataset=rows(None), tokenizer=tokenizer, device="cpu", max_steps=1,
        teacher_outputs=tmp_path / "outputs",
    )  # fmt: skip
    for who in ("student_before", "student_after"):
        ours, theirs = (result.record["scores"][who]["held_out"]["logits"] for result in (other, straight))
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_losses_of_a_teacher_with_another_order_of_classes(tokenizer: Any) -> None:
    """Labels are numbered by the student's head, the teacher's losses on them are its own all the same."""
    teacher = named("good", "bad", "fine", initializer_range=0.5)
    order = [2, 0, 1]
    numbers = [0, 1, 2] * 8
    found = []
    for student, labels in ((teacher, numbers), (reordered(teacher, order), [order.index(n) for n in numbers])):
        small = compresskit.compress(student, method="low-rank", ratio=1.2)
        options = {"dataset": rows(labels), "tokenizer": tokenizer, "device": "cpu", "max_steps": 1}
        found.append(compresskit.distill(small, teacher, **options).record["scores"]["teacher"]["held_out"])
    assert found[0] == pytest.approx(found[1])
    assert found[0]["logits"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("head", ["classifier", "tokens"])
def test_a_folder_keeps_the_order_of_its_own_head(tmp_path: Path, head: str) -> None:
    kind: Any = (
        transformers.BertForTokenClassification if head == "tokens" else transformers.BertForSequenceClassification
    )
    names = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    torch.manual_seed(0)
    teacher = kind(transformers.BertConfig(**tiny_model().config.to_dict() | names)).eval()
    reordered(teacher, [1, 0]).save_pretrained(tmp_path / "student")
    from compresskit.model.checkpoint import read
    from compresskit.training.reading import labels_of

    student = read(tmp_path / "student", adopt=teacher, **labels_of(teacher)).model
    assert student.config.id2label == {0: "y", 1: "x"}
    objective = Objective(student, teacher, compresskit.Stage(losses={"logits": 1}), ["input_ids"])
    assert objective.order == [1, 0]


def test_other_names_are_refused(tokenizer: Any) -> None:
    student = compresskit.compress(named("good", "bad"), method="low-rank", ratio=2)
    with pytest.raises(InputError, match="the teacher has happy, sad; the student has good, bad"):
        compresskit.distill(student, named("happy", "sad"), dataset=rows(None), tokenizer=tokenizer)
    # A head without names has the teacher's classes in their order.
    done = compresskit.distill(
        compresskit.compress(tiny_model(head="classifier"), method="low-rank", ratio=2), named("happy", "sad"),
        dataset=rows(None), tokenizer=tokenizer, max_steps=1, device="cpu",
    )  # fmt: skip
    assert "the student does not name its labels; taken as happy, sad, in this order" in done.notes


def test_a_model_without_names_must_agree_with_the_task(bench_folder: Path, tokenizer: Any) -> None:
    unnamed = tiny_model(head="classifier")
    arguments = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu", "max_steps": 1}
    for names, agree in ((("negative", "positive"), True), (("positive", "negative"), False)):
        for pair in ((named(*names), unnamed), (unnamed, named(*names))):
            student, teacher = compresskit.compress(pair[0], method="low-rank", ratio=2), pair[1]
            if agree:
                compresskit.distill(student, teacher, tokenizer=tokenizer, **arguments)
            else:
                with pytest.raises(InputError, match="does not say which is which"):
                    compresskit.distill(student, teacher, tokenizer=tokenizer, **arguments)


#: Kind -> what a declaration says beside its usual entries, names of two classes, and two rows.
KINDS_OF_CLASSES: dict[str, tuple[dict[str, Any], tuple[str, str], list[dict[str, Any]]]] = {
    "multi-label": (
        {"inputs": ["text"], "metrics": ["macro_f1"], "labels": {"bad": "bad", "good": "good"}},
        ("bad", "good"),
        [{"text": "awful", "label": ["bad"]}, {"text": "nice", "label": ["good"]}],
    ),
    "ranking": (
        {"inputs": ["query", "text"], "metrics": ["map"]},
        ("irrelevant", "relevant"),
        [{"query": "film", "text": "awful", "label": 0}, {"query": "film", "text": "nice", "label": 1}],
    ),
    "tags": (
        {"inputs": ["words"], "metrics": ["accuracy"], "labels": {"O": "O", "X": "X"}},
        ("O", "X"),
        [{"words": ["the", "film"], "label": ["O", "O"]}, {"words": ["a", "plot"], "label": ["O", "X"]}],
    ),
}


@pytest.mark.parametrize("kind", KINDS_OF_CLASSES)
def test_a_model_without_names_must_agree_with_the_task_of_every_kind(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Its logits were compared with the student's classes one by one, and scored by the task's order."""
    declared, names, data = KINDS_OF_CLASSES[kind]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in data * 4), encoding="utf-8")
    files = {split: f"{split}.jsonl" for split in ("train", "dev")}
    text = {"version": 1, "name": "own", "kind": kind, "label": "label", "files": files, **declared}
    (tmp_path / "own.yaml").write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    arguments = {"task": tmp_path / "own.yaml", "data": tmp_path, "max_length": 16, "device": "cpu", "max_steps": 1}
    changes = {"problem_type": "multi_label_classification"} if kind == "multi-label" else {}
    head = "tokens" if kind == "tags" else "classifier"
    unnamed = tiny_model(head=head, **changes)
    for order in (names, names[::-1]):
        labels = {"id2label": dict(enumerate(order)), "label2id": {name: i for i, name in enumerate(order)}}
        own_names = tiny_model(head=head, **labels, **changes)
        for pair in ((own_names, unnamed), (unnamed, own_names)):
            student, teacher = compresskit.compress(pair[0], method="low-rank", ratio=2), pair[1]
            if order == names:
                compresskit.distill(student, teacher, tokenizer=tokenizer, **arguments)
            else:
                with pytest.raises(InputError, match="does not say which is which"):
                    compresskit.distill(student, teacher, tokenizer=tokenizer, **arguments)


def test_teacher_and_student_are_scored_by_the_same_class(bench_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    teacher = named("bad", "good", initializer_range=0.5)
    student = reordered(teacher, [1, 0])
    task = own(tmp_path, ["good", "bad"] * 8, ["good", "bad", "bad"] * 5)
    arguments = {"task": task, "data": tmp_path, "tokenizer": tokenizer, "max_length": 16, "device": "cpu"}
    result = compresskit.distill(student, teacher, max_steps=1, learning_rate=1e-12, allow_dense=True, **arguments)
    scores = result.record["scores"]
    assert scores["student_before"]["dev"]["f1"] == pytest.approx(scores["teacher"]["dev"]["f1"])
    again = compresskit.evaluate(student, **arguments).record["scores"]
    assert again == scores["student_after"]


# -- data sets from Python -------------------------------------------------------------------------------------------


def trained(model: PreTrainedModel, data: Any, tokenizer: Any) -> list[Any]:
    """The labels that ``distill(dataset=)`` and DistillationTrainer train on."""
    student = compresskit.compress(model, method="low-rank", ratio=2)
    arguments = {"dataset": data, "tokenizer": tokenizer, "max_steps": 1, "device": "cpu"}
    compresskit.distill(student, model, losses={"supervised": 1}, **arguments)
    trainer = compresskit.DistillationTrainer(
        student, stage=compresskit.Stage(losses={"supervised": 1}), train_dataset=data,
        args=transformers.TrainingArguments("unused", report_to="none", use_cpu=True),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    return list(trainer.train_dataset["labels"])


def test_classes_of_a_data_set_go_by_name(tokenizer: Any) -> None:
    model = named("good", "bad", "fine")
    numbers = [0, 1, 2] * 8
    assert trained(model, rows(numbers), tokenizer) == numbers
    assert trained(model, rows([WORDS[n] for n in numbers]), tokenizer) == numbers
    assert trained(tiny_model(head="classifier", num_labels=3), rows([str(n) for n in numbers]), tokenizer) == numbers
    for names in (["fine", "good", "bad"], ["bad", "good"]):
        data = rows([names.index(WORDS[n]) if WORDS[n] in names else 0 for n in numbers])
        data = data.cast_column("labels", ClassLabel(names=names))
        expected = [n if WORDS[n] in names else WORDS.index(names[0]) for n in numbers]
        assert trained(model, data, tokenizer) == expected
    for column in ("label", "label_ids"):
        assert trained(model, rows(numbers).rename_column("labels", column).with_format("torch"), tokenizer) == numbers
    with pytest.raises(InputError, match="the data set has happy, sad"):
        trained(model, rows([0, 1] * 12).cast_column("labels", ClassLabel(names=["happy", "sad"])), tokenizer)
    score = tiny_model(head="classifier", num_labels=1)
    assert trained(score, rows(numbers), tokenizer) == [float(number) for number in numbers]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[0.1, 0.9]] * 24, "row 0: holds several labels"),
        ([[0]] * 24, "row 0: holds several labels"),
        ([0.0, 1.0] * 12, "row 0: 0.0 is no label"),
        ([True, False] * 12, "row 0: True is no label"),
        ([0, None] * 12, "row 1: None is no label"),
        ([1, 2] * 12, "row 1: label 2 is not from 0 to 1"),
        ([0, -1] * 12, "row 1: label -1"),
        (["good", "bad"] * 12, "row 0: unknown label 'good'"),
        ([-100] * 24, "its labels are all -100"),
        (["1", "0", "01", "0"] * 6, "row 2: label '01' stands above as '1'"),
    ],
)
def test_labels_that_a_head_cannot_learn(tokenizer: Any, labels: list[Any], words: str) -> None:
    model = tiny_model(head="classifier")
    student = compresskit.compress(model, method="low-rank", ratio=2)
    with pytest.raises(InputError, match=words):
        compresskit.distill(student, model, dataset=rows(labels), tokenizer=tokenizer)
    with pytest.raises(InputError, match=words):
        trained(model, rows(labels), tokenizer)


def test_targets_of_other_heads(tokenizer: Any) -> None:
    tokens = transformers.BertForTokenClassification(tiny_model().config)
    number = tiny_model(head="classifier", num_labels=1)
    cases = [
        (number, rows(["x"] * 24), "row 0: the head predicts one number, the label is 'x'"),
        (number, rows([1.0, float("nan")] * 12), "row 1: the head predicts one number, the label is nan"),
        (number, rows([1.0, 1e39] * 12), r"row 1: label 1e\+39 is larger than numbers of 32 bits"),
        (tokens, rows([[-100] * 4] * 24), "its labels are all -100"),
        (number, rows([1.0] * 24, label=[2.0] * 24), "has the columns labels and label"),
        (number, rows(None, label=[2.0] * 24, label_ids=[2.0] * 24), "has the columns label and label_ids"),
        (tokens, rows([[0, 1, 1, 0]] * 23 + [[0]]), "row 23: has 1 labels for 4"),
        (tokens, rows([0] * 24), "row 0: labels must be a list"),
        (tokens, rows([[0, 1, 2, 0]] * 24), "row 0: label 2"),
        (tiny_model(head="masked-lm"), rows([[0, 1, 2, 499]] * 24), "row 0: token 499"),
        (tiny_model(head="questions"), rows(None, start_positions=[1] * 24), "has start_positions alone"),
        (tiny_model(head="questions"), rows(None, start_positions=[1] * 24, end_positions=[4] * 24), "end_positions 4"),
        (number, Dataset.from_dict({"input_ids": [[], [3]]}), r"row 0: input_ids .* not \[\]"),
        (number, Dataset.from_dict({"input_ids": [[3], None]}), "row 1: input_ids"),
        (number, Dataset.from_dict({"input_ids": [[[3]], [[3]]]}), "row 0: input_ids"),
        (number, [{"input_ids": [3]}], "give a datasets.Dataset, not a list"),
    ]  # fmt: skip
    for model, data, words in cases:
        student = compresskit.compress(model, method="low-rank", ratio=2)
        with pytest.raises(InputError, match=words):
            compresskit.distill(student, model, dataset=data, tokenizer=tokenizer)
        with pytest.raises(InputError, match=words):
            trained(model, data, tokenizer)


# -- several labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_heads_for_several_answers_are_refused(
    run: Run, bench_folder: Path, tokenizer: Any, tmp_path: Path, problem: str
) -> None:
    model = named("negative", "positive", problem_type=problem)
    for folder, saved in (("m", model), ("s", compresskit.compress(model, method="low-rank", ratio=2))):
        saved.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    words = "several labels at once" if problem.startswith("multi") else "2 numbers at once"
    task = ("--task", "sst2", "--data", bench_folder / "data", "--max-length", "32")
    refused(run("evaluate", "--model", tmp_path / "m", *task), words)
    refused(run("finetune", "--model", tmp_path / "m", *task, "--output", "out"), problem, "without this head")
    models = ("--teacher", tmp_path / "m", "--student", tmp_path / "s")
    refused(run("distill", *models, *task, "--output", "out"), words)
    text = ("--text", bench_folder / "text.txt", "--max-length", "32", "--max-steps", "1", "--output", "out")
    if problem == "regression":  # several labels have losses of their own
        refused(run("distill", *models, *text), words, "logits")
    plain = named("negative", "positive")
    student = compresskit.compress(plain, method="low-rank", ratio=2)
    if problem == "regression":
        learner = compresskit.compress(model, method="low-rank", ratio=2)
        with pytest.raises(InputError, match=words):
            compresskit.distill(learner, model, dataset=rows(None), tokenizer=tokenizer)
    with pytest.raises(InputError, match="different things" if problem.startswith("multi") else words):
        compresskit.distill(student, model, dataset=rows(None), tokenizer=tokenizer)
    with pytest.raises(InputError, match="a list of 2 zeros and ones" if problem.startswith("multi") else words):
        trained(model, rows([0, 1] * 12), tokenizer)
    # What is beside the head can be learnt.
    compresskit.distill(
        tmp_path / "s", tmp_path / "m", dataset=rows(None), max_steps=1, device="cpu", losses={"logits": 0}
    )  # fmt: skip


# -- one score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dev", [WORDS * 4, ("good", "bad", "bad"), ("fine",) * 3])
def test_the_score_is_by_the_classes_of_the_model(
    bench_folder: Path, tokenizer: Any, tmp_path: Path, dev: tuple[str, ...]
) -> None:
    model = named(*WORDS, initializer_range=0.5)
    task = own(tmp_path, list(WORDS) * 8, list(dev))
    arguments = {"task": task, "data": tmp_path, "tokenizer": tokenizer, "max_length": 16, "device": "cpu"}
    with torch.no_grad():
        given = [int(model(**tokenizer(word, return_tensors="pt")).logits.argmax()) for word in dev]
    wanted = [WORDS.index(word) for word in dev]
    expected = {
        "accuracy": pytest.approx(np.mean(np.equal(wanted, given))),
        "f1": pytest.approx(f1_score(wanted, given, labels=[0, 1, 2], average="macro", zero_division=0)),
    }
    assert compresskit.evaluate(copy.deepcopy(model), **arguments).record["scores"] == {"dev": expected}
    tuned = compresskit.finetune(copy.deepcopy(model), max_steps=1, learning_rate=1e-12, **arguments)
    assert tuned.record["scores"]["student_after"] == {"dev": expected}
    student = compresskit.compress(model, method="low-rank", ratio=2)
    taught = compresskit.distill(student, model, max_steps=1, **arguments)
    assert taught.record["scores"]["teacher"] == {"dev": expected}


def test_f1_of_two_classes_is_that_of_class_1_of_the_model(tokenizer: Any, tmp_path: Path) -> None:
    model = named("good", "bad", initializer_range=0.5)  # not the order of their names
    for dev in (["good", "bad", "bad"] * 3, ["bad"] * 3, ["good"] * 3):
        task = own(tmp_path, ["good", "bad"], dev)
        with torch.no_grad():
            given = [int(model(**tokenizer(word, return_tensors="pt")).logits.argmax()) for word in dev]
        expected = f1_score([word == "bad" for word in dev], given, labels=[1], average="macro", zero_division=0)
        found = compresskit.evaluate(model, task=task, data=tmp_path, tokenizer=tokenizer, max_length=16)
        assert found.record["scores"]["dev"]["f1"] == pytest.approx(expected)
