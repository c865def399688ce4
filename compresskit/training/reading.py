"""The models of a run, read in the classes in which they are trained and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model import checkpoint as checkpoints
from compresskit.model.adapters import check_given
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import check_length
from compresskit.model.quantizer import is_compressed, quantizer_of
from compresskit.model.sentence_vectors import has_sentence_model, read_sentence_model, unsaid
from compresskit.model.targets import check_supported
from compresskit.model.tokenizer import find_tokenizer, is_fast, load_tokenizer, one_vocabulary, reads_alike
from compresskit.planning.stage import Stage
from compresskit.tasks.declaration import Task
from compresskit.tasks.registry import KINDS
from compresskit.training.data import Models
from compresskit.training.objective import check_fit, unnamed_note
from compresskit.training.projections import check_processes
from compresskit.training.sentences import Encoder
from compresskit.training.terms import compared

#: A model, a folder or a hub id; None: the embedded checkpoint.
ModelLike = PreTrainedModel | str | Path | None


def teacher_and_student(
    teacher: ModelLike, student: ModelLike, tokenizer: Any, *, allow_dense: bool, new_head: bool
) -> Models:
    """Both read, the student in the teacher's class and with its labels. Raises InputError: they do not fit."""
    _check_two(teacher, student)
    taught_by = read_model(teacher, compressed=None)
    compressed, changes = None if allow_dense else True, labels_of(taught_by.model)
    read = read_model(student, compressed=compressed, adopt=taught_by.model, new_head=new_head, **changes)
    own = _own_tokenizers(taught_by, read) if tokenizer is None else None
    check_fit(read.model, taught_by.model, by_words=own is not None, projected=own is None)
    if (note := unnamed_note(read.model, taught_by.model)) is not None:
        read = replace(read, notes=(*read.notes, note))
    if own is None:
        return Models(read, taught_by, find_tokenizer(tokenizer, taught_by, read))
    theirs, ours = (find_tokenizer(each, owner) for each, owner in zip(own, (taught_by, read), strict=True))
    return Models(read, taught_by, ours, theirs)


def _own_tokenizers(*checkpoints: Checkpoint) -> tuple[Any, ...] | None:
    """The tokenizers of two checkpoints that have different vocabularies; None where they have one, or one has none.

    Raises:
        InputError: one of the two cannot say which words its tokens belong to.
    """
    found = tuple(load_tokenizer(checkpoint) for checkpoint in checkpoints)
    if None in found or one_vocabulary(*found):
        return None
    for owner, tokenizer in zip(checkpoints, found, strict=True):
        if not is_fast(tokenizer):
            names = " and ".join(each.origin for each in checkpoints)
            raise InputError(
                f"{names} have different vocabularies, and {type(tokenizer).__name__} of {owner.origin} is no fast "
                "tokenizer (tokenizer.json): it does not say of which characters a token is, so words cannot be found"
            )
    return found


def encoders(
    teacher: ModelLike, student: ModelLike, tokenizer: Any, max_length: int | None, *, allow_dense: bool
) -> tuple[Encoder, Encoder]:
    """Student and teacher as encoders of sentences, each with its own tokenizer, unless one is given for both.

    Raises:
        InputError: they are one model; their vectors cannot be made.
    """
    _check_two(teacher, student)
    taught_by = read_model(teacher, compressed=None, as_class="base")
    read = read_model(student, compressed=None if allow_dense else True, as_class="base")
    words = find_tokenizer(tokenizer, taught_by)
    own = find_tokenizer(tokenizer or load_tokenizer(read) or words, read)
    theirs = read_sentence_model(taught_by.folder)
    ours = read_sentence_model(read.folder) if has_sentence_model(read.folder) else theirs
    if (note := unsaid(taught_by.folder)) is not None:
        read = replace(read, notes=(*read.notes, note))
    return Encoder.of(read, own, ours, max_length), Encoder.of(taught_by, words, theirs, max_length)


