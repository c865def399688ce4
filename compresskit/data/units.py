"""Texts cut into what gets a vector each: sentences, passages, lines; without duplicates, in a mixed order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from compresskit.data.corpus import Corpus, find_corpus
from compresskit.errors import InputError

Unit = Literal["sentence", "passage", "line"]
UNITS: tuple[Unit, ...] = get_args(Unit)
#: Of sentences, where nobody says.
LANGUAGE = "en"
_CODE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
#: Sentences of a passage: the least and the most.
_PASSAGE = (2, 6)
#: Units that are made of sentences.
_OF_SENTENCES = frozenset(("sentence", "passage"))
#: Documents between two reports of progress.
_REPORT = 500
#: What may be given as text: one source, several of them, or the embedded text.
Texts = str | Path | Corpus | Sequence[str | Path | Corpus] | None


@dataclass(frozen=True)
class Units:
    """Texts, each of which gets one vector.

    Attributes:
        texts: every one once, in an order that the seed decides.
        record: where they come from, as plain data.
        duplicates: how many were left out because they were there already.
    """

    texts: list[str]
    record: dict[str, Any]
    duplicates: int


def check_units(
    units: Sequence[str], *, fields: Sequence[str] = (), language: str = LANGUAGE, limit: int | None = None
) -> None:
    """Refuse what does not go together, before any text is read. The arguments are those of :func:`read_units` and
    :func:`find_corpora`.

    Raises:
        InputError: an unknown unit; without a unit what belongs to one; a language that is no code or that no unit
            reads; a limit below two.
    """
    for unit in units:
        if unit not in UNITS:
            raise InputError(f"unit {unit!r}: is unknown; known: {', '.join(UNITS)}")
    if not units:
        if fields or limit is not None or language != LANGUAGE:
            raise InputError(f"fields, max_texts and language belong to unit; give one or more of {', '.join(UNITS)}")
        return
    if not _CODE.fullmatch(language):  # sentencex would take it for English
        raise InputError(f"language {language!r}: give a code of ISO 639, such as en or de")
    if language != LANGUAGE and not _OF_SENTENCES & set(units):
        raise InputError(f"language {language}: is that of sentences; unit {', '.join(units)} has none: leave it out")
    if limit is not None and (not isinstance(limit, int) or limit < 2):
        raise InputError(f"max texts {limit}: give an integer of at least 2")


def find_corpora(text: Texts, fields: Sequence[str], units: Sequence[str]) -> tuple[Corpus, ...]:
    """The texts to read; one without units.

    Args:
        text: of each :func:`compresskit.data.corpus.find_corpus` says what it may be.
        fields: columns of those that are tables.
        units: into which they will be cut.

    Raises:
        InputError: several texts without units; fields of no table; a text that is not there.
    """
    several = isinstance(text, list | tuple)
    if not units and several:
        raise InputError(f"several texts are read in units alone; give unit ({', '.join(UNITS)})")
    given: Sequence[Any] = text if isinstance(text, list | tuple) else (text,)
    found = tuple(find_corpus(one, fields) for one in given)
    if fields and not any(corpus.fields for corpus in found):
        names = ", ".join(corpus.name for corpus in found)
        raise InputError(f"fields are columns of tables; text {names} is none: leave fields out")
    return found


def read_units(
    corpora: Sequence[Corpus],
    units: Sequence[Unit],
    *,
    language: str = LANGUAGE,
    limit: int | None = None,
    seed: int = 0,
    progress: Any = None,
) -> Units:
    """All texts of ``corpora``, cut into ``units``, without duplicates, mixed.

    Args:
        units: ``sentence``: what sentencex takes for one. ``passage``: two to six sentences of a document that follow
            each other, as many as the seed says. ``line``: every line of a text or field that is not empty.
            The texts of several units are put together.
        language: of the sentences, ISO 639-1.
        limit: at most so many texts, chosen at random.
        seed: of the order, of the choice and of the passages.
        progress: called with (what, done, total); the total is 0, as it is not known.

    Raises:
        InputError: no unit, or as :func:`check_units`; fewer than two texts.
    """
    if not units:
        raise InputError(f"unit: give one or more of {', '.join(UNITS)}")
    check_units(units, language=language, limit=limit)
    generator = np.random.default_rng(seed)
    seen: set[bytes] = set()
    texts: list[str] = []
    duplicates = 0
    for corpus in corpora:
        for number, document in enumerate(corpus.documents(), start=1):
            for text in _cut(document, units, language, generator):
                key = hashlib.blake2b(text.encode(), digest_size=12).digest()
                if key in seen:
                    duplicates += 1
                    continue
                seen.add(key)
                texts.append(text)
            if progress is not None and number % _REPORT == 0:
                progress(f"cutting {corpus.name}", number, 0)
    names = ", ".join(corpus.name for corpus in corpora)
    if len(texts) < 2:
        raise InputError(f"text {names}: holds {len(texts)} texts of unit {', '.join(units)}; two are the least")
    chosen = generator.permutation(len(texts))[:limit]
    record = {
        "source": names,
        "texts": [corpus.record() for corpus in corpora],
        "unit": list(units),
        "language": language,
        "duplicates": duplicates,
        "limit": limit,
    }
    return Units([texts[place] for place in chosen], record, duplicates)


def _cut(document: str, units: Sequence[Unit], language: str, generator: np.random.Generator) -> Iterator[str]:
    sentences = _sentences(document, language) if _OF_SENTENCES & set(units) else []
    if "sentence" in units:
        yield from sentences
    if "passage" in units:
        start = 0
        while start + 1 < len(sentences):
            size = int(generator.integers(_PASSAGE[0], _PASSAGE[1] + 1))
            yield " ".join(sentences[start : start + size])
            start += size
    if "line" in units:
        yield from (line.strip() for line in document.splitlines() if line.strip())


def _sentences(document: str, language: str) -> list[str]:
    import sentencex

    return [text for one in sentencex.segment(language, document) if (text := " ".join(one.split()))]
