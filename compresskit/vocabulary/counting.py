"""How a text uses the tokens of a vocabulary, and what a trimmed one makes of text that was held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Encoding, Tokenizer

from compresskit.data.corpus import Corpus, is_held_out
from compresskit.errors import InputError, WorkError
from compresskit.vocabulary.tokenizer_file import TokenizerFile

#: Tokens of a text that are read at most: more would change little.
MOST_TOKENS = 20_000_000
#: Documents that are read at a time.
_BATCH = 64


@dataclass(frozen=True)
class Counts:
    """How often each token occurs in a text.

    Attributes:
        tokens: in the counted part, by number.
        documents: that were read, held-out ones among them.
        held_out: how many tokens the held-out part has; 0 where the text is too short to have one.
    """

    tokens: np.ndarray
    documents: int
    held_out: int


@dataclass(frozen=True)
class HeldOut:
    """What a trimmed vocabulary makes of text that it was not chosen on. Shares are of the whole vocabulary's tokens,
    and ``kept``, ``re_split`` and ``unknown`` make up all of them.

    Attributes:
        tokens: of the whole vocabulary.
        kept: the share of those that are still tokens.
        re_split: of those that are not, in words that are now cut into other tokens.
        unknown: of those that are not, in words that now hold the unknown token and did not before.
        longer: by which share the text has more tokens than before.
    """

    tokens: int
    kept: float
    re_split: float
    unknown: float
    longer: float


def plain_reader(text: str) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, without its limits of length.

    Raises:
        InputError: it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain ones
        raise InputError(f"tokenizer: its tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def count(reader: Tokenizer, tokenizer: TokenizerFile, corpus: Corpus) -> Counts:
    """How often the text's tokens occur, up to 20 million of them. A fifth of the documents is held out.

    Raises:
        InputError: unreadable, empty or undecodable text, or one with none of the tokenizer's tokens.
    """
    size = max(tokenizer.strings) + 1
    training, held_out = (np.zeros(size, dtype=np.int64) for _ in range(2))
    documents = 0
    for batch in _batches(corpus, None):
        for document, encoding in zip(batch, _encode(reader, batch), strict=True):
            part = held_out if is_held_out(document) else training
            part += np.bincount(encoding.ids, minlength=size)
        documents += len(batch)
        if training.sum() + held_out.sum() >= MOST_TOKENS:
            break
    whole = training + held_out
    read = sorted(tokenizer.strings.keys() - tokenizer.special - {tokenizer.vocabulary.unknown})
    if not whole[read].any():
        raise InputError(f"text {corpus.name}: has none of the model's tokens, so there is nothing to choose by")
    if not training.sum() or not held_out.sum():
        return Counts(whole, documents, 0)
    return Counts(training, documents, int(held_out.sum()))


def compare(
    before: Tokenizer, after: Tokenizer, new: dict[int, int], unknown: int | None, corpus: Corpus, counts: Counts
) -> HeldOut | None:
    """Read the held-out text (all of it, where nothing was held out) with both tokenizers.

    Args:
        before: with the whole vocabulary.
        after: with the trimmed one.
        new: the number of every kept token in ``after``, by that in ``before``.
        unknown: the unknown token's number in ``before``.
        corpus: that ``counts`` are of.
        counts: of ``before``.

    Returns:
        None where no text was held out.

    Raises:
        WorkError: a word of kept tokens alone is read as something else.
    """
    table = np.full(len(counts.tokens), -1)
    table[list(new)] = list(new.values())
    sums = np.zeros(4, dtype=np.int64)
    for batch in _batches(corpus, counts.documents):
        chosen = [document for document in batch if not counts.held_out or is_held_out(document)]
        for old, made in zip(_encode(before, chosen), _encode(after, chosen), strict=True):
            sums += _compared(old, made, table, -1 if unknown is None else unknown)
    if not counts.held_out:
        return None
    tokens, lost, unreadable, now = (int(number) for number in sums)
    return HeldOut(
        tokens=tokens,
        kept=1 - lost / tokens,
        re_split=(lost - unreadable) / tokens,
        unknown=unreadable / tokens,
        longer=now / tokens - 1,
    )


def _compared(old: Encoding, made: Encoding, table: np.ndarray, unknown: int) -> np.ndarray:
    """Of one document: tokens, those not kept, those of them in words that became unknown, tokens now."""
    ids, words = np.array(old.ids, dtype=np.int64), np.array(old.word_ids, dtype=np.int64)
    new_ids, new_words = np.array(made.ids, dtype=np.int64), np.array(made.word_ids, dtype=np.int64)
    size = int(max(words.max(initial=-1), new_words.max(initial=-1))) + 1
    lost = table[ids] < 0
    changed = np.zeros(size, dtype=bool)
    changed[words[lost]] = True
    if not np.array_equal(table[ids[~changed[words]]], new_ids[~changed[new_words]]):
        raise WorkError("tokenizer: reads a word of kept tokens as something else once it is trimmed")
    had, has = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    if unknown >= 0:
        had[words[ids == unknown]] = True
        has[new_words[new_ids == table[unknown]]] = True
    return np.array([len(ids), lost.sum(), (lost & (has & ~had)[words]).sum(), len(new_ids)])


def _batches(corpus: Corpus, documents: int | None) -> Iterator[list[str]]:
    """The text's documents, or the first so many of them, some at a time."""
    source = islice(corpus.documents(), documents)
    while batch := list(islice(source, _BATCH)):
        yield batch


def _encode(reader: Tokenizer, documents: list[str]) -> list[Encoding]:
    found: list[Encoding] = reader.encode_batch(documents, add_special_tokens=False)
    return found
