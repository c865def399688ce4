"""What a student learns from inside its teacher, as functions of plain tensors.

Letters: B sequences, T tokens, H hidden units, A attention heads. Every term is a sum over this micro-batch's valid
items divided by their number over all devices and accumulated micro-batches of the step (``count``), so that sums over
devices and micro-batches give the mean over the whole batch. ``mask`` is (B, T), 1 for real tokens; where student and
teacher cut texts into different tokens (:mod:`compresskit.training.alignment`), hidden states and their mask are those
of words. What a head predicts has its losses in :mod:`compresskit.tasks.losses`. Source: KroneckerBERT (arXiv
2109.06243), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from compresskit.errors import InputError


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


def pooled_loss(student: Tensor, teacher: Tensor, count: Tensor | float, *, form: Literal["cosine", "mse"]) -> Tensor:
    """Distance of sentence vectors (B, D), row by row; ``count``: sentences.

    ``cosine``: 1 - cos(s, t). ``mse``: ||s - t||^2 / ||t||^2, which keeps the length too (as Reimers and Gurevych,
    arXiv 2004.09813, but for the scale).
    """
    ours, theirs = student.float(), teacher.float()
    if form == "cosine":
        return (1 - functional.cosine_similarity(ours, theirs, dim=1)).sum() / count
    length = theirs.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours - theirs).square().sum(1) / length).sum() / count


def similarity_loss(
    student: Tensor,
    teacher: Tensor,
    count: Tensor | float,
    *,
    form: Literal["mse", "kl"],
    temperature: float = 0.05,
    dims: Sequence[int] = (),
) -> Tensor:
    """Distance between the cosines of all pairs of sentences of a micro-batch, student's and teacher's.

    Args:
        student, teacher: vectors (B, D) and (B, D'); D and D' may differ.
        count: of ``mse`` the ordered pairs of different sentences, the sum of B (B - 1) over the micro-batches of the
            step; of ``kl`` the sentences. Pairs across micro-batches are not compared.
        form: ``mse``: mean squared difference. ``kl``: divergence of the softmax of each row (cosines of one sentence
            to the others), as in SEED (arXiv 2101.04731).
        temperature: of ``kl``.
        dims: prefixes of the student's vector that are compared too; the loss is the mean over the whole and these
            (arXiv 2205.13147).

    Raises:
        InputError: a prefix that is longer than the vector.
    """
    if len(student) < 2:
        return student.sum() * 0  # one sentence has nothing to be similar to
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    theirs = _cosines(teacher)[others].view(len(student), -1)
    found = []
    for size in (student.shape[1], *dims):
        if size > student.shape[1]:  # a slice would be the whole vector once more
            raise InputError(f"dims {size}: the student's vectors have {student.shape[1]} numbers; give fewer")
        ours = _cosines(student[:, :size])[others].view(len(student), -1)
        if form == "mse":
            found.append((ours - theirs).square().sum() / count)
        else:
            likely = functional.log_softmax(ours / temperature, dim=1)
            wanted = functional.log_softmax(theirs / temperature, dim=1)
            found.append(functional.kl_div(likely, wanted, reduction="sum", log_target=True) / count)
    return torch.stack(found).mean()


def _cosines(vectors: Tensor) -> Tensor:
    unit = functional.normalize(vectors.float(), dim=1)
    return unit @ unit.T


def _masked_mse(student: Tensor, teacher: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    difference = (student.float() - teacher.float()) * mask[..., None]
    return difference.square().sum() / (count * student.shape[-1])
