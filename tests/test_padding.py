"""Padding changes nothing: not on which side a tokenizer puts it, nor how much of it a batch has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import reviews, tiny_model, write_tsv
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import DataCollatorWithPadding, PreTrainedModel, TrainingArguments

import compresskit
from compresskit import DistillationTrainer, InputError, Stage
from compresskit.calibration.statistics import calibrate
from compresskit.data.corpus import Corpus
from compresskit.model.targets import find_targets
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.registry import KINDS
from compresskit.training.batches import MaskingCollator

TASK = """version: 1
name: padded
kind: {kind}
inputs: [text]
label: label
files: {{dev: dev.tsv}}
metrics: [{metric}]
"""
#: Kind -> its metric, the labels of two texts, and what makes a head for it.
HEADS: dict[str, tuple[str, tuple[str, str], dict[str, Any]]] = {
    "classification": ("accuracy", ("0", "1"), {"num_labels": 2}),
    "regression": ("pearson", ("0.5", "2"), {"num_labels": 1}),
    "multi-label": (
        "micro_f1",
        ("a", "a,b"),
        {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"},
    ),
}


def tokenizer(folder: Path, side: str) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(folder / "model")
    found.padding_side = side
    return found


def logits(kind: str, model: PreTrainedModel, folder: Path, data: Path) -> tuple[list[np.ndarray], list[float]]:
    """Of a model for the same texts, with padding on either side and at two sizes of batches; and the scores."""
    metric, labels, _ = HEADS[kind]
    texts = [" ".join(text.split()[: 1 + number]) for number, (text, _) in enumerate(reviews(8, seed=3))]
    write_tsv(data / "dev.tsv", "text\tlabel", [(text, labels[number % 2]) for number, text in enumerate(texts)])
    (data / "task.yaml").write_text(TASK.format(kind=kind, metric=metric))
    found = load_data(load_task(data / "task.yaml"), data, train=False)
    outputs, scores = [], []
    for side in ("left", "right"):
        for size in (1, 8):
            scoring = Scoring(model, tokenizer(folder, side), 32, batch_size=size)
            outputs.append(np.stack(KINDS.get(kind).logits(scoring, found, found.splits["dev"])[1]["logits"]))
            scores.append(KINDS.get(kind).score(scoring, found, found.splits["dev"])[metric])
    return outputs, scores


@pytest.mark.parametrize("kind", HEADS)
def test_scores(kind: str, bench_folder: Path, tmp_path: Path) -> None:
    model = tiny_model("bert", "classifier", initializer_range=0.5, **HEADS[kind][2])
    outputs, scores = logits(kind, model, bench_folder, tmp_path)
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-4)
    assert scores == pytest.approx([scores[0]] * len(scores), abs=1e-5)


def test_a_head_that_reads_the_last_token_gets_padding_in_front(bench_folder: Path, tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=499, d_model=48, n_layer=2, n_head=4, d_inner=96, num_labels=2)
    torch.manual_seed(0)
    model = transformers.XLNetForSequenceClassification(config).eval()
    outputs, _ = logits("classification", model, bench_folder, tmp_path)
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-4)


@pytest.mark.parametrize("family", ["FNet", "ConvBert", "Nystromformer"])
def test_a_family_that_mixes_padding_into_every_token_gets_none(
    family: str, bench_folder: Path, tmp_path: Path
) -> None:
    """FNet has no attention mask, others have convolutions: a text would get another score in another batch."""
    sizes = {"vocab_size": 499, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "num_labels": 2}
    if family != "FNet":
        sizes |= {"num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, initializer_range=0.5)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):  # Nystromformer's begin with small numbers
            layer.weight.data.normal_()
    outputs, _ = logits("classification", model, bench_folder, tmp_path)
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-4)


def test_bigbird_attends_to_blocks_again_after_a_short_text(bench_folder: Path) -> None:
    """The library lets it attend to all tokens from the first short text on."""
    config = transformers.BigBirdConfig(
        vocab_size=499, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, block_size=2,
        num_random_blocks=1, num_labels=2, initializer_range=0.5, id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BigBirdForSequenceClassification(config).eval()
    words = tokenizer(bench_folder, "right")
    texts = [reviews(9, seed=3)[-1][0].partition(" ")[0], " ".join(text for text, _ in reviews(4, seed=4))]
    with torch.no_grad():  # the long one first
        wanted = [model(**words(text, return_tensors="pt"))["logits"].softmax(-1)[0] for text in reversed(texts)][::-1]
    for _ in range(2):
        found = compresskit.predict(model, texts, tokenizer=words, device="cpu").answers
        for answer, probabilities in zip(found, wanted, strict=True):
            assert answer["probabilities"]["positive"] == pytest.approx(float(probabilities[1]), abs=1e-4)


def test_a_tokenizer_that_does_not_say_what_is_padding(bench_folder: Path, tmp_path: Path) -> None:
    """As FNet's own: batches have a mask all the same, in scores and in training; vectors of sentences are refused."""
    silent, usual = (tokenizer(bench_folder, "right") for _ in range(2))
    silent.model_input_names = ["input_ids", "token_type_ids"]
    teacher = tiny_model("bert", "classifier", initializer_range=0.5, id2label={0: "negative", 1: "positive"})
    task: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu"}
    scores = [compresskit.evaluate(teacher, tokenizer=each, **task).record["scores"] for each in (silent, usual)]
    assert scores[0] == scores[1]
    masked = tiny_model("bert", "masked-lm")
    text = {"text": bench_folder / "text.txt", "max_length": 32, "device": "cpu"}
    for taught_by, lesson in ((teacher, task), (masked, text)):
        trained = []
        for each in (silent, usual):
            torch.manual_seed(0)
            student = compresskit.compress(taught_by, method="low-rank", ratio=2)
            compresskit.distill(student, taught_by, tokenizer=each, max_steps=2, batch_size=8, **lesson)
            trained.append(student.state_dict())
        assert all(torch.equal(trained[0][name], tensor) for name, tensor in trained[1].items())
    base = tiny_model("bert")
    student = compresskit.compress(base, method="low-rank", ratio=2)
    with pytest.raises(InputError, match="does not say which tokens are padding"):
        compresskit.distill(student, base, tokenizer=silent, unit="line", max_steps=2, **text)


