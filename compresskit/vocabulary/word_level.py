"""WordLevel: a word is a token or unknown. What is left out cannot change how other words are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.vocabulary.interface import Vocabulary


class WordLevel(Vocabulary):
    """Whole words."""

    kind = "WordLevel"

    def letters(self, character: str) -> set[int]:
        """None: letters spell no word here."""
        return set()

    def rebuilt(self, new: Mapping[int, int]) -> dict[str, Any]:
        """See :meth:`Vocabulary.rebuilt`."""
        return {**self.model, "vocab": self._renumbered(new)}
