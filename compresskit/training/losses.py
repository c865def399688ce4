"""What a student learns from inside its teacher, as functions of plain tensors.

Letters: B sequences, T tokens, H hidden units, A attention heads. Every term is a sum over this micro-batch's valid
items divided by their number over all devices and accumulated micro-batches of the step (``count``), so that sums over
devices and micro-batches give the mean over the whole batch. ``mask`` is (B, T), 1 for real tokens. What a head
predicts has its losses in :mod:`compresskit.tasks.losses`. Source: KroneckerBERT (arXiv 2109.06243), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def embedding_loss(student: Tensor, teacher: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """Mean squared error of the embedding layers' outputs (B, T, H); ``count``: valid tokens."""
    return _masked_mse(student, teacher, mask, count)


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, count: Tensor | float) -> Tensor:
    """Sum over layers of the mean squared error of their outputs, each (B, T, H); ``count``: valid tokens."""
    losses = [_masked_mse(s, t, mask, count) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).sum()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, count: Tensor | float) -> Tensor:
    """Sum over layers of the mean squared error of the attention maps (B, A, T, T), scores or probabilities.

    ``count``: valid (query, key) pairs, the sum of squared lengths.
    """
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).float()
    losses = []
    for s, t in zip(student, teacher, strict=True):
        difference = (s.float() - t.float()) * pairs
        losses.append(difference.square().sum() / (count * s.shape[1]))
    return torch.stack(losses).sum()


def _masked_mse(student: Tensor, teacher: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    difference = (student.float() - teacher.float()) * mask[..., None]
    return difference.square().sum() / (count * student.shape[-1])
