"""What a run minimises: which loss terms are possible for two models, and their values for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.classes import HEADS_OF_CLASSES, class_names, class_order, several_at_once, unnamed
from compresskit.model.heads import has_head
from compresskit.planning.stage import LossName, Stage
from compresskit.tasks.predictions import PLAIN, Counts, Output, Predictions
from compresskit.tasks.registry import predictions_of
from compresskit.training.alignment import WordsOfBatch, is_by_words
from compresskit.training.attention import expose_attention, lacking
from compresskit.training.terms import TERMS, Outputs, Term

#: What follows the hidden size of a model.
_OF_WIDTH = ("hidden_size", "num_attention_heads")


class Objective:
    """The weighted loss terms of a stage for one pair of models.

    Attributes:
        predictions: what the student's head predicts: as the task's kind says, else as the head does.
        weights: of the terms that are possible and have a weight.
        dropped: term -> the reason why it is left out.
        order: for each class of the student the number of the teacher's that bears its name; None where the numbers
            are the same.
        masked: whether the batches hide words and label them.
        by_words: whether student and teacher cut texts into different tokens, as the columns say.
        projections: of the student's hidden states to the teacher's width, the embedding output first; None where
            the two are equally wide (:mod:`compresskit.training.projections`).
        attention_maps: ``scores`` or ``probabilities`` where attention has a weight, else None.

    Raises:
        InputError: no term is left; an explicitly asked one is impossible; heads that name other classes, or predict
            several labels or numbers at once.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        stage: Stage,
        columns: Sequence[str],
        *,
        masked: bool = False,
        sentences: bool = False,
        explicit: Sequence[str] = (),
        predictions: Predictions | None = None,
        projections: nn.ModuleList | None = None,
    ) -> None:
        self.stage = stage
        self.masked = masked
        self.by_words = is_by_words(columns)
        self.projections = projections
        self.predictions = predictions or predictions_of(student)
        self.weights: dict[LossName, float] = {}
        self.dropped: dict[LossName, str] = {}
        labelled = masked or any(target in columns for target in self.predictions.targets)
        for name, weight in stage.losses.items():
            if not weight:
                continue
            reason = _impossible_by_words(name, student, labelled) if self.by_words else None
            reason = reason or _impossible(TERMS[name], student, teacher, labelled, sentences)
            if reason is None:
                self.weights[name] = weight
            elif name in explicit:
                raise InputError(f"loss {name}: {reason}, but its weight was given")
            else:
                self.dropped[name] = f"loss {name} is left out: {reason}"
        if not self.weights:
            raise InputError("no loss term is left to train on: " + ("; ".join(self.dropped.values()) or "all weigh 0"))
        if "logits" in self.weights and stage.logits_loss not in self.predictions.forms:
            raise InputError(
                f"logits loss {stage.logits_loss}: is for pairs of texts, which tasks of kind ranking have"
            )
        if any(TERMS[name].of_head for name in self.weights):
            _check_answers(student, teacher)
        self.order = None if teacher is None else _teacher_classes(student, teacher)
        self.attention_maps = None
        if self.wanted["output_attentions"]:
            self.attention_maps = expose_attention(student)
            if teacher is not None:
                expose_attention(teacher)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(TERMS[name].of_teacher for name in self.weights)

    @property
    def wanted(self) -> dict[str, bool]:
        """What the models must return beside their predictions; maps and states only where a term reads them."""
        read = {TERMS[name].reads for name in self.weights}
        return {f"output_{name}": name in read for name in ("hidden_states", "attentions")}

    def terms(
        self,
        student: Output,
        teacher: Output,
        mask: Tensor,
        targets: Mapping[str, Tensor],
        counts: Tensor,
        vectors: tuple[Tensor, Tensor] | None = None,
        words: WordsOfBatch | None = None,
    ) -> dict[LossName, Tensor]:
        """Every term, unweighted.

        Args:
            student, teacher: outputs of the models; teacher may be None where no term needs it.
            mask: (B, T), 1 for real tokens.
            targets: the columns of the batch that the predictions name as targets.
            counts: :func:`compresskit.tasks.predictions.count_items` of the whole step.
            vectors: sentence vectors of student and teacher; None where no term needs them.
            words: which tokens belong to which words, where those are compared instead of tokens.
        """
        states = mask
        if words is not None and teacher is not None:
            of_tokens = "logits" in self.weights and self.predictions.over_tokens(student["logits"])
            student, teacher, states = words.aligned(student, teacher, of_tokens=of_tokens)
        teacher = None if teacher is None else self.as_student(teacher)
        count = Counts(*counts.clamp(min=1))  # a small batch may have no masked token: its term is 0, not 0 / 0
        batch = Outputs(
            student, teacher, mask, states, targets, count, self.predictions, self.stage, vectors, self.projections
        )
        return {name: TERMS[name].value(batch) for name in self.weights}

    def as_student(self, teacher: Output) -> Output:
        """Outputs of the teacher with its classes in the student's order."""
        if self.order is None or "logits" not in teacher:
            return teacher
        return type(teacher)(**{**teacher, "logits": teacher["logits"][..., self.order]})

    def total(self, terms: Mapping[LossName, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


def _impossible(
    term: Term, student: PreTrainedModel, teacher: PreTrainedModel | None, labelled: bool, sentences: bool
) -> str | None:
    """Why a term cannot be computed; None if it can."""
    kind = type(student).__name__
    if term.of_vectors and not sentences:
        return "it compares sentence vectors, which take texts cut into units (distill --unit sentence)"
    if term.of_teacher and teacher is None:
        return "there is no teacher"
    if term.of_head and student.base_model is student:
        return f"{kind} has no head that predicts anything"
    if term.of_head and kind.endswith("ForPreTraining"):
        return f"what {kind} predicts is not supported (masked-LM and task heads are)"
    if term.of_labels and not labelled:
        return f"the data has no column {' and '.join(predictions_of(student).targets)}"
    if term.reads == "attentions" and teacher is not None:
        theirs, ours = (getattr(model.config, "num_attention_heads", None) for model in (teacher, student))
        if theirs != ours:
            return f"the teacher has {theirs} attention heads, the student {ours}"
    if term.reads is not None:
        for model in (student, teacher):
            if model is not None and (lack := lacking(model, term.reads)):
                return lack
    return None


def _impossible_by_words(name: LossName, student: PreTrainedModel, labelled: bool) -> str | None:
    """Why a term cannot be computed where student and teacher cut texts into different tokens; None if it can."""
    differ = "student and teacher have different vocabularies"
    if TERMS[name].reads == "attentions":
        return f"{differ}, and maps are from token to token"
    if has_head(student, "masked-lm") and TERMS[name].of_head:
        return f"{differ}, and {type(student).__name__} predicts tokens"
    of_texts = has_head(student, "sequence-classification") or student.base_model is student
    if name == "logits" and not of_texts and not (labelled and has_head(student, "token-classification")):
        return f"{differ}, and {type(student).__name__} predicts something of every token"
    return None


def _check_answers(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Refuse heads that predict several numbers, and two heads that predict different sorts of things."""
    for model in (student, teacher):
        several = None if model is None or predictions_of(model) is not PLAIN else several_at_once(model)
        if several is not None:
            raise InputError(
                f"{type(model).__name__} predicts {several}, which is not supported; with the weights of the losses "
                "logits and supervised at 0 it learns from hidden states alone"
            )
    if teacher is not None and predictions_of(teacher) is not predictions_of(student):
        kinds = (model.config.problem_type or type(model).__name__ for model in (teacher, student))
        raise InputError("teacher and student predict different things ({} and {})".format(*kinds))


def _teacher_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int] | None:
    """See :attr:`Objective.order`. Raises InputError: the names differ."""
    if not type(student).__name__.endswith(HEADS_OF_CLASSES) or student.config.num_labels == 1:
        return None
    theirs, ours = class_names(teacher.config), class_names(student.config)
    order = class_order(ours, theirs)
    if order is None:
        raise InputError(
            f"labels differ: the teacher has {', '.join(theirs)}; the student has {', '.join(ours)} (id2label in their "
            "config.json)"
        )
    return None if order == tuple(range(len(order))) else list(order)


def unnamed_note(student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """Says how the classes of a model without names are taken, where the other one has some; None elsewhere."""
    if not type(student).__name__.endswith(HEADS_OF_CLASSES) or student.config.num_labels == 1:
        return None
    theirs, ours = class_names(teacher.config), class_names(student.config)
    if unnamed(theirs) == unnamed(ours):
        return None
    who, names = ("teacher", ours) if unnamed(theirs) else ("student", theirs)
    return f"the {who} does not name its labels; taken as {', '.join(names)}, in this order"


def check_fit(
    student: PreTrainedModel, teacher: PreTrainedModel, *, by_words: bool = False, projected: bool = False
) -> None:
    """Refuse a pair of models whose outputs cannot be compared. Raises InputError naming what differs.

    Args:
        by_words: their vocabularies may differ.
        projected: their hidden sizes may differ, and then their heads.

    A student may have fewer layers than its teacher: each learns from the last of a stretch of the teacher's
    (:func:`compresskit.model.depth.stretches`). It may have another hidden size, and then other heads, where its
    hidden states are compared through projections.
    """
    widths = {getattr(model.config, "hidden_size", None) for model in (teacher, student)}
    for name, what in (
        ("model_type", "families"),
        ("vocab_size", "vocabularies"),
        ("hidden_size", "hidden sizes"),
        ("num_attention_heads", "numbers of attention heads"),
        ("num_labels", "numbers of labels"),
    ):
        theirs, ours = getattr(teacher.config, name, None), getattr(student.config, name, None)
        free = (by_words and name == "vocab_size") or (projected and len(widths) > 1 and name in _OF_WIDTH)
        if theirs != ours and not free:
            raise InputError(f"teacher and student have different {what} ({name}): {theirs} and {ours}")
    theirs, ours = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    if ours > theirs:
        raise InputError(
            f"the student has more layers than its teacher (num_hidden_layers): {ours} and {theirs}; it may have as "
            "many or fewer"
        )
    _teacher_classes(student, teacher)
