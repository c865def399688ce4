"""A student and a teacher that cut texts into different tokens: they are compared word by word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import NEGATIVE, POSITIVE, Run, refused, reviews, same, sentence_folder, tiny_model, weights, write_tsv
from datasets import Dataset

import compresskit
from compresskit import InputError, Stage
from compresskit.pipeline import Request
from compresskit.training.alignment import PairCollator, paired
from compresskit.training.trainer import DistillationTrainer

TASK = {"task": "sst2", "max_length": 40, "device": "cpu"}
#: Rows of the vocabulary: letters and the frequent words, without the words that decide the label; or all that is read.
SPELLING, READING = 60, 80


def _trimmed(model: Path, folder: Path, text: Path, keep: int) -> Path:
    """A low-rank student of ``model`` with fewer words."""
    work = Request(model=model, method="low-rank", ratio=2, trim_text=text, trim_keep=keep).read()
    work.write_to(folder, work.plan())
    return folder


@pytest.fixture(scope="module")
def spelling(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the task's teacher that spells the words on which the label depends."""
    folder = _trimmed(
        bench_folder / "teacher", tmp_path_factory.mktemp("two") / "student", bench_folder / "text.txt", SPELLING
    )
    words = transformers.AutoTokenizer.from_pretrained(folder).get_vocab().keys()
    assert not words & {*POSITIVE, *NEGATIVE}
    assert "film" in words
    return folder


def test_a_task(bench_folder: Path, spelling: Path, tmp_path: Path) -> None:
    teacher, data = bench_folder / "teacher", bench_folder / "data"
    done = compresskit.distill(
        spelling, teacher, data=data, output=tmp_path / "out", epochs=8, learning_rate=5e-3, **TASK
    )
    assert set(done.record["losses"]) == {"embedding", "hidden", "logits", "supervised"}
    assert any("loss attention is left out: student and teacher have different vocab" in note for note in done.notes)
    (note,) = (note for note in done.notes if "word by word" in note)
    assert "vocabularies of 60 and 499 tokens" in note
    scores = done.record["scores"]
    alone = compresskit.evaluate(teacher, data=data, **TASK).record["scores"]
    assert scores["teacher"] == alone
    assert scores["student_after"]["dev"]["accuracy"] > scores["student_before"]["dev"]["accuracy"] + 0.15
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == SPELLING
    again = compresskit.evaluate(tmp_path / "out", data=data, **TASK).record["scores"]
    assert again == scores["student_after"]


def test_words_of_one_token_each_teach_what_tokens_do(bench_folder: Path, tmp_path: Path) -> None:
    """A vocabulary without the tokens that no text has: the same tokens, so the same steps as with a teacher that was
    trimmed too.
    """
    teacher, text = bench_folder / "teacher", bench_folder / "text.txt"
    compresskit.trim(teacher, text=text, keep=READING, output=tmp_path / "trimmed")
    compresskit.compress(tmp_path / "trimmed", method="low-rank", ratio=2).save_pretrained(tmp_path / "student")
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (tmp_path / "trimmed" / file).is_file():
            shutil.copy(tmp_path / "trimmed" / file, tmp_path / "student" / file)
    losses = {"attention": 0, "embedding": 1, "hidden": 1, "logits": 1, "supervised": 1}
    made = [
        compresskit.distill(
            tmp_path / "student",
            given,
            data=bench_folder / "data",
            output=tmp_path / f"out{place}",
            losses=losses,
            max_steps=10,
            **TASK,
        )
        for place, given in enumerate((tmp_path / "trimmed", teacher))
    ]
    assert ["word by word" in " ".join(one.notes) for one in made] == [False, True]
    tokens, words = (one.record["log"][-1] for one in made)
    for name, loss in tokens.items():
        if name.startswith("loss"):
            assert words[name] == pytest.approx(loss, rel=1e-4), name
    ours, theirs = (weights(tmp_path / f"out{place}") for place in range(2))
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-5) for name, tensor in ours.items())


