"""What a run minimises: which loss terms are possible for two models, and their values for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.planning.stage import LossName, Stage
from compresskit.training import losses
from compresskit.training.attention import expose_attention

#: Keys of a batch that are targets, not input.
TARGETS = ("labels", "start_positions", "end_positions")
#: What a model returns; its fields differ from class to class.
Output = Any


@dataclass(frozen=True)
class Counts:
    """Valid items of a whole optimizer step, over all devices and micro-batches; scalars."""

    tokens: Tensor
    pairs: Tensor
    sequences: Tensor
    labels: Tensor


def count_items(batch: Mapping[str, Tensor]) -> Tensor:
    """Valid tokens, (query, key) pairs, sequences and labels of a batch, as one tensor that can be added up."""
    lengths = batch["attention_mask"].sum(-1).float()
    if "start_positions" in batch:
        labels = torch.tensor(2.0 * len(lengths))
    elif "labels" not in batch:
        labels = torch.tensor(0.0)
    elif batch["labels"].is_floating_point():
        labels = torch.tensor(float(batch["labels"].numel()))
    else:
        labels = (batch["labels"] != losses.IGNORED).sum().float()
    values = (lengths.sum(), lengths.square().sum(), torch.tensor(float(len(lengths))), labels)
    return torch.stack([value.to(lengths.device) for value in values])


class Objective:
    """The weighted loss terms of a stage for one pair of models.

    Attributes:
        weights: of the terms that are possible and have a weight.
        dropped: term -> the reason why it is left out.
        attention_maps: ``scores`` or ``probabilities`` where attention has a weight, else None.

    Raises:
        InputError: no term is left; an explicitly asked one is impossible.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        stage: Stage,
        columns: Sequence[str],
        *,
        masked: bool = False,
        explicit: Sequence[str] = (),
    ) -> None:
        self.stage = stage
        self.weights: dict[LossName, float] = {}
        self.dropped: dict[LossName, str] = {}
        labelled = masked or any(target in columns for target in TARGETS)
        for name, weight in stage.losses.items():
            reason = _impossible(name, student, teacher, labelled)
            if weight > 0 and reason is None:
                self.weights[name] = weight
            elif weight > 0 and reason is not None:
                if name in explicit:
                    raise InputError(f"loss {name}: {reason}, but its weight was given")
                self.dropped[name] = f"loss {name} is left out: {reason}"
        if not self.weights:
            raise InputError("no loss term is left to train on: " + ("; ".join(self.dropped.values()) or "all weigh 0"))
        self.attention_maps = None
        if "attention" in self.weights:
            self.attention_maps = expose_attention(student)
            if teacher is not None:
                expose_attention(teacher)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(name != "supervised" for name in self.weights)

    @property
    def wanted(self) -> dict[str, bool]:
        """What the models must return beside their predictions; maps and states only where a term reads them."""
        return {
            "output_hidden_states": "hidden" in self.weights or "embedding" in self.weights,
            "output_attentions": "attention" in self.weights,
        }

    def terms(
        self, student: Output, teacher: Output, mask: Tensor, targets: Mapping[str, Tensor], counts: Tensor
    ) -> dict[LossName, Tensor]:
        """Every term, unweighted.

        Args:
            student, teacher: outputs of the models; teacher may be None where no term needs it.
            mask: (B, T), 1 for real tokens.
            targets: the entries of the batch named in :data:`TARGETS`.
            counts: :func:`count_items` of the whole step.
        """
        count = Counts(*counts.clamp(min=1))  # a small batch may have no masked token: its term is 0, not 0 / 0
        terms: dict[LossName, Tensor] = {}
        for name in self.weights:
            if name == "embedding":
                ours, theirs = student.hidden_states[0], teacher.hidden_states[0]
                terms[name] = losses.embedding_loss(ours, theirs, mask, count.tokens)
            elif name == "attention":
                theirs = _matching(teacher.attentions, len(student.attentions))
                terms[name] = losses.attention_loss(student.attentions, theirs, mask, count.pairs)
            elif name == "hidden":
                ours = student.hidden_states[1:]
                theirs = _matching(teacher.hidden_states[1:], len(ours))
                terms[name] = losses.hidden_loss(ours, theirs, mask, count.tokens)
            elif name == "logits":
                terms[name] = self._logits(student, teacher, mask, targets, count)
            else:
                terms[name] = _supervised(student, mask, targets, count)
        return terms

    def total(self, terms: Mapping[LossName, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _logits(
        self, student: Output, teacher: Output, mask: Tensor, targets: Mapping[str, Tensor], count: Counts
    ) -> Tensor:
        form, temperature = self.stage.logits_loss, self.stage.temperature
        if "start_logits" in student:
            terms = []
            for name in ("start_logits", "end_logits"):
                closed = torch.where(mask.bool(), teacher[name].float(), -torch.inf)
                number = 2 * count.sequences
                terms.append(losses.logits_loss(student[name], closed, number, form=form, temperature=temperature))
            return torch.stack(terms).sum()
        # A tensor of inference mode cannot be saved for the backward; a copy can.
        ours, theirs = _predictions(student), _predictions(teacher).clone()
        valid, number = None, count.sequences
        if ours.dim() == 3:  # one prediction per token: where there is something to predict
            valid, number = mask.bool(), count.tokens
            if "labels" in targets:
                valid, number = targets["labels"] != losses.IGNORED, count.labels
        return losses.logits_loss(ours, theirs, number, form=form, temperature=temperature, valid=valid)


def _impossible(
    name: LossName, student: PreTrainedModel, teacher: PreTrainedModel | None, labelled: bool
) -> str | None:
    """Why a term cannot be computed; None if it can."""
    if name != "supervised" and teacher is None:
        return "there is no teacher"
    kind = type(student).__name__
    if name in ("logits", "supervised") and student.base_model is student:
        return f"{kind} has no head that predicts anything"
    if name in ("logits", "supervised") and kind.endswith("ForPreTraining"):
        return f"what {kind} predicts is not supported (masked-LM and task heads are)"
    if name == "supervised" and not labelled:
        return "the data has no column labels"
    return None


def _matching(layers: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """The teacher's layers that ``count`` student layers learn from: all, or every second, third, ... and the last."""
    every = len(layers) // count
    return layers[every - 1 :: every]


def _supervised(student: Output, mask: Tensor, targets: Mapping[str, Tensor], count: Counts) -> Tensor:
    if "start_logits" in student:
        terms = []
        for side in ("start", "end"):
            logits = student[f"{side}_logits"].float().masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
            terms.append(losses.supervised_loss(logits, targets[f"{side}_positions"], count.labels))
        return torch.stack(terms).sum()
    return losses.supervised_loss(_predictions(student), targets["labels"], count.labels)


def _predictions(output: Output) -> Tensor:
    logits: Tensor = output["logits"]
    return logits


def check_fit(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a pair of models whose outputs cannot be compared. Raises InputError naming what differs.

    A student may have a half, a third, ... of the teacher's layers.
    """
    for name, what in (
        ("model_type", "families"),
        ("vocab_size", "vocabularies"),
        ("hidden_size", "hidden sizes"),
        ("num_attention_heads", "numbers of attention heads"),
        ("num_labels", "numbers of labels"),
    ):
        theirs, ours = getattr(teacher.config, name, None), getattr(student.config, name, None)
        if theirs != ours:
            raise InputError(f"teacher and student have different {what} ({name}): {theirs} and {ours}")
    theirs, ours = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    if theirs % ours:
        raise InputError(
            f"teacher and student have different numbers of layers (num_hidden_layers): {theirs} and {ours}; "
            "the student's must divide the teacher's"
        )
