"""Which rows of what a layer sees belong to real tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RealTokens:
    """The tokens of one batch that the attention mask does not hide.

    Args:
        batch: ``attention_mask`` and ``input_ids``, (B, T) or (B, choices, T).
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        mask = batch["attention_mask"]
        self._mask = mask.reshape(-1, mask.shape[-1]).bool()  # choices are sequences of their own inside a model
        self._ids = batch["input_ids"].reshape(self._mask.shape)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._mask.sum())

    def see_words(self, ids: Tensor) -> None:
        """Told what the word embedding looks up: some families compute with (T, B, ...) (XLNet)."""
        if ids.shape == self._ids.T.shape and not torch.equal(ids, self._ids) and torch.equal(ids, self._ids.T):
            self._mask, self._ids = self._mask.T, self._ids.T

    def ids(self, ids: Tensor) -> Tensor | None:
        """Numbers that an embedding looks up, (B, T), or (1, T) or (T,) where they are the same for every sequence; of
        the real tokens, (N,). None where they are of something else: of pairs of tokens (relative positions).
        """
        if ids.shape in ((1, self._mask.shape[-1]), (self._mask.shape[-1],)):
            ids = ids.expand(self._mask.shape)
        real = self._real(ids.shape)
        return None if real is None else ids[real]

    def rows(self, values: Tensor) -> Tensor:
        """Inputs or outputs of a linear, (B, T, H) or (T, B, H); of the real tokens, (N, H). Of any other shape all,
        (..., H).
        """
        real = self._real(values.shape[:-1])
        return values.reshape(-1, values.shape[-1]) if real is None else values[real]

    def _real(self, lead: torch.Size) -> Tensor | None:
        """The mask in the shape of a layer's sequences and tokens; None where it does not fit."""
        for mask, turned in ((self._mask, False), (self._mask.T, True)):  # some layers compute with (T, B, ...)
            if len(lead) == 2 and lead[turned] == mask.shape[turned] and lead[1 - turned] >= mask.shape[1 - turned]:
                more = lead[1 - turned] - mask.shape[1 - turned]  # padded to whole windows (Longformer)
                return torch.nn.functional.pad(mask, (0, 0, 0, more) if turned else (0, more))
        return None