def test_any_text(bench_folder: Path, tmp_path: Path) -> None:
    text = bench_folder / "text.txt"
    student = _trimmed(bench_folder / "model", tmp_path / "student", text, SPELLING)
    done = compresskit.distill(
        student,
        bench_folder / "model",
        text=text,
        output=tmp_path / "out",
        max_length=32,
        epochs=3,
        learning_rate=5e-3,
        device="cpu",
    )
    scores = {who: found["held_out"] for who, found in done.record["scores"].items()}
    assert scores["teacher"] == pytest.approx({"embedding": 0, "hidden": 0}, abs=1e-9)
    for name in ("embedding", "hidden"):
        assert scores["student_after"][name] < 0.7 * scores["student_before"][name]


def test_masked_words_are_not_taught(masked_lm: Path, bench_folder: Path, tmp_path: Path) -> None:
    text = bench_folder / "text.txt"
    student = _trimmed(masked_lm / "teacher", tmp_path / "student", text, SPELLING)
    options = {"text": text, "max_length": 32, "max_steps": 2, "device": "cpu"}
    done = compresskit.distill(student, masked_lm / "teacher", **options)
    assert set(done.record["losses"]) == {"embedding", "hidden"}
    for name in ("logits", "supervised"):
        assert any(note.startswith(f"loss {name} is left out: ") and "predicts tokens" in note for note in done.notes)
        with pytest.raises(InputError, match=f"loss {name}: .*different vocabularies.*but its weight was given"):
            compresskit.distill(student, masked_lm / "teacher", losses={name: 1}, **options)


