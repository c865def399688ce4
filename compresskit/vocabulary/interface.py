"""What a kind of tokenizer owes, so that its vocabulary can be trimmed. One file beside this one per kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class Vocabulary(ABC):
    """The vocabulary of a tokenizer, as the entry ``model`` of its ``tokenizer.json`` describes it.

    A kind promises this: a text that the whole vocabulary reads in kept tokens alone is read in the same tokens by
    what :meth:`rebuilt` gives. Why that is so stands in each kind's file.

    Attributes:
        kind: the ``type`` in the file.
        model: the entry as plain data; it is not changed.
        strings: every token by its number.
    """

    kind: ClassVar[str]

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model
        self.strings = self._strings()
        self.numbers = {string: number for number, string in self.strings.items()}

    def _strings(self) -> dict[int, str]:
        return {number: string for string, number in self.model["vocab"].items()}

    @property
    def unknown(self) -> int | None:
        """The token for what cannot be read; None where there is none."""
        return self.numbers.get(self.model.get("unk_token") or "")

    def always(self) -> set[int]:
        """Tokens that every trimmed vocabulary needs, whatever the text."""
        fallback = [f"<0x{byte:02X}>" for byte in range(256)] if self.model.get("byte_fallback") else []
        found = {self.numbers[string] for string in fallback if string in self.numbers}
        return found | ({self.unknown} if self.unknown is not None else set())

    def parts(self, token: int) -> set[int]:
        """Further tokens without which this one is never reached."""
        return set()

    def text(self, token: int) -> str:
        """The characters that a token stands for, without marks of its place in a word."""
        return self.strings[token]

    def letters(self, character: str) -> set[int]:
        """The tokens that spell this one character, at any place in a word."""
        return self._known([character])

    @abstractmethod
    def rebuilt(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The entry ``model`` with the tokens in ``new`` alone, under the numbers given there."""

    def files(self, model: Mapping[str, Any]) -> dict[str, str]:
        """Further files in which a rebuilt entry ``model`` is commonly written, by name."""
        return {}

    def _known(self, strings: Iterable[str]) -> set[int]:
        return {self.numbers[string] for string in strings if string in self.numbers}

    def _renumbered(self, new: Mapping[int, int]) -> dict[str, int]:
        """The map from string to number that most kinds write, in the order of the numbers."""
        return {self.strings[old]: number for old, number in sorted(new.items(), key=lambda pair: pair[1])}
