"""A ``tokenizer.json``: its vocabulary, what is always kept of it, and the file with fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compresskit.errors import InputError
from compresskit.vocabulary.bpe import Bpe
from compresskit.vocabulary.interface import Vocabulary
from compresskit.vocabulary.unigram import Unigram
from compresskit.vocabulary.word_level import WordLevel
from compresskit.vocabulary.word_piece import WordPiece

KINDS: dict[str, type[Vocabulary]] = {kind.kind: kind for kind in (WordPiece, Bpe, Unigram, WordLevel)}


class TokenizerFile:
    """A ``tokenizer.json`` as plain data.

    Attributes:
        data: the whole file; it is not changed.
        vocabulary: of its entry ``model``.
        strings: every token by its number, added tokens too.
        special: added tokens, and those that are put around a text.
        always: these, and what else no trimmed vocabulary can lack: the unknown token, the bytes.
        by_bytes: whether any text can be spelled by bytes.

    Raises:
        InputError: a kind of tokenizer that cannot be trimmed.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        kind = data["model"].get("type")
        if kind not in KINDS:
            raise InputError(f"tokenizer: is of kind {kind}; only {', '.join(sorted(KINDS))} can be trimmed")
        self.vocabulary = KINDS[kind](data["model"])
        added = {token["id"]: token["content"] for token in data["added_tokens"]}
        self.strings = {**self.vocabulary.strings, **added}
        self.special = {*added, *_numbers(data.get("post_processor"))} & self.strings.keys()
        symbols = _byte_symbols() if _has(data, "ByteLevel") else []
        in_bytes = set[int]().union(*map(self.vocabulary.letters, symbols)) if symbols else set()
        self.always = self.special | self.vocabulary.always() | in_bytes
        self.by_bytes = bool(in_bytes) or bool(data["model"].get("byte_fallback"))

    def order(self, kept: set[int], pinned: set[int]) -> list[int]:
        """The kept tokens in the order of their new numbers.

        Those in ``pinned`` keep their number where there is a row of it; the others close up in their old order.
        Tokens that are only added come last, as the tokenizers library numbers them.
        """
        inside = sorted(kept & self.vocabulary.strings.keys())
        stay = {number for number in inside if number in pinned and number < len(inside)}
        others = iter([number for number in inside if number not in stay])
        order = [number if number in stay else next(others) for number in range(len(inside))]
        return order + sorted(kept - self.vocabulary.strings.keys())

    def rebuilt(self, order: Sequence[int]) -> dict[str, Any]:
        """The file with these tokens alone; a token's new number is its place in ``order``."""
        new = {old: number for number, old in enumerate(order)}
        data = copy.copy(self.data)
        data["model"] = self.vocabulary.rebuilt({old: new[old] for old in order if old in self.vocabulary.strings})
        data["added_tokens"] = sorted(
            ({**token, "id": new[token["id"]]} for token in self.data["added_tokens"]), key=lambda token: token["id"]
        )
        data["post_processor"] = _with_numbers(self.data.get("post_processor"), new.__getitem__)
        if padding := self.data.get("padding"):
            data["padding"] = {**padding, "pad_id": new.get(padding["pad_id"], padding["pad_id"])}
        return data


def _with_numbers(processor: Any, change: Callable[[int], int]) -> Any:
    """A post-processor with every token's number changed."""
    if processor is None:
        return None
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_with_numbers(inner, change) for inner in made["processors"]]
    for name in ("sep", "cls"):
        if name in made:
            string, number = made[name]
            made[name] = [string, change(number)]
    if isinstance(made.get("special_tokens"), Mapping):
        made["special_tokens"] = {
            name: {**entry, "ids": [change(number) for number in entry["ids"]]}
            for name, entry in made["special_tokens"].items()
        }
    return made


def _numbers(processor: Any) -> set[int]:
    """The tokens that a post-processor names."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    _with_numbers(processor, note)
    return found


def _has(data: Mapping[str, Any], kind: str) -> bool:
    """Whether a text passes through a step of this kind before the vocabulary sees it."""
    steps = [data.get("normalizer"), data.get("pre_tokenizer")]
    while steps:
        step = steps.pop()
        if step is None:
            continue
        if step["type"] == kind:
            return True
        steps += [*step.get("pretokenizers", ()), *step.get("normalizers", ())]
    return False


def _byte_symbols() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
