"""Which tokens are of which words, for two tokenizers that cut a text differently; windows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compresskit import InputError
from compresskit.model.tokenizer import pieces
from compresskit.training.alignment import WordsOfBatch, paired, teacher_rows


def _reader(vocabulary: Sequence[str], split: Any, around: bool = True) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary]
    made = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = split
    if around:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def whole_words() -> Any:
    return _reader(["good", "plot", ",", "x", "##y"], pre_tokenizers.BertPreTokenizer())


@pytest.fixture
def letters() -> Any:
    split = pre_tokenizers.BertPreTokenizer()
    return _reader([*(c for c in "godplt,xy"), *(f"##{c}" for c in "godpltxy")], split)


def _words(texts: Any, student: Any, teacher: Any, max_length: int = 32, **more: Any) -> Any:
    columns = [list(column) for column in zip(*texts, strict=True)]
    rows = Dataset.from_dict(
        {"input_ids": student(*columns, truncation=True, max_length=max_length)["input_ids"], **more}
    )
    return paired(rows, texts, student, teacher, max_length, source="texts", of_tokens=bool(more))


def test_pieces_have_the_number_of_their_word(whole_words: Any, letters: Any) -> None:
    found = _words([("good, plot",), ("xy",)], letters, whole_words)
    assert found.rows["word_of_token"][:] == [[1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5], [1, 2, 2, 3]]
    assert found.rows["teacher_word_of_token"][:] == [[1, 2, 3, 4, 5], [1, 2, 2, 3]]
    assert (found.words, found.left_out) == (4, 0)
    rows = teacher_rows(found.rows)
    assert rows["input_ids"][:] == whole_words(["good, plot", "xy"])["input_ids"]
    assert rows["length"][:] == [5, 4]


def test_two_texts_and_unknown_words(whole_words: Any, letters: Any) -> None:
    found = _words([("good", "what plot")], letters, whole_words)
    assert found.rows["word_of_token"][0] == [1, 2, 2, 2, 2, 0, 3, 4, 4, 4, 4, 5]
    assert found.rows["teacher_word_of_token"][0] == [1, 2, 0, 3, 4, 5]


def test_words_that_are_cut_off_are_left_out(whole_words: Any, letters: Any) -> None:
    texts = [("good good plot",)]
    found = _words(texts, letters, whole_words, 8)
    assert found.rows["word_of_token"][0] == [1, 2, 2, 2, 2, 0, 0, 3]
    assert found.rows["teacher_word_of_token"][0] == [1, 2, 0, 0, 3]
    assert (found.words, found.left_out) == (3, 2)
    turned = _words(texts, whole_words, letters, 8)
    assert turned.rows["word_of_token"][0] == found.rows["teacher_word_of_token"][0]


def test_a_token_of_two_words_joins_them(whole_words: Any) -> None:
    """As SentencePiece may have them; special tokens of one model alone are of no word."""
    joined = _reader(["good plot", "x"], pre_tokenizers.Split(",", "isolated"), around=False)
    found = _words([("good plot,x",)], joined, whole_words)
    assert found.rows["word_of_token"][0] == [1, 2, 3]
    assert found.rows["teacher_word_of_token"][0] == [0, 1, 1, 2, 3, 0]


def test_labels_of_words_that_are_cut_off_are_ignored(whole_words: Any, letters: Any) -> None:
    labels = [[-100, 7, 8, 9, -100]]
    found = _words([("good good plot",)], whole_words, letters, 8, labels=labels)
    assert found.rows["labels"][0] == [-100, 7, -100, -100, -100]


def test_states_are_means_over_the_tokens_of_a_word() -> None:
    words = WordsOfBatch(torch.tensor([[1, 2, 2, 0], [1, 0, 0, 0]]), torch.tensor([[0, 2, 1], [1, 0, 0]]))
    ours, theirs = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    logits = torch.randn(2, 3, 7)
    student, teacher, mask = words.aligned(
        {"hidden_states": (ours,)}, {"hidden_states": (theirs,), "logits": logits}, of_tokens=True
    )
    assert mask.tolist() == [[1, 1], [1, 0]]
    torch.testing.assert_close(student["hidden_states"][0][0], torch.stack([ours[0, 0], ours[0, 1:3].mean(0)]))
    torch.testing.assert_close(teacher["hidden_states"][0][0], theirs[0, [2, 1]])
    assert torch.equal(teacher["logits"][0, :3], logits[0, [2, 1, 1]])
    assert teacher["logits"].shape == (2, 4, 7)


def test_rows_that_are_no_whole_texts(whole_words: Any, letters: Any) -> None:
    for rows in ([[2, 5, 3]], [[2, 4, 3], [2, 5, 3]]):
        with pytest.raises(InputError, match="no whole texts that both could read: trim the teacher"):
            paired(
                Dataset.from_dict({"input_ids": rows}),
                [("good",)],
                letters,
                whole_words,
                9,
                source="a",
                of_tokens=False,
            )


def test_a_text_is_cut_between_words(whole_words: Any, letters: Any) -> None:
    text = "good plot good, plot plot"
    found = pieces(letters, text, 8)
    assert "".join(piece for piece, _ in found) == text
    assert [piece for piece, _ in found] == ["good", " plot", " good,", " plot", " plot"]
    assert all(len(letters(piece)["input_ids"]) <= 8 for piece, _ in found)
    assert [piece for piece, _ in pieces(whole_words, text, 8)] == [text]


def test_a_text_without_gaps_is_cut_anywhere(letters: Any) -> None:
    found = pieces(letters, "xyxyxyxy xy", 5)
    assert [piece for piece, _ in found] == ["xyx", "yxy", "xy", " xy"]
    with pytest.raises(InputError, match=r"max length 2: .* puts 2 special tokens"):
        pieces(letters, "xy", 2)
