"""``compresskit.evaluate``: how well a model, or an exported one, does a task."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from compresskit.answering import models
from compresskit.answering.models import ModelLike
from compresskit.errors import InputError
from compresskit.folders.evaluation import write_report
from compresskit.model import output as outputs
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.kept import as_it_was
from compresskit.planning.stage import DEFAULTS
from compresskit.progress import Progress
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import find_task, load_data
from compresskit.tasks.registry import KINDS
from compresskit.training import data as training_data
from compresskit.training.evaluation import score, scores_and_reports, scoring_of
from compresskit.training.run import Result
from compresskit.training.settings import split_settings, start_processes, with_settings


def evaluate(
    model: ModelLike = None,
    *,
    task: Task | str | Path,
    data: str | Path | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    as_class: str | None = None,
    documents_model: str | Path | None = None,
    report: bool | str | Path = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Score a model, dense, compressed or exported, on a task: every metric on every split but ``train``.

    Args:
        model: a model, folder or hub id with a head for the task (or for one whose transfer the task is). A task of
            kind ``similarity`` or ``retrieval`` needs no head: vectors of texts are made as sentence-transformers makes
            them for the folder, in its dtype; of an object, and where it does not say, the mean over the tokens of the
            last layer. An object comes back as it was. A folder that :func:`compresskit.export` wrote is run by its
            format's runtime, on the CPU.
        task, data, tokenizer, progress: as for :func:`finetune`.
        max_length: tokens, at least 8; default: the task's own, of kinds ``similarity`` and ``retrieval`` the folder's.
        batch_size: sequences at a time.
        device: ``auto`` or ``cpu``.
        as_class: the class to read a folder in, a key of :data:`~compresskit.model.checkpoint.MODEL_CLASSES`. Default:
            the checkpoint's. The head must be in the checkpoint.
        documents_model: folder or hub id of another model, or an export, for the documents of a ``retrieval``, such as
            the teacher of a student that embeds the queries. Their vectors are compared as ``model`` says.
        report: also the scores in parts: precision, recall, F1 and support of every class, label or type of entity
            (as scikit-learn and seqeval report them), correlations by fifths of the numbers, and so on. A folder to
            write it to (report.json, pictures of the confusion of classes, README.md), or True for the record alone.
        overwrite: replace a folder of a report that compresskit wrote.

    Returns:
        ``record["scores"]`` is ``{split: {metric: score}}``, as fractions; with ``report``, ``record["report"]`` is
        ``{split: {"tables": {title: {row: {column: number}}}, "confusion": ...}}``.

    Raises:
        InputError: says what is wrong with model or data; an export that cannot be run here.
    """
    explicit, options = split_settings({"max_length": max_length, "batch_size": batch_size, "device": device})
    with_settings(DEFAULTS["task"], explicit)  # refuses what no stage may have
    folder = None if isinstance(report, bool) else Path(report)
    if folder is not None:
        outputs.check_output(folder, overwrite)
    declared = find_task(task)
    kind = KINDS.get(declared.kind)
    if documents_model is not None and not kind.has_documents:
        of = f"task {declared.name} (kind {declared.kind})"
        raise InputError(f"documents model {documents_model}: {of} has no documents; leave it out")
    start_processes(options)
    examples = load_data(declared, None if data is None else Path(data), train=False)
    asked = models.read(model, as_class)
    read = asked.checkpoint
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    length = partial(_length, declared)
    scoring = scoring_of(read, tokenizer, max_length, length, run=asked.run, **how)
    training_data.check_head(kind, declared, read)
    training_data.check_trained(read)
    note = kind.match(examples, read.model)
    notes = [*read.notes, *examples.notes, note, kind.note(read.folder)]
    scored = [asked]
    record: dict[str, Any] = {"model": read.origin, "task": declared.name, "data": examples.record()}
    if documents_model is not None:
        offering = models.read(documents_model)
        other = offering.checkpoint
        documents = scoring_of(other, None, max_length, length, run=offering.run, **how)
        scoring = replace(scoring, documents=documents)
        notes += [*other.notes, kind.note(other.folder)]
        scored.append(offering)
        record["documents_model"] = other.origin
    in_torch = [one.checkpoint for one in scored if one.run is None]
    with as_it_was(*(each.model for each in in_torch)):
        for each in in_torch:
            moved: Any = each.model
            moved.to(options.torch_device, kind.dtype(moved, each.folder))
        found, reports = scores_and_reports(scoring, examples) if report else (score(scoring, examples), {})
    for one in (scoring, scoring.documents):
        notes += one.notes if one is not None else []
    said = [note for note in notes if note]
    record |= {"scores": found, "notes": said}
    if report:
        record["report"] = {split: parts.record() for split, parts in reports.items()}
    if folder is not None and PartialState().is_main_process:
        write_report(record, reports, folder, overwrite=overwrite)
    return Result(read.model, record, folder, notes=tuple(said))


def _length(task: Task, read: Checkpoint, tokenizer: Any) -> int:
    return KINDS.get(task.kind).length(task, read.model, tokenizer, read.folder)
