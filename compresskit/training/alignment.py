"""Student and teacher that cut texts into different tokens: they are compared word by word.

Each reads the same text with its own tokenizer. A word is what :class:`compresskit.tasks.words.Words` takes for one, or
several of them where a token of either model reaches over their ends. The state of a word in a layer is the mean over
its tokens. The special tokens that both have at the beginning, and at the end, count as words too. A word that one of
the two does not read to its end (its sequence is cut there) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from compresskit.errors import InputError, no_panic
from compresskit.tasks.losses import IGNORED
from compresskit.tasks.predictions import Output
from compresskit.tasks.words import Words
from compresskit.training.batches import PaddingCollator

#: Column with the number of the word that a token belongs to.
WORD = "word_of_token"
#: What the names of the columns of the teacher's own tokens begin with.
TEACHER = "teacher_"
_IDS, _WORD = f"{TEACHER}input_ids", f"{TEACHER}{WORD}"
#: Texts that are read at a time: what tokenizers say of them takes room.
_TEXTS = 1024

Texts = Sequence[tuple[str, ...]]


def is_by_words(columns: Collection[str]) -> bool:
    """Whether rows with these columns hold the teacher's own tokens beside the student's."""
    return _IDS in columns


def pair_columns(columns: Collection[str]) -> list[str]:
    """Those of the columns that :func:`paired` adds; none where it was not used."""
    return [name for name in columns if name == WORD or name.startswith(TEACHER)] if is_by_words(columns) else []


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """What :func:`paired` gives.

    Attributes:
        rows: the student's, with the teacher's tokens and the words beside them.
        words: how many the texts have.
        left_out: how many of them are not compared.
    """

    rows: Dataset
    words: int
    left_out: int


def paired(
    rows: Dataset, texts: Texts, student: Any, teacher: Any, max_length: int, *, source: str, of_tokens: bool
) -> Paired:
    """The student's rows with columns of the teacher's tokens of the same texts, and of the words that both read.

    Columns: ``word_of_token``, for each token the number of its word from 1 on, and 0 for one of no word;
    ``teacher_input_ids`` and what else the teacher's tokenizer gives; ``teacher_word_of_token``.

    Args:
        rows: with ``input_ids`` by ``student``; one row a text.
        texts: that the rows are made of, one or two each.
        student, teacher: fast tokenizers.
        max_length: tokens of a sequence, for both.
        source: of the texts, for messages.
        of_tokens: whether ``labels`` are those of tokens. They are ignored where a token is of no word.

    Raises:
        InputError: rows that are not these texts; texts that have no word that both read to its end.
    """
    columns: dict[str, list[Any]] = {WORD: [], _WORD: []}
    words = left_out = 0
    read = rows.select_columns("input_ids")
    if len(read) != len(texts):
        raise _other_texts(source)
    for start in range(0, len(texts), _TEXTS):
        some = texts[start : start + _TEXTS]
        with no_panic(f"data {source}, cut into tokens"):
            ours, theirs = (_read(tokenizer, some, max_length) for tokenizer in (student, teacher))
        if ours["input_ids"] != read[start : start + len(some)]["input_ids"]:
            raise _other_texts(source)
        for name in teacher.model_input_names:
            if name in theirs and name != "attention_mask":
                columns.setdefault(f"{TEACHER}{name}", []).extend(theirs[name])
        for text, our, their in zip(some, ours.encodings, theirs.encodings, strict=True):
            (first, second), found, lost = _words(text, our, their)
            columns[WORD].append(first)
            columns[_WORD].append(second)
            words, left_out = words + found, left_out + lost
    if words == left_out:
        raise InputError(
            f"data {source}: has no word that student and teacher both read to its end ({words:,} words, at most "
            f"{max_length} tokens of a text): do their tokenizers read the same language?"
        )
    if of_tokens and "labels" in rows.column_names:
        rows = rows.remove_columns("labels").add_column("labels", _known(rows["labels"][:], columns[WORD]))
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return Paired(rows, words, left_out)


def _other_texts(source: str) -> InputError:
    return InputError(
        f"data {source}: student and teacher have different vocabularies, and rows of this kind of task are no whole "
        "texts that both could read: trim the teacher like the student (compresskit trim)"
    )


def _known(labels: list[list[int]], words: list[list[int]]) -> list[list[int]]:
    """Labels of tokens, those of no word ignored."""
    return [
        [label if word else IGNORED for label, word in zip(*row, strict=True)]
        for row in zip(labels, words, strict=True)
    ]


def teacher_rows(rows: Dataset) -> Dataset:
    """The teacher's own columns of :func:`paired` rows as those of a model that is alone."""
    kept = [name for name in rows.column_names if name.startswith(TEACHER) and name != _WORD]
    found = rows.select_columns(kept).rename_columns({name: name.removeprefix(TEACHER) for name in kept})
    return found.add_column("length", [len(ids) for ids in found["input_ids"]])


