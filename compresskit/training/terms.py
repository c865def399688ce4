"""The terms that a student is trained by, one function each.

A new term takes a name in :data:`compresskit.planning.stage.LossName`, a function here, and an entry in :data:`TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from compresskit.model.depth import stretches
from compresskit.planning.stage import LossName, Stage
from compresskit.tasks.predictions import Counts, Output, Predictions
from compresskit.training import losses


@dataclass(frozen=True)
class Outputs:
    """All that a term may read of one batch.

    Attributes:
        student, teacher: outputs of the models; the teacher's may be None where no term needs them.
        mask: (B, T), 1 for real tokens.
        states: which hidden states are compared: the mask, or (B, W) where those of words stand in the outputs.
        targets: the columns of the batch that ``predictions`` names as targets.
        count: valid items of the whole step.
        predictions: what the head predicts.
        stage: forms and temperatures of the terms.
        vectors: sentence vectors of student and teacher, each (B, D), where the run has some.
        projections: of the student's hidden states to the teacher's width, the embedding output first; None where
            the two are equally wide.
    """

    student: Output
    teacher: Output
    mask: Tensor
    states: Tensor
    targets: Mapping[str, Tensor]
    count: Counts
    predictions: Predictions
    stage: Stage
    vectors: tuple[Tensor, Tensor] | None = None
    projections: nn.ModuleList | None = None


@dataclass(frozen=True)
class Term:
    """One term.

    Attributes:
        value: its value for a batch, a scalar.
        reads: what the models must return for it beside their predictions.
        of_head: whether it needs a head that predicts something.
        of_teacher: whether it compares with the teacher, which then computes at every step.
        of_labels: whether it needs labels.
        of_vectors: whether it needs sentence vectors; the teacher's are computed once.
    """

    value: Callable[[Outputs], Tensor]
    reads: Literal["hidden_states", "attentions"] | None = None
    of_head: bool = False
    of_teacher: bool = True
    of_labels: bool = False
    of_vectors: bool = False


def _embedding(batch: Outputs) -> Tensor:
    (ours,), theirs = _states(batch, slice(1)), batch.teacher.hidden_states[0]
    return losses.embedding_loss(ours, theirs, batch.states, batch.count.states)


def _attention(batch: Outputs) -> Tensor:
    ours = batch.student.attentions
    theirs = _matching(batch.teacher.attentions, len(ours))
    return losses.attention_loss(ours, theirs, batch.mask, batch.count.pairs)


def _hidden(batch: Outputs) -> Tensor:
    ours = _states(batch, slice(1, None))
    theirs = _matching(batch.teacher.hidden_states[1:], len(ours))
    return losses.hidden_loss(ours, theirs, batch.states, batch.count.states)


def _logits(batch: Outputs) -> Tensor:
    return batch.predictions.logits_loss(
        batch.student,
        batch.teacher,
        batch.mask,
        batch.targets,
        batch.count,
        form=batch.stage.logits_loss,
        temperature=batch.stage.temperature,
    )


def _supervised(batch: Outputs) -> Tensor:
    return batch.predictions.supervised_loss(batch.student, batch.mask, batch.targets, batch.count)


def _pooled(batch: Outputs) -> Tensor:
    ours, theirs = _vectors(batch)
    return losses.pooled_loss(ours, theirs, batch.count.sequences, form=batch.stage.pooled_loss)


def _similarity(batch: Outputs) -> Tensor:
    ours, theirs = _vectors(batch)
    stage = batch.stage
    form, temperature = stage.similarity_loss, stage.similarity_temperature
    count = batch.count.sequence_pairs if form == "mse" else batch.count.sequences
    return losses.similarity_loss(ours, theirs, count, form=form, temperature=temperature, dims=stage.dims)


def _vectors(batch: Outputs) -> tuple[Tensor, Tensor]:
    if batch.vectors is None:
        raise ValueError("the batch has no sentence vectors")
    return batch.vectors


def _states(batch: Outputs, which: slice) -> Sequence[Tensor]:
    """Hidden states of the student as wide as the teacher's."""
    states: Sequence[Tensor] = batch.student.hidden_states[which]
    if batch.projections is None:
        return states
    return [project(state.float()) for project, state in zip(batch.projections[which], states, strict=True)]


def _matching(layers: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """The teacher's layers that ``count`` student layers learn from: the last one of each stretch."""
    return [layers[stretch[-1]] for stretch in stretches(len(layers), count)]


def compared(stage: Stage) -> list[LossName]:
    """Terms with a weight for which the teacher computes at every step."""
    return [name for name, weight in stage.losses.items() if weight > 0 and TERMS[name].of_teacher]


TERMS: dict[LossName, Term] = {
    "embedding": Term(_embedding, reads="hidden_states"),
    "attention": Term(_attention, reads="attentions"),
    "hidden": Term(_hidden, reads="hidden_states"),
    "logits": Term(_logits, of_head=True),
    "supervised": Term(_supervised, of_head=True, of_teacher=False, of_labels=True),
    "pooled": Term(_pooled, of_teacher=False, of_vectors=True),
    "similarity": Term(_similarity, of_teacher=False, of_vectors=True),
}
