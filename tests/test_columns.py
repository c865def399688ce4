"""Columns of a data set from Python: what the model takes reaches it padded, or is refused; nothing goes unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model
from datasets import Dataset
from transformers import PreTrainedModel

import compresskit
from compresskit import InputError

ROWS = [[2, *range(5, 5 + length), 3] for length in (4, 9, 17, 6, 12, 8)]
BOXES = [[[place, 2, place + 1, 4] for place in range(len(row))] for row in ROWS]


@pytest.fixture
def tokenizer(bench_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(bench_folder / "model")


def layout(head: str) -> PreTrainedModel:
    config = transformers.LayoutLMConfig(
        vocab_size=499, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, max_2d_position_embeddings=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"LayoutLMFor{head}")(config)
    return model.eval()


def distill(teacher: PreTrainedModel, tokenizer: Any, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """What the student was called with."""
    student = compresskit.compress(teacher, method="low-rank", ratio=1.5)
    seen: list[dict[str, Any]] = []
    student.register_forward_pre_hook(lambda _, __, given: seen.append(dict(given)), with_kwargs=True)
    data = Dataset.from_dict({"input_ids": ROWS, **columns})
    compresskit.distill(student, teacher, dataset=data, tokenizer=tokenizer, batch_size=5, max_steps=1, device="cpu")
    return [given for given in seen if len(given["input_ids"]) > 1]


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification", "SequenceClassification"])
def test_boxes_of_the_words_reach_the_model(head: str, tokenizer: Any) -> None:
    labels: dict[str, Any] = {
        "TokenClassification": [[0] * len(row) for row in ROWS],
        "SequenceClassification": [0] * 6,
    }
    calls = distill(layout(head), tokenizer, {"bbox": BOXES} | ({"labels": labels[head]} if head in labels else {}))
    assert calls
    for given in calls:
        lengths = given["attention_mask"].sum(1).tolist()
        for boxes, length in zip(given["bbox"].tolist(), lengths, strict=True):
            own = next(row for row in BOXES if len(row) == length)
            assert boxes == [*own, *[[0] * 4] * (len(boxes) - length)]


def test_positions_and_types_reach_the_model_whatever_the_tokenizer_names(tokenizer: Any) -> None:
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    columns = {
        "position_ids": [list(reversed(range(len(row)))) for row in ROWS],
        "token_type_ids": [[0, *[1] * (len(row) - 1)] for row in ROWS],
        "text": ["not read"] * 6,
    }
    for given in distill(tiny_model("bert", "classifier"), tokenizer, {**columns, "labels": [0, 1] * 3}):
        mask = given["attention_mask"]
        assert torch.equal(given["token_type_ids"].sum(1), mask.sum(1) - 1)
        assert torch.equal(given["position_ids"][:, 0], mask.sum(1) - 1)
        assert "text" not in given


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("bbox", [box[1:] for box in BOXES], "row 0: bbox, an input of LayoutLMForMaskedLM, must be one integer"),
        ("bbox", [[[0.5] * 4] * len(row) for row in ROWS], "row 0: bbox"),
        ("inputs_embeds", [[[0.5]] * len(row) for row in ROWS], "row 0: inputs_embeds"),
        ("position_ids", [None, *[[0] * len(row) for row in ROWS[1:]]], "row 0: position_ids"),
        ("attention_mask", [[1] * len(row) for row in ROWS[:-1]] + [[1]], "row 5: attention_mask"),
    ],
)
def test_inputs_of_another_form_are_refused(name: str, values: list[Any], says: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=says):
        distill(layout("MaskedLM"), tokenizer, {name: values})


def test_targets_of_a_head_that_is_not_trained_are_refused(tokenizer: Any) -> None:
    model = transformers.BertForPreTraining(tiny_model().config).eval()
    with pytest.raises(InputError, match="row 0: next_sentence_label, an input of BertForPreTraining"):
        distill(model, tokenizer, {"next_sentence_label": [0, 1] * 3})