def _read(tokenizer: Any, texts: Texts, max_length: int) -> Any:
    columns = (list(column) for column in zip(*texts, strict=True))
    return tokenizer(*columns, truncation=True, max_length=max_length)


def _words(texts: Sequence[str], *encodings: Any) -> tuple[list[list[int]], int, int]:
    """For each encoding (of the library ``tokenizers``) the words of its tokens; how many words the texts have, and how
    many of them are in no encoding or not in all.
    """
    sequences = [np.array([-1 if part is None else part for part in each.sequence_ids]) for each in encodings]
    spans = [np.array(each.offsets, dtype=np.int64).reshape(-1, 2) for each in encodings]
    found = [np.zeros(len(each), dtype=np.int64) for each in spans]
    last = words = shared = 0
    if all(len(parts) and parts[0] < 0 for parts in sequences):
        last = 1
        for numbers in found:
            numbers[0] = last
    for part, text in enumerate(texts):
        tokens = [np.flatnonzero((p == part) & (s[:, 1] > s[:, 0])) for p, s in zip(sequences, spans, strict=True)]
        places = np.array(Words.of(text).places, dtype=np.int64).reshape(-1, 2)
        own = [each[chosen] for each, chosen in zip(spans, tokens, strict=True)]
        stretch = _stretches(len(text), np.concatenate([places, *own]))
        first, end = _ends(stretch, places, len(text))
        whole = end > 0
        words += int(whole.sum())
        for each in own:
            begins, ends = _ends(stretch, each, len(text))
            whole &= (begins <= first) & (ends >= end)
        numbers_of = np.where(whole, last + np.cumsum(whole), 0)
        for numbers, chosen, each in zip(found, tokens, own, strict=True):
            numbers[chosen] = numbers_of[stretch[each[:, 0]]]
        last += int(whole.sum())
        shared += int(whole.sum())
    if all(len(parts) > 1 and parts[-1] < 0 for parts in sequences):
        for numbers in found:
            numbers[-1] = last + 1
    return [numbers.tolist() for numbers in found], words, words - shared


def _stretches(characters: int, spans: np.ndarray) -> np.ndarray:
    """(characters,): the number of the stretch of text that a character lies in, from 0 on. Stretches are as short as
    they can be if no span of characters, (n, 2), reaches over the end of one.
    """
    inside = np.zeros(characters + 1, dtype=np.int64)
    np.add.at(inside, spans[:, 0] + 1, 1)
    np.add.at(inside, spans[:, 1], -1)
    begins = np.cumsum(inside)[:-1] == 0
    return np.cumsum(begins) - 1


def _ends(stretch: np.ndarray, spans: np.ndarray, characters: int) -> tuple[np.ndarray, np.ndarray]:
    """For each stretch where its first span begins and its last one ends; ``characters`` and 0 where it has none."""
    count = int(stretch[-1]) + 1 if len(stretch) else 0
    begins, ends = np.full(count, characters, dtype=np.int64), np.zeros(count, dtype=np.int64)
    np.minimum.at(begins, stretch[spans[:, 0]], spans[:, 0])
    np.maximum.at(ends, stretch[spans[:, 0]], spans[:, 1])
    return begins, ends


# -- batches ----------------------------------------------------------------------------------------------------------


