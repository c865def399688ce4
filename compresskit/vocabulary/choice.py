"""Which tokens are kept: those that a text uses most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from compresskit.errors import InputError
from compresskit.vocabulary.tokenizer_file import TokenizerFile

#: The share of a text's tokens to keep where nothing else is asked for.
COVERAGE = 0.999
#: Letters that make up this share of a text can be spelled afterwards, so that a rare word is cut into smaller pieces
#: instead of being unknown.
_SPELLED = 0.9999


@dataclass(frozen=True)
class Asked:
    """How much of a vocabulary to keep. Without either number: tokens that make up 99.9 % of the text.

    Attributes:
        keep: how many tokens, special ones among them.
        coverage: which share of the text's tokens, above 0, at most 1.

    Raises:
        InputError: both of them, or a number out of its range.
    """

    keep: int | None = None
    coverage: float | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and self.coverage is not None:
            raise InputError("give a number of tokens to keep or a coverage, not both")
        if self.keep is not None and self.keep < 1:
            raise InputError(f"keep {self.keep}: must be at least 1 token")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise InputError(f"coverage {self.coverage:g}: must be a share of the text's tokens, above 0 and at most 1")

    @property
    def share(self) -> float:
        """The coverage that is asked for where no number of tokens is."""
        return COVERAGE if self.coverage is None else self.coverage

    def check(self, tokens: int) -> None:
        """Refuse to keep as many as there are, or more. Raises InputError."""
        if self.keep is not None and self.keep >= tokens:
            less = "which trims nothing: ask for fewer" if self.keep == tokens else f"there are only {tokens:,}"
            raise InputError(f"keep {self.keep:,}: of {tokens:,} tokens, {less}")


@dataclass(frozen=True)
class Choice:
    """The tokens that are kept.

    Attributes:
        kept: their numbers.
        reasons: how many are kept because they are always needed, spell letters, are frequent, or fill up what was
            asked for though the text has none of them.
        coverage: the share of the counted text's tokens that they make up.
    """

    kept: frozenset[int]
    reasons: dict[str, int]
    coverage: float


def choose(tokenizer: TokenizerFile, counts: np.ndarray, asked: Asked, always: set[int]) -> Choice:
    """The tokens to keep: letters first, then by how often they occur; with each the parts that it is made of.

    Args:
        tokenizer: whose vocabulary it is.
        counts: how often each token occurs in the text, by its number.
        asked: how many, or which share of the text's tokens.
        always: what is kept in any case.

    Raises:
        InputError: ``asked.keep`` is less than ``always`` takes.
    """
    if asked.keep is not None and len(always) > asked.keep:
        raise InputError(f"keep {asked.keep:,}: special tokens, bytes and the like take {len(always):,} alone")
    total = int(counts.sum())
    kept = set(always)
    covered = int(counts[sorted(kept)].sum())
    reasons = Counter({"always": len(kept)})
    for reason, token in _candidates(tokenizer, counts):
        if asked.keep is None and (reason == "unseen" or (reason == "frequent" and covered >= asked.share * total)):
            break
        if asked.keep is not None and len(kept) == asked.keep:
            break
        if token in kept:
            continue
        added = ({token} | tokenizer.vocabulary.parts(token)) - kept
        if asked.keep is not None and len(kept) + len(added) > asked.keep:
            continue  # a later one that is made of less may fit
        kept |= added
        covered += int(counts[sorted(added)].sum())
        reasons[reason] += len(added)
    return Choice(frozenset(kept), dict(reasons), covered / total)


def _candidates(tokenizer: TokenizerFile, counts: np.ndarray) -> Iterator[tuple[str, int]]:
    """Every token of the vocabulary with the reason to keep it, the best reasons first; letters come twice."""
    if not tokenizer.by_bytes:
        yield from (("letters", token) for token in _letters(tokenizer, counts))
    numbers = np.array(sorted(tokenizer.vocabulary.strings))
    by_count = numbers[np.argsort(-counts[numbers], kind="stable")]
    for token in by_count.tolist():
        yield ("frequent" if counts[token] else "unseen"), token


def _letters(tokenizer: TokenizerFile, counts: np.ndarray) -> Iterator[int]:
    """The tokens that spell the text's letters, the most frequent letters first."""
    vocabulary = tokenizer.vocabulary
    found: Counter[str] = Counter()
    for token in vocabulary.strings.keys() - tokenizer.special:
        if counts[token]:
            for character in vocabulary.text(token):
                found[character] += int(counts[token])
    wanted = _SPELLED * found.total()
    spelled = 0
    # Equally frequent ones by their code: the same text gives the same tokens.
    for character, count in sorted(found.items(), key=lambda pair: (-pair[1], pair[0])):
        if spelled >= wanted:
            return
        spelled += count
        yield from sorted(vocabulary.letters(character))
