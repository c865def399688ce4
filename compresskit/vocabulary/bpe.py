"""BPE, of bytes (RoBERTa) or of characters: a word begins as single symbols, and the pair of the earliest merge in the
list is joined until no merge is left.

A merge stays where both its parts and its product are kept. With a token everything is kept that it is made of on the
way. So in a word that ends in kept tokens every merge that was made is still there, and it is still the earliest one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from compresskit.vocabulary.interface import Vocabulary


class Bpe(Vocabulary):
    """Symbols and merges; a symbol inside a word may begin with a prefix, the last one of a word end with a suffix."""

    kind = "BPE"

    @property
    def _prefix(self) -> str:
        return str(self.model.get("continuing_subword_prefix") or "")

    @property
    def _suffix(self) -> str:
        return str(self.model.get("end_of_word_suffix") or "")

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {(left, right): rank for rank, (left, right) in enumerate(self.model["merges"])}

    def _product(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    def text(self, token: int) -> str:
        """See :meth:`Vocabulary.text`."""
        return self.strings[token].removeprefix(self._prefix).removesuffix(self._suffix)

    def letters(self, character: str) -> set[int]:
        """See :meth:`Vocabulary.letters`."""
        starts = (character, self._prefix + character)
        return self._known([*starts, *(start + self._suffix for start in starts)])

    def parts(self, token: int) -> set[int]:
        """Every symbol that the token is made of on the way from single ones."""
        symbols = self._symbols(token)
        seen = set(symbols)
        while True:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(symbols)]
            place = min(range(len(ranks)), key=ranks.__getitem__, default=0)
            if not ranks or ranks[place] == len(self._ranks):
                break
            symbols[place : place + 2] = [self._product(*symbols[place : place + 2])]
            seen.add(symbols[place])
        return self._known(seen) - {token}

    def _symbols(self, token: int) -> list[str]:
        """What a word that reads like the token begins as."""
        string = self.strings[token]
        inside = bool(self._prefix) and string.startswith(self._prefix)
        symbols = [
            (self._prefix if inside or place else "") + character for place, character in enumerate(self.text(token))
        ]
        if self._suffix and string.endswith(self._suffix) and symbols:
            symbols[-1] += self._suffix
        return symbols

    def rebuilt(self, new: Mapping[int, int]) -> dict[str, Any]:
        """See :meth:`Vocabulary.rebuilt`."""
        vocab = self._renumbered(new)
        merges = [
            [left, right]
            for left, right in self.model["merges"]
            if left in vocab and right in vocab and self._product(left, right) in vocab
        ]
        return {**self.model, "vocab": vocab, "merges": merges}

    def files(self, model: Mapping[str, Any]) -> dict[str, str]:
        """The vocabulary as JSON, and one merge a line."""
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        return {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + merges,
        }
