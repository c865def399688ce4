"""The record of a trimming (``trim.json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compresskit.model.output import TRIM
from compresskit.validation import read_json

FORMAT_VERSION: Literal[1] = 1


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class BeforeAfter(_Entry):
    """A count before the trimming and after it."""

    before: int
    after: int

    @property
    def factor(self) -> float:
        """By how much less there is."""
        return self.before / self.after


class HeldOutEntry(_Entry):
    """See :class:`~compresskit.vocabulary.counting.HeldOut`."""

    tokens: int
    kept: float
    re_split: float
    unknown: float
    longer: float


class TrimRecord(_Entry):
    """What was trimmed, and what it does to text.

    Attributes:
        model: hub id or short name of the checkpoint.
        sha256: of its weight files.
        model_class: its class.
        tokenizer: its kind, e.g. WordPiece.
        text: which text the tokens were chosen on, with its hash.
        documents: that were read of it.
        asked: ``keep`` or ``coverage``.
        tokens: of the tokenizer.
        rows: of the word embedding; before, there may have been more rows than tokens.
        parameters: of the whole model, tied tensors once.
        reasons: how many tokens are kept for which reason: ``always`` (special tokens, bytes), ``letters``,
            ``frequent``, ``unseen`` (filled up to what was asked for).
        coverage: the share of the counted text's tokens that were kept.
        held_out: the same text's part that was not counted; None where it was too short to have one.
        versions: of the packages.
        earlier: the record of the trimming before this one, if the checkpoint had been trimmed already.
    """

    format_version: Literal[1] = FORMAT_VERSION
    model: str
    sha256: list[str]
    model_class: str
    tokenizer: str
    text: dict[str, Any]
    documents: int
    asked: dict[str, int | float]
    tokens: BeforeAfter
    rows: BeforeAfter
    parameters: BeforeAfter
    reasons: dict[str, int]
    coverage: float
    held_out: HeldOutEntry | None
    versions: dict[str, str]
    earlier: dict[str, Any] | None = None

    def summary(self) -> str:
        """The outcome as one sentence, without a full stop."""
        start = (
            f"the vocabulary was trimmed from {self.rows.before:,} to {self.rows.after:,} rows on {self.text['source']}"
        )
        if self.held_out is None:
            return f"{start}, which is too short to hold a part out: what it does to other text is not known"
        found = self.held_out
        return (
            f"{start}: of the tokens of held-out text {100 * found.kept:.2f} % are kept, "
            f"{100 * found.re_split:.2f} % are cut into others, {100 * found.unknown:.3f} % are unknown"
        )


def earlier_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder that was trimmed already. Raises InputError where it cannot be read."""
    return read_json(folder / TRIM, "cannot be read") if (folder / TRIM).is_file() else None
