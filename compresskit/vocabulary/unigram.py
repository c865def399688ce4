"""Unigram (SentencePiece): of all ways to cut a text the one with the highest sum of scores is taken.

The best way of all is the best of fewer ways too. The score of an unknown character hangs on the lowest score of the
vocabulary, so that a token with the lowest one is always kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.vocabulary.interface import Vocabulary


class Unigram(Vocabulary):
    """Pieces with scores, in the order of their numbers."""

    kind = "Unigram"

    def _strings(self) -> dict[int, str]:
        return {number: piece for number, (piece, _) in enumerate(self.model["vocab"])}

    @property
    def unknown(self) -> int | None:
        """See :attr:`Vocabulary.unknown`."""
        number: int | None = self.model.get("unk_id")
        return number

    def always(self) -> set[int]:
        """The unknown token, the bytes, and a token with the lowest score."""
        scores = [score for _, score in self.model["vocab"]]
        return super().always() | {scores.index(min(scores))}

    def rebuilt(self, new: Mapping[int, int]) -> dict[str, Any]:
        """See :meth:`Vocabulary.rebuilt`."""
        vocab = self.model["vocab"]
        order = sorted(new, key=new.__getitem__)
        unknown = None if self.unknown is None else new[self.unknown]
        return {**self.model, "vocab": [vocab[old] for old in order], "unk_id": unknown}