TAGS = """version: 1
name: words
kind: tags
inputs: [tokens]
label: tags
files: {train: train.jsonl, dev: dev.jsonl}
metrics: [entity_f1]
"""


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of tags, in which some rows are longer than the models read."""
    folder = tmp_path_factory.mktemp("tags")
    (folder / "words.yaml").write_text(TAGS)
    for seed, split in enumerate(("train", "dev")):
        rows = []
        for text, _ in reviews(60, seed):
            words = text.split() * 2
            found = ["B-good" if word in POSITIVE else "B-bad" if word in NEGATIVE else "O" for word in words]
            rows.append(json.dumps({"tokens": words, "tags": found}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def test_tags_are_taught_where_a_word_begins(bench_folder: Path, tags: Path, tmp_path: Path) -> None:
    options = {"task": tags / "words.yaml", "data": tags, "max_length": 32, "device": "cpu"}
    compresskit.finetune(bench_folder / "model", output=tmp_path / "teacher", max_steps=5, **options)
    text = bench_folder / "text.txt"
    # The same weights and the same tokens under other numbers: nothing is left to learn but the labels.
    compresskit.trim(tmp_path / "teacher", text=text, keep=READING, output=tmp_path / "same")
    losses = {"attention": 0, "embedding": 1, "hidden": 1, "logits": 1, "supervised": 0}
    done = compresskit.distill(
        tmp_path / "same", tmp_path / "teacher", allow_dense=True, max_steps=1, losses=losses, **options
    )
    entry = done.record["log"][0]
    for name in ("loss_embedding", "loss_hidden", "loss_logits"):
        assert entry[name] == pytest.approx(0, abs=1e-6), name
    student = _trimmed(tmp_path / "teacher", tmp_path / "spelling", text, SPELLING)
    done = compresskit.distill(student, tmp_path / "teacher", max_steps=3, **options)
    assert set(done.record["losses"]) == {"embedding", "hidden", "logits", "supervised"}
    assert done.record["log"][0]["loss_logits"] > 0


def test_stopped_and_resumed(bench_folder: Path, spelling: Path, tmp_path: Path) -> None:
    """Bit for bit; with another tokenizer of the teacher it is another run."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 12:
                raise KeyboardInterrupt

    teacher = tmp_path / "teacher"
    shutil.copytree(bench_folder / "teacher", teacher)
    options = {"data": bench_folder / "data", "max_steps": 20, "save_every": 10, "dropout": 0.1, **TASK}
    compresskit.distill(spelling, teacher, output=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        compresskit.distill(spelling, teacher, output=tmp_path / "out", callbacks=[Stop()], **options)
    compresskit.distill(spelling, teacher, output=tmp_path / "out", resume=True, **options)
    assert same(tmp_path / "whole", tmp_path / "out")


def test_kept_outputs_and_given_token_numbers(bench_folder: Path, spelling: Path, tmp_path: Path) -> None:
    teacher = bench_folder / "teacher"
    done = compresskit.distill(
        spelling, teacher, data=bench_folder / "data", max_steps=1, teacher_outputs=tmp_path / "kept", **TASK
    )
    assert done.notes[-1] == "teacher outputs are not kept: it has another vocabulary than the student"
    given = Dataset.from_dict({"input_ids": [[2, 5, 3]] * 9})
    with pytest.raises(InputError, match="token numbers of one vocabulary, and student and teacher have different"):
        compresskit.distill(spelling, teacher, dataset=given, device="cpu")


def test_several_processes_share_the_counts(bench_folder: Path, spelling: Path) -> None:
    """Micro-batches have different numbers of words; the mean is that of the whole step."""
    options = {"data": bench_folder / "data", "max_steps": 5, "batch_size": 16, **TASK}
    whole, parts = (
        compresskit.distill(spelling, bench_folder / "teacher", accumulation=number, **options).record["log"][-1]
        for number in (1, 4)
    )
    for name in ("loss", "loss_hidden", "loss_embedding"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-3), name


# --- what is refused -------------------------------------------------------------------------------------------------


def test_maps_from_token_to_token(run: Run, bench_folder: Path, spelling: Path) -> None:
    models_ = ("--student", spelling, "--teacher", bench_folder / "teacher", "--max-length", 32, "--output", "out")
    task = ("--task", "sst2", "--data", bench_folder / "data")
    refused(run("distill", *models_, *task, "--loss", "attention=1"), "loss attention", "from token to token")


def test_answers_that_are_places_among_tokens(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    tiny_model(head="questions").save_pretrained(teacher)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, teacher)
    student = _trimmed(teacher, tmp_path / "student", bench_folder / "text.txt", SPELLING)
    paragraph = {"context": "the film was good", "qas": [{"question": "what was it", "id": "1", "answers": []}]}
    paragraph["qas"][0]["answers"] = [{"text": "good", "answer_start": 13}]
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    models_ = ("--student", student, "--teacher", teacher, "--max-length", 32, "--output", "out")
    words = ("kind spans", "another vocabulary", "compresskit trim")
    refused(run("distill", *models_, "--task", "squad", "--data", tmp_path), *words)


def test_a_tokenizer_that_does_not_say_which_characters_it_read(
    run: Run, bench_folder: Path, spelling: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(spelling, student)
    (student / "tokenizer.json").unlink()
    (student / "vocab.txt").write_text("".join(f"w{number} 1\n" for number in range(40)))
    (student / "bpe.codes").write_text("w 0 1\n")
    (student / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))
    models_ = ("--student", student, "--teacher", bench_folder / "teacher", "--max-length", 32, "--output", "out")
    task = ("--task", "sst2", "--data", bench_folder / "data")
    refused(run("distill", *models_, *task), "different vocabularies", "PhobertTokenizer", "no fast tokenizer")


def test_texts_without_a_word_that_both_read(run: Run, bench_folder: Path, spelling: Path, tmp_path: Path) -> None:
    rows = [("x" * 60, "0"), ("y" * 60, "1")] * 4
    for split in ("train", "dev"):
        write_tsv(tmp_path / "SST-2" / f"{split}.tsv", "sentence\tlabel", rows)
    models_ = ("--student", spelling, "--teacher", bench_folder / "teacher", "--max-length", 32, "--output", "out")
    words = ("train.tsv", "no word that student and teacher both read to its end", "8 words, at most 32 tokens")
    refused(run("distill", *models_, "--task", "sst2", "--data", tmp_path), *words)


def test_sentence_vectors(bench_folder: Path, tmp_path: Path) -> None:
    """Layers are compared by words, and the teacher's vectors come from its own reading in the same pass."""
    model, text = bench_folder / "model", bench_folder / "text.txt"
    options: dict[str, Any] = {"text": text, "unit": "line", "max_length": 32, "device": "cpu"}
    compresskit.trim(model, text=text, keep=READING, output=tmp_path / "trimmed")
    student = _trimmed(model, tmp_path / "student", text, READING)
    made = [compresskit.distill(student, teacher, max_steps=5, **options) for teacher in (tmp_path / "trimmed", model)]
    assert ["word by word" in " ".join(one.notes) for one in made] == [False, True]
    tokens, words = (one.record["log"][-1] for one in made)
    assert {name for name in tokens if name.startswith("loss_")} == {
        f"loss_{name}" for name in ("embedding", "hidden", "pooled", "similarity")
    }
    for name, loss in tokens.items():
        if name.startswith("loss"):
            assert words[name] == pytest.approx(loss, rel=1e-4), name


def test_sentence_vectors_of_a_student_that_spells(bench_folder: Path, tmp_path: Path) -> None:
    """With the teacher's vectors from the same pass or from a file it learns alike."""
    model, text = bench_folder / "model", bench_folder / "text.txt"
    student = _trimmed(model, tmp_path / "student", text, SPELLING)
    options: dict[str, Any] = {"text": text, "unit": "line", "max_length": 32, "device": "cpu", "max_steps": 2}
    inside, alone = (
        compresskit.distill(student, model, losses={"hidden": weight, "embedding": 0}, **options).record
        for weight in (1e-6, 0)
    )
    assert (set(inside["losses"]), set(alone["losses"])) == (
        {"hidden", "pooled", "similarity"},
        {"pooled", "similarity"},
    )
    first, second = ([entry["loss_pooled"] for entry in record["log"]] for record in (inside, alone))
    assert first == pytest.approx(second, rel=1e-3)


def test_sentences_that_two_folders_read_differently(bench_folder: Path, tmp_path: Path) -> None:
    """Vectors alone are compared then; a loss of layers that was asked for is refused."""
    text = bench_folder / "text.txt"
    teacher = sentence_folder(bench_folder / "model", tmp_path / "teacher", encoder={"max_seq_length": 8})
    student = _trimmed(teacher, tmp_path / "student", text, SPELLING)
    (student / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    options = {"text": text, "unit": "line", "max_steps": 1, "device": "cpu"}
    done = compresskit.distill(student, teacher, **options)
    assert set(done.record["losses"]) == {"pooled", "similarity"}
    assert any(
        "loss embedding and loss hidden are left out" in note and "length, prompt" in note for note in done.notes
    )
    with pytest.raises(InputError, match=r"loss hidden: compares layers, but .*different vocabularies.*leave it out"):
        compresskit.distill(student, teacher, losses={"hidden": 1}, **options)


def test_rows_of_an_evaluation_need_the_teachers_tokens(bench_folder: Path, spelling: Path, tmp_path: Path) -> None:
    """DistillationTrainer takes such rows from Python too."""
    folders = (spelling, bench_folder / "teacher")
    readers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in folders]
    texts = [(text,) for text, _ in reviews(40, seed=5)]
    rows = Dataset.from_dict({"input_ids": readers[0]([text for (text,) in texts])["input_ids"]})
    found = paired(rows, texts, *readers, 40, source="texts", of_tokens=False).rows
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(folders[1])
    student = transformers.AutoModelForSequenceClassification.from_pretrained(spelling)
    collator = PairCollator(transformers.DataCollatorWithPadding(readers[0]), *readers)
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    options = {"stage": Stage(losses={"hidden": 1, "logits": 1}), "args": arguments, "data_collator": collator}
    trainer = DistillationTrainer(student, teacher, train_dataset=found, eval_dataset=found, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    with pytest.raises(InputError, match="eval_dataset: lacks the teacher's own tokens"):
        trainer.evaluate(rows)
    with pytest.raises(InputError, match="different vocabularies"):
        DistillationTrainer(student, teacher, train_dataset=rows, **options)