class PairCollator:
    """Batches of :func:`paired` rows: the student's columns as its own collator makes them, the teacher's beside them.

    Args:
        student: makes a padded batch of the student's columns; it pads as ``tokenizer`` does.
        tokenizer: the student's, as its model may be padded.
        teacher: the same of the teacher.
    """

    def __init__(
        self, student: Callable[[list[dict[str, Any]]], Mapping[str, Any]], tokenizer: Any, teacher: Any
    ) -> None:
        self.student = student
        multiple = getattr(student, "pad_to_multiple_of", None)  # words are as long as the student's tokens
        self.words, self.teacher = PaddingCollator(tokenizer, pad_to_multiple_of=multiple), PaddingCollator(teacher)
        self.words.columns = self.teacher.columns = (WORD,)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        theirs = [{n.removeprefix(TEACHER): row[n] for n in row if n.startswith(TEACHER)} for row in rows]
        own = [student_inputs(row) for row in rows]
        words = self.words([{n: row[n] for n in ("input_ids", WORD)} for row in rows])
        taught = {f"{TEACHER}{name}": value for name, value in self.teacher(theirs).items()}
        return {**self.student(own), WORD: words[WORD], **taught}


def student_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch, or a row, without the columns that :func:`paired` adds."""
    return {name: batch[name] for name in batch if name not in pair_columns(batch)}


def teacher_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the teacher reads in a batch of :class:`PairCollator`; empty where it reads what the student does."""
    if not is_by_words(batch):
        return {}
    return {n.removeprefix(TEACHER): batch[n] for n in batch if n.startswith(TEACHER) and n != _WORD}


def words_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(B,): how many words each row has; None where tokens are compared."""
    words = WordsOfBatch.of(batch)
    return None if words is None else words.counts


@dataclass(frozen=True)
class WordsOfBatch:
    """Which tokens of a batch belong to which words.

    Attributes:
        student: (B, T), for each token the number of its word from 1 on; 0: of none.
        teacher: (B, T') likewise; a word has the same number.
    """

    student: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> WordsOfBatch | None:
        """Those of a batch; None where student and teacher read the same tokens."""
        return cls(batch[WORD], batch[_WORD]) if is_by_words(batch) else None

    @property
    def counts(self) -> Tensor:
        """(B,): how many words each row has."""
        return self.student.amax(1)

    def aligned(self, student: Output, teacher: Output, *, of_tokens: bool) -> tuple[Output, Output, Tensor]:
        """Both models' outputs with hidden states (B, W, H) of words in the place of those of tokens, and which words
        there are, (B, W).

        Args:
            student, teacher: outputs.
            of_tokens: also the teacher's logits (B, T', C) become (B, T, C): each of the student's tokens gets those of
                the first token of its word. Tokens of no word get any.
        """
        numbers = torch.arange(1, int(self.counts.max()) + 1, device=self.student.device)
        changed = []
        for outputs, words in ((student, self.student), (teacher, self.teacher)):
            states = outputs.get("hidden_states")
            found = {**outputs}
            if states is not None:
                found["hidden_states"] = tuple(_means(layer, words, numbers) for layer in states)
            changed.append(found)
        if of_tokens:
            changed[1]["logits"] = self._on_student_tokens(teacher["logits"])
        ours, theirs = (type(one)(**new) for one, new in zip((student, teacher), changed, strict=True))
        return ours, theirs, (numbers <= self.counts[:, None]).long()

    def _on_student_tokens(self, logits: Tensor) -> Tensor:
        last = self.teacher.shape[1] - 1
        places = torch.arange(last + 1, device=logits.device)
        # (B, T, T'): the places of the teacher's tokens of the same word, the last one for all others.
        same = torch.where(self.student[:, :, None] == self.teacher[:, None, :], places, last)
        return logits.gather(1, same.amin(2)[..., None].expand(-1, -1, logits.shape[-1]))


def _means(states: Tensor, words: Tensor, numbers: Tensor) -> Tensor:
    """(B, T, H) -> (B, W, H) in float32: the means over the tokens of each word; 0 for a word that a row lacks."""
    share = (words[:, None, :] == numbers[:, None]).float()  # (B, W, T)
    return (share / share.sum(2, keepdim=True).clamp(min=1)) @ states.float()