def test_a_tokenizer_without_a_mask_token_is_refused(bench_folder: Path) -> None:
    words = tokenizer(bench_folder, "right")
    words.mask_token = None
    teacher = tiny_model("bert", "masked-lm")
    student = compresskit.compress(teacher, method="low-rank", ratio=2)
    with pytest.raises(InputError, match="has no mask token"):
        compresskit.distill(
            student, teacher, tokenizer=words, text=bench_folder / "text.txt", max_length=32, max_steps=1
        )


def test_numbers_of_tokens_beyond_the_embedding_are_refused(bench_folder: Path) -> None:
    gap = tokenizer(bench_folder, "right")
    state = json.loads(gap.backend_tokenizer.to_str())
    state["model"]["vocab"][max(state["model"]["vocab"])] = 4000
    gap = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="[PAD]"
    )
    model = tiny_model("bert", "classifier", num_labels=2)
    with pytest.raises(InputError, match="the number 4000, the embedding has 499 rows"):
        compresskit.evaluate(model, task="sst2", data=bench_folder / "data", tokenizer=gap, max_length=32)


def test_training(bench_folder: Path, tmp_path: Path) -> None:
    """Teacher and student see the same tokens at the same positions, in a task's rows and in a data set's."""
    teacher = tiny_model("bert", "classifier", id2label={0: "negative", 1: "positive"})
    words = Dataset.from_dict(tokenizer(bench_folder, "right")([text for text, _ in reviews(40, seed=4)]))
    options: dict[str, Any] = {"device": "cpu", "max_steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    task = {"task": "sst2", "data": bench_folder / "data", "max_length": 32}
    masked = tiny_model("bert", "masked-lm")
    for taught_by, rows in ((teacher, task), (masked, {"dataset": words})):
        trained = []
        for side in ("left", "right"):
            torch.manual_seed(0)
            student = compresskit.compress(taught_by, method="low-rank", ratio=2)
            given = tokenizer(bench_folder, side)
            compresskit.distill(student, taught_by, tokenizer=given, **rows, **options)
            trained.append(student.state_dict())
            assert given.padding_side == side
        assert all(torch.equal(trained[0][name], tensor) for name, tensor in trained[1].items())


def test_a_trainer_of_your_own(bench_folder: Path, tmp_path: Path) -> None:
    rows = tokenizer(bench_folder, "right")([text for text, _ in reviews(16, seed=4)])
    data = Dataset.from_dict({**rows, "labels": [0, 1] * 8})
    trained = []
    for side in ("left", "right"):
        student = tiny_model("bert", "classifier")
        collator = DataCollatorWithPadding(tokenizer(bench_folder, side))
        DistillationTrainer(
            student,
            tiny_model("bert", "classifier", seed=1),
            stage=Stage(losses={"hidden": 1, "logits": 1, "supervised": 1}),
            args=TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"),
            train_dataset=data,
            data_collator=collator,
        ).train()
        trained.append(student.state_dict())
        assert collator.tokenizer.padding_side == side
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in trained[1].items())


def test_calibration(bench_folder: Path) -> None:
    model = tiny_model()
    found = [
        calibrate(model, tokenizer(bench_folder, side), Corpus("text.txt", bench_folder / "text.txt"), 2000)
        for side in ("left", "right")
    ]
    for target in find_targets(model):
        left, right = (each.second_moment(target) for each in found)
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            torch.testing.assert_close(left, right)


def test_masks_fall_on_tokens_and_not_on_padding(bench_folder: Path) -> None:
    rows = [{"input_ids": [2, *range(6, 6 + n), 3]} for n in (30, 20, 25)]
    batches = [
        MaskingCollator(tokenizer(bench_folder, side), 0.5, 0)([dict(row) for row in rows])
        for side in ("left", "right")
    ]
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        for name in ("input_ids", "labels"):
            assert batches[0][name][number, -size:].tolist() == batches[1][name][number, :size].tolist()


def test_sentence_vectors_that_would_depend_on_the_batch_are_refused(bench_folder: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "dev.tsv", "sentence1\tsentence2\tscore", [("a b", "a", "1"), ("b", "c d e", "2")])
    for side in ("right", "left"):
        options = {"task": "stsb-similarity", "data": tmp_path, "tokenizer": tokenizer(bench_folder, side)}
        if side == "right":
            compresskit.evaluate(tiny_model(), device="cpu", **options)
            continue
        with pytest.raises(InputError, match="pads on the left, where BertModel counts positions"):
            compresskit.evaluate(tiny_model(), device="cpu", **options)
