"""``compresskit.predict``: what a model says of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compresskit.answering import models
from compresskit.answering.models import Answering, ModelLike
from compresskit.answering.texts import Given, Texts, fitted, given, to_look_among
from compresskit.errors import InputError, WorkError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.kept import as_it_was
from compresskit.model.sentence_vectors import SentenceModel
from compresskit.planning.stage import DEFAULTS
from compresskit.progress import Progress
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.loading import find_task
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import Split, TaskData
from compresskit.training import data as training_data
from compresskit.training.evaluation import scoring_of
from compresskit.training.settings import Options, split_settings, start_processes, with_settings


@dataclass(frozen=True)
class Predicted:
    """What a model says of some texts.

    Attributes:
        kind: the task kind whose answers these are.
        answers: one for each text, in their order, as plain data: ``row`` (the number of the text, from 1; of a file
            that of its row), ``text`` (or ``texts``, of two), what the kind tells, and ``cut`` where so many tokens (of
            ``tags``: words) of the text were not read.
        lines: the same answers for people, without the texts.
        notes: what the user should know.
    """

    kind: str
    answers: tuple[dict[str, Any], ...]
    lines: tuple[str, ...]
    notes: tuple[str, ...] = ()


def predict(
    model: ModelLike,
    texts: Texts | Given,
    *,
    task: Task | str | Path | None = None,
    fields: Sequence[str] = (),
    among: Texts | None = None,
    top: int = 5,
    tokenizer: Any = None,
    as_class: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    progress: Progress | None = None,
) -> Predicted:
    """What a model says of texts: labels, numbers, answers, tags, similarities, vectors or neighbours.

    What is predicted follows from the head. A model without one whose folder says how vectors of texts are made
    (sentence-transformers) gives the similarity of two texts, and the vectors of single ones.

    Args:
        model: a model, folder or hub id, dense or compressed, or a folder that :func:`compresskit.export` wrote. None:
            the embedded checkpoint. An object comes back as it was.
        texts: one text; or a list of texts, of pairs (tuples: two sentences, question and paragraph), of lists of words
            (for tags) or of mappings with the columns of the task; or a ``Path`` to a file: ``.txt`` with one text a
            line, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` with columns, also ``.gz``.
        task: says how the inputs are called and what labels mean where head and ``training.json`` do not, or of which
            kind the answers are: a shipped task, a YAML file or a :class:`Task`.
        fields: one or two columns of the file that hold the texts. Default: those of the task, else ``text`` (and
            ``text_pair``).
        among: texts to look among for those nearest to each of ``texts``, by their vectors: in the same forms, or a
            ``Path`` to a folder, of which every ``.txt`` and ``.jsonl`` file (also ``.gz``) at any depth is read, with
            one text a line, in the field ``text`` of JSON lines.
        top: at most so many classes with their probability, or neighbours, of each text.
        tokenizer: needed only for a model given as an object.
        as_class: the class to read a folder in, a key of :data:`~compresskit.model.checkpoint.MODEL_CLASSES`. Default:
            the checkpoint's. The head must be in the checkpoint.
        max_length: tokens of a text, at least 8. Default: what model and tokenizer take; of windows of a long paragraph
            384. What is longer is cut, and counted in the answer and in a note.
        batch_size: sequences at a time.
        device: ``auto`` (a GPU where there is one) or ``cpu``; exports run on the CPU.
        progress: called with (what, done, total).

    Raises:
        InputError: no text, a file without the columns, a row without a text, a model without a head, an export that
            cannot be run; says which, before work. Empty texts are answered, with a note.
        WorkError: the model computes what is no number.

    Example:
        ``compresskit.predict("final/", ["a lovely film"]).answers[0]["label"]``
    """
    explicit, options = split_settings({"max_length": max_length, "batch_size": batch_size, "device": device})
    with_settings(DEFAULTS["task"], explicit)  # refuses what no stage may have
    if top < 1:
        raise InputError(f"top {top}: must be at least 1")
    rows, others = given(texts), None if among is None else to_look_among(among)
    documents = None if others is None else _documents(others)
    declared = None if task is None else find_task(task)
    start_processes(options)
    asked = models.read(model, as_class)
    kind, declared = _kind(asked, declared, documents is not None)
    training_data.check_trained(asked.checkpoint)
    data = _data(asked, kind, declared, rows, fields, documents or ())
    length = partial(_length, kind, data.task)
    scoring = scoring_of(
        asked.checkpoint, tokenizer, max_length, length, batch_size=batch_size, progress=progress, run=asked.run
    )
    notes = [*asked.checkpoint.notes, *rows.notes, kind.note(asked.checkpoint.folder)]
    notes += [] if others is None else others.notes
    notes.append(kind.match(replace(data, splits={}), asked.checkpoint.model))
    split = data.splits["asked"]
    lost = kind.lost(scoring, split)
    notes += [_empty_note(split), _cut_note(kind, scoring, lost, "texts")]
    if documents is not None:
        among_these = replace(split, texts=[(document,) for document in split.documents], documents=())
        notes += [_cut_note(kind, scoring, kind.lost(scoring, among_these), "texts to look among")]
    answers = _answers(asked, kind, data, scoring, top, options)
    found = []
    for row, (texts_of_row, answer, cut) in enumerate(zip(split.texts, answers, lost, strict=True), start=1):
        whole = texts_of_row[0] if len(texts_of_row) == 1 else list(texts_of_row)
        name = "text" if len(texts_of_row) == 1 else "texts"
        told = {"row": row, name: getattr(whole, "text", whole), **answer.data}
        found.append({**told, **({"cut": cut} if cut else {})})
    _check_numbers(asked, found)
    lines = tuple(answer.line for answer in answers)
    return Predicted(kind.name, tuple(found), lines, tuple(dict.fromkeys(note for note in notes if note)))


def _documents(found: Given) -> list[str]:
    """The texts to look among. Raises InputError: not one text each."""
    kind = KINDS.get("similarity")
    columns, rows = fitted(found, kind, None, ())
    if len(columns) != 1:
        raise InputError(f"{found.places[0]}: texts to look among stand by themselves, here {len(columns)} in a row")
    return [str(kind.example(_task(kind, None, columns), row, place)[0]) for place, row in rows]


def _kind(asked: Answering, declared: Task | None, neighbours: bool) -> tuple[TaskKind, Task | None]:
    """The kind of the answers, and the task where one is known.

    Raises:
        InputError: the model does not answer the task; it has no head; neighbours are asked of another kind.
    """
    if neighbours:
        if declared is not None and not KINDS.get(declared.kind).has_documents:
            raise InputError(f"among: texts to look among belong to kind retrieval, not to {declared.kind}; leave one")
        return KINDS.get("retrieval"), declared
    if declared is None:
        declared = models.recorded_task(asked.checkpoint)
        return (models.kind_of(asked.checkpoint) if declared is None else KINDS.get(declared.kind)), declared
    kind = KINDS.get(declared.kind)
    if kind.has_documents:
        raise InputError(f"task {declared.name}: is about texts to look among; give them (among, --among)")
    training_data.check_head(kind, declared, asked.checkpoint)
    return kind, declared


def _data(
    asked: Answering,
    kind: TaskKind,
    declared: Task | None,
    rows: Given,
    fields: Sequence[str],
    documents: Sequence[str],
) -> TaskData:
    """What is asked, as the kind takes it. Raises InputError."""
    columns, named = fitted(rows, kind, declared, fields)
    task = _task(kind, declared, columns)
    if kind.head is not None:
        try:
            kind.check(task)
        except InputError as error:
            raise InputError(f"{rows.places[0]}: {error}") from None
    texts = [kind.asked(task, row, place) for place, row in named]
    split = Split(texts, [None] * len(texts), "the texts", documents=tuple(documents))
    return TaskData(task, {"asked": split}, kind.labels_of(task, asked.checkpoint.model))


def _task(kind: TaskKind, declared: Task | None, columns: tuple[str, ...]) -> Task:
    if declared is not None:
        return declared.model_copy(update={"inputs": columns})
    return Task(version=1, name=kind.name, kind=kind.name, inputs=columns, label="label", metrics=kind.metrics)


def _length(kind: TaskKind, task: Task, read: Checkpoint, tokenizer: Any) -> int:
    """Tokens of a text where the user does not say: what model and tokenizer take, of windows the kind's."""
    if kind.head is None:
        return kind.length(task, read.model, tokenizer, read.folder)
    longest = SentenceModel().limit(read.model, tokenizer)
    return min(longest, kind.window or longest)


def _empty_note(split: Split) -> str | None:
    """A note on texts without a character or a word, which are answered like others."""
    count = sum(map(len, split.texts))
    return f"{split.empty} of {count} texts are empty; they are answered as they are" if split.empty else None


def _cut_note(kind: TaskKind, scoring: Scoring, lost: Sequence[int], what: str) -> str | None:
    cut = [count for count in lost if count]
    if not cut:
        return None
    longer = f"{len(cut)} of {len(lost)} {what} are too long for the {scoring.max_length} tokens that are read"
    return f"{longer}; {sum(cut)} {kind.lost_unit} were cut off"


def _answers(asked: Answering, kind: TaskKind, data: TaskData, scoring: Scoring, top: int, options: Options) -> Any:
    read: Any = asked.checkpoint
    if asked.run is not None:
        return kind.described(scoring, data, data.splits["asked"], top)
    with as_it_was(read.model):
        read.model.to(options.torch_device, kind.dtype(read.model, read.folder)).eval()
        return kind.described(scoring, data, data.splits["asked"], top)


def _check_numbers(asked: Answering, found: Sequence[dict[str, Any]]) -> None:
    """Refuse answers with what is no number, which JSON cannot hold. Raises WorkError."""
    for number, answer in enumerate(found, start=1):
        try:
            json.dumps(answer, allow_nan=False)
        except ValueError:
            name = asked.checkpoint.origin
            raise WorkError(f"model {name}: computes NaN or infinity for text {number} (too large weights?)") from None
