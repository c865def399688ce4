"""Tokenizers that cannot split texts: texts are split for them, or refused, but never cut without a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from transformers import BertTokenizer, PreTrainedTokenizer

import compresskit
from compresskit import InputError
from compresskit.benchmark.quality import find_passages
from compresskit.data import corpus
from compresskit.model.tokenizer import split


class Words(PreTrainedTokenizer):
    """Words between white space, by a table; the special tokens stand around a text."""

    model_input_names = ("input_ids", "token_type_ids", "attention_mask")

    def __init__(self, words: Sequence[str], **options: Any) -> None:
        self.words = {word: number for number, word in enumerate(words)}
        super().__init__(
            pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", **options
        )

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.words)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, 1)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.words)[index]

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [2, *first, 3] if second is None else [2, *first, 3, *second, 3]


@pytest.fixture
def slow(bench_folder: Path) -> Words:
    return Words((bench_folder / "model" / "vocab.txt").read_text().split())


def test_texts_are_split_as_a_fast_tokenizer_does(slow: Words, bench_folder: Path) -> None:
    fast = BertTokenizer.from_pretrained(bench_folder / "model")
    assert not slow.is_fast
    texts = ["the film was very good and the plot so bad", "good", "", "the " * 40]
    for length in (5, 8, 40):
        assert split(slow, texts, length) == split(fast, texts, length)
    text = corpus.find_corpus(bench_folder / "text.txt")
    read = [corpus.sequences(text, tokenizer, 16)["input_ids"][:] for tokenizer in (slow, fast)]
    assert read[0] == read[1]
    assert max(map(len, read[0])) == 16
    passages = [find_passages(text, tokenizer, 16) for tokenizer in (slow, fast)]
    assert torch.equal(passages[0].tokens, passages[1].tokens)


def test_calibration_and_stage_one_read_everything(slow: Words, bench_folder: Path) -> None:
    model = tiny_model("bert", vocab_size=499)
    options: dict[str, Any] = {"method": "low-rank", "ratio": 2, "calibration": bench_folder / "text.txt"}
    fast = BertTokenizer.from_pretrained(bench_folder / "model")
    ours, theirs = (compresskit.compress(model, tokenizer=tokenizer, **options) for tokenizer in (slow, fast))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    records = [
        compresskit.distill(
            compresskit.compress(model, method="low-rank", ratio=2),
            model,
            text=bench_folder / "text.txt",
            tokenizer=tokenizer,
            max_length=32,
            max_steps=2,
            device="cpu",
        ).record
        for tokenizer in (slow, fast)
    ]
    assert records[0]["data"] == records[1]["data"]
    assert records[0]["tokens"] == records[1]["tokens"]


def test_what_cannot_be_split_is_refused(slow: Words, tmp_path: Path) -> None:
    class Between(Words):
        def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
            return [token for word in first for token in (word, 3)]

    with pytest.raises(InputError, match="Between cannot split texts"):
        split(Between(list(slow.words)), ["the film was good"], 8)
    with pytest.raises(InputError, match="max length 2: Words puts 2 special tokens around every text"):
        split(slow, ["the film was good"], 2)

    answer = {"text": "good", "answer_start": 13}
    asked = {"question": "what was it ?", "answers": [answer]}
    data = {"data": [{"paragraphs": [{"context": "the film was good", "qas": [asked]}]}]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="Words is no fast tokenizer"):
        compresskit.evaluate(
            tiny_model("bert", "questions"), task="squad", data=tmp_path, tokenizer=slow, max_length=32, device="cpu"
        )
    (tmp_path / "dev.conll").write_text("the O\nfilm B-x\n")
    names = {"id2label": {0: "O", 1: "B-x", 2: "I-x"}, "label2id": {"O": 0, "B-x": 1, "I-x": 2}}
    with pytest.raises(InputError, match=r"Words is no fast tokenizer .* as tags need"):
        compresskit.evaluate(
            tiny_model("bert", "tokens", **names), task="wnut17", data=tmp_path, tokenizer=slow, max_length=32
        )