def with_layers(stage: Stage, student: Encoder, teacher: Encoder, explicit: Sequence[str]) -> tuple[Stage, str | None]:
    """The stage of two encoders, without losses of layers where theirs cannot be compared, and a note that says so.

    Args:
        explicit: names of losses that the user gave.

    Raises:
        InputError: a loss of layers was given where they cannot be compared.
    """
    inside = compared(stage)
    if not inside:
        return stage, None
    try:
        _check_layers(student, teacher)
    except InputError as error:
        if given := [name for name in inside if name in explicit]:
            raise InputError(f"loss {', '.join(given)}: compares layers, but {error}: leave it out") from None
        losses = {name: weight for name, weight in stage.losses.items() if name not in inside}
        left, verb = " and ".join(f"loss {name}" for name in inside), "is" if len(inside) == 1 else "are"
        return stage.model_copy(update={"losses": losses}), f"{left} {verb} left out: {error}"
    return stage, None


def _check_layers(student: Encoder, teacher: Encoder) -> None:
    """Refuse encoders whose hidden states do not fit, or that cannot be compared word by word. Raises InputError."""
    first, second = student.checkpoint, teacher.checkpoint
    by_words = not one_vocabulary(student.tokenizer, teacher.tokenizer)
    check_fit(first.model, second.model, by_words=by_words, projected=not by_words)
    if not by_words and not reads_alike(student.tokenizer, teacher.tokenizer):
        raise InputError(f"the tokenizers of {second.origin} and {first.origin} read texts differently")
    if by_words:
        names = f"{second.origin} and {first.origin} have different vocabularies"
        if not all(is_fast(one.tokenizer) for one in (student, teacher)):
            raise InputError(f"{names}, and their tokenizers do not both say where words are (tokenizer.json)")
        if student.reading != teacher.reading or student.how.lower:
            raise InputError(f"{names}, and length, prompt or case of their texts differ")
    check_length(second.model, student.max_length)
    check_processes(first.model, second.model)


def with_new_head(
    model: ModelLike, task: Task, labels: Sequence[str], as_class: str | None = None, *, forget: bool = False
) -> Checkpoint:
    """The model in the class that the task needs, with a new head where it has none, or with ``forget`` in any case.

    Raises:
        InputError: another class was asked for; the checkpoint cannot be read in it.
    """
    kind = KINDS.get(task.kind)
    if as_class not in (None, kind.head):
        raise InputError(f"--as {as_class}: task {task.name} needs {kind.head}, which is the default")
    return read_model(model, compressed=None, as_class=kind.head, new_head=forget, **kind.head_config(labels))


def labels_of(teacher: PreTrainedModel) -> dict[str, Any]:
    """The teacher's labels, for the student's configuration."""
    names = ("num_labels", "id2label", "label2id", "problem_type")
    return {name: getattr(teacher.config, name) for name in names}


def read_model(
    model: ModelLike,
    *,
    compressed: bool | None,
    adopt: PreTrainedModel | None = None,
    new_head: bool = False,
    **options: Any,
) -> Checkpoint:
    if model is None or isinstance(model, str | Path):
        return checkpoints.read(model, compressed=compressed, adopt=adopt, new_head=new_head, **options)
    check_given(model)
    if new_head:
        raise InputError("new_head: is for a model in a folder; one that is given as an object keeps its head")
    if compressed is True:
        quantizer_of(model)
    elif not is_compressed(model):
        check_supported(model)
    if adopt is not None and type(model) is not type(adopt):
        raise InputError(
            f"the student is a {type(model).__name__} but the teacher a {type(adopt).__name__}: give equal classes"
        )
    return checkpoints.in_memory(model)


def _check_two(teacher: ModelLike, student: ModelLike) -> None:
    named = isinstance(student, str | Path) and isinstance(teacher, str | Path)
    if student is teacher or (named and Path(str(student)) == Path(str(teacher))):
        raise InputError("teacher and student are the same model")
