"""What a head predicts, and how a student learns to predict it.

Most heads give one tensor of logits: for each sequence or token a class or a number. :data:`PLAIN` stands for these.
A task kind whose head gives something else brings a subclass of :class:`Predictions`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.tasks import losses

#: What a model returns: its fields by name. They differ from class to class.
Output = Any
#: What the distance to a teacher's logits is; ``margin`` is for pairs of texts (kind ``ranking``).
Form = Literal["kl", "mse", "margin"]


@dataclass(frozen=True)
class Counts:
    """Valid items of a whole optimizer step, over all devices and micro-batches; scalars.

    Attributes:
        tokens: real ones.
        pairs: of (query, key), the sum of squared lengths.
        sequences: rows.
        labels: those that are to be predicted.
        sequence_pairs: ordered pairs of different rows of one micro-batch.
        states: hidden states of a layer that are compared: of tokens, or of words where student and teacher cut texts
            into different tokens.
    """

    tokens: Tensor
    pairs: Tensor
    sequences: Tensor
    labels: Tensor
    sequence_pairs: Tensor
    states: Tensor


class Predictions:
    """Logits of one kind of head.

    Attributes:
        targets: the columns of a batch that hold what is to be predicted.
        outputs: the names of the logits among a model's outputs.
        forms: which forms :meth:`logits_loss` has.
        class_weights: what a label of each class counts in :meth:`supervised_loss`; None: all the same.
    """

    targets: ClassVar[tuple[str, ...]] = ("labels",)
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    forms: ClassVar[tuple[Form, ...]] = ("kl", "mse")
    class_weights: Tensor | None = None

    def weighing(self, class_weights: Tensor) -> Self:
        """The same with class weights."""
        found = copy.copy(self)
        found.class_weights = class_weights
        return found

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model's head gives these predictions."""
        return True

    def over_tokens(self, logits: Tensor) -> bool:
        """Whether a batch of one of the outputs has a prediction for every token, (B, T, ...)."""
        return logits.dim() == 3

    def count(self, batch: Mapping[str, Tensor]) -> int | Tensor:
        """Labels of a batch that are to be predicted."""
        labels = batch.get("labels")
        if labels is None:
            return 0
        return labels.numel() if labels.is_floating_point() else (labels != losses.IGNORED).sum()

    def supervised_loss(self, student: Output, mask: Tensor, targets: Mapping[str, Tensor], count: Counts) -> Tensor:
        """Distance to the labels.

        Args:
            student: its outputs.
            mask: (B, T), 1 for real tokens.
            targets: the columns of the batch named in :attr:`targets`.
            count: of the whole step.
        """
        return losses.supervised_loss(student["logits"], targets["labels"], count.labels, self.class_weights)

    def logits_loss(
        self,
        student: Output,
        teacher: Output,
        mask: Tensor,
        targets: Mapping[str, Tensor],
        count: Counts,
        *,
        form: Form,
        temperature: float,
    ) -> Tensor:
        """Distance to the teacher's predictions; arguments as of :meth:`supervised_loss` and
        :func:`compresskit.tasks.losses.logits_loss`.
        """
        # A tensor of inference mode cannot be saved for the backward; a copy can.
        ours, theirs = student["logits"], teacher["logits"].clone()
        valid, number = None, count.sequences
        if self.over_tokens(ours):  # where there is something to predict
            valid, number = mask.bool(), count.tokens
            if "labels" in targets:
                valid, number = targets["labels"] != losses.IGNORED, count.labels
        return losses.logits_loss(ours, theirs, number, form=form, temperature=temperature, valid=valid)

    def distributions(self, outputs: Output, mask: Tensor) -> list[Tensor]:
        """Logits with one distribution in each last dimension; a last dimension of one is a number."""
        return [outputs["logits"]]


PLAIN = Predictions()


def count_items(batch: Mapping[str, Tensor], predictions: Predictions = PLAIN, words: Tensor | None = None) -> Tensor:
    """The values of :class:`Counts` for a batch, as one tensor that can be added up.

    Args:
        batch: with ``attention_mask`` and the targets.
        predictions: what the head predicts.
        words: (B,), how many words each row has, where words are compared instead of tokens.
    """
    lengths = batch["attention_mask"].sum(-1).float()
    labels = predictions.count(batch)
    rows, states = len(lengths), lengths.sum() if words is None else words.sum()
    values = (lengths.sum(), lengths.square().sum(), rows, labels, rows * (rows - 1), states)
    return torch.stack([torch.as_tensor(value, dtype=torch.float32, device=lengths.device) for value in values])
