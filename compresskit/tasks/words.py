"""A text as words, and the entities that tags of words make."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Letters of Chinese and Japanese, of which each is taken for a word, as BERT does.
_LETTER = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
#: What joins letters unseen, in Persian and in scripts of India.
_JOINERS = "\u200c\u200d"
#: A word of a text.
_WORD = re.compile(rf"{_LETTER}|[@#]?(?:(?!{_LETTER})\w)+(?:[-'\u2019.@&_](?:(?!{_LETTER})\w)+)*|[^\w\s]")


class Words(list[str]):
    """The words of a text.

    Attributes:
        text: the whole.
        places: of each word its first character in it, and the one behind its last.
    """

    text: str
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str) -> Words:
        """Letters and digits with their marks (vowels, accents) and with what joins them are a word, and so are any
        other sign and any letter of Chinese or Japanese.

        Example:
            >>> Words.of("Dr. Smith-Jones, U.S.")
            ['Dr', '.', 'Smith-Jones', ',', 'U.S', '.']
        """
        places = [match.span() for match in _WORD.finditer(_with_letters_for_marks(text))]
        words = cls(text[start:end] for start, end in places)
        words.text, words.places = text, places
        return words


def _with_letters_for_marks(text: str) -> str:
    """The text with a letter in the place of every mark behind a letter, which for Python is none."""
    if text.isascii():
        return text
    found: list[str] = []
    for character in text:
        of_letter = bool(found) and found[-1].isalnum() and not re.match(_LETTER, found[-1])
        marks = character in _JOINERS or unicodedata.category(character).startswith("M")
        found.append("x" if marks and of_letter else character)
    return "".join(found)


def entities(words: Sequence[str], tagged: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Type, text, place and mean probability of every entity that seqeval finds in the tags.

    Args:
        words: of a text, or as they were given. Of :class:`Words` the places ``start`` and ``end`` are characters of
            the text, of others they are numbers of words. What stands at ``end`` is not part of the entity.
        tagged: tag (IOB2 or IOBES) and probability of each word.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    found = []
    for kind, first, last in get_entities([tag for tag, _ in tagged]):
        text, start, end = " ".join(words[first : last + 1]), first, last + 1
        if isinstance(words, Words):
            start, end = words.places[first][0], words.places[last][1]
            text = words.text[start:end]
        score = float(np.mean([score for _, score in tagged[first : last + 1]]))
        found.append({"type": kind, "text": text, "start": start, "end": end, "score": score})
    return found
