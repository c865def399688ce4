"""WordPiece (BERT): at each place of a word the longest token that fits is taken.

A kept token that was the longest one before is so still, since nothing was added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.vocabulary.interface import Vocabulary


class WordPiece(Vocabulary):
    """Words and pieces of words; a piece inside a word begins with a prefix, mostly ``##``."""

    kind = "WordPiece"

    @property
    def _prefix(self) -> str:
        return str(self.model.get("continuing_subword_prefix") or "")

    def text(self, token: int) -> str:
        """See :meth:`Vocabulary.text`."""
        return self.strings[token].removeprefix(self._prefix)

    def letters(self, character: str) -> set[int]:
        """See :meth:`Vocabulary.letters`."""
        return self._known([character, self._prefix + character])

    def rebuilt(self, new: Mapping[int, int]) -> dict[str, Any]:
        """See :meth:`Vocabulary.rebuilt`."""
        return {**self.model, "vocab": self._renumbered(new)}

    def files(self, model: Mapping[str, Any]) -> dict[str, str]:
        """One token a line."""
        return {"vocab.txt": "\n".join(model["vocab"]) + "\n"}
