"""Scores of a model: on a task, and against its teacher on held-out sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from compresskit.model.checkpoint import Checkpoint
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.model.positions import check_length
from compresskit.model.tokenizer import find_tokenizer
from compresskit.planning.stage import Stage
from compresskit.progress import Progress
from compresskit.tasks.kind import Scoring
from compresskit.tasks.predicting import BATCH_SIZE, Runnable
from compresskit.tasks.predictions import count_items
from compresskit.tasks.registry import KINDS
from compresskit.tasks.reports import Report
from compresskit.tasks.rows import TRAIN, TaskData
from compresskit.training.alignment import WordsOfBatch, student_inputs, teacher_inputs, words_of
from compresskit.training.attention import attention_kept
from compresskit.training.batches import MaskingCollator
from compresskit.training.objective import Objective

#: Split -> metric -> score.
Scores = dict[str, dict[str, float]]


def scoring_of(
    read: Checkpoint,
    tokenizer: Any,
    max_length: int | None,
    default: Callable[[Checkpoint, Any], int],
    *,
    batch_size: int,
    progress: Progress | None,
    run: Runnable | None = None,
) -> Scoring:
    """How a checkpoint is scored, or answers.

    Args:
        read: the checkpoint.
        tokenizer: to read with. Default: the checkpoint's own.
        max_length: tokens of a sequence; None: what ``default`` says of the checkpoint and its tokenizer.
        batch_size, progress, run: as of :class:`Scoring`.

    Raises:
        InputError: there is no tokenizer, or the model takes fewer tokens.
    """
    words = find_tokenizer(tokenizer, read)
    length = max_length or default(read, words)
    check_length(read.model, length)
    return Scoring(read.model, words, length, batch_size, progress, run=run, folder=read.folder)


def score(scoring: Scoring, data: TaskData) -> Scores:
    """Every metric of the task on every split but ``train``, all as fractions, in the model's dtype.

    A task with ``transfer_of`` is scored with the labels of the model's own task: the probabilities of labels that mean
    the same here are added up. In a group of processes each one predicts its share, and all get the result.

    Raises:
        InputError: the model's head or its labels do not fit the task.
    """
    kind, model = KINDS.get(data.task.kind), scoring.model
    with mode_kept(model):
        model.eval()
        return {name: kind.score(scoring, data, split) for name, split in data.splits.items() if name != TRAIN}


def scores_and_reports(scoring: Scoring, data: TaskData) -> tuple[Scores, dict[str, Report]]:
    """:func:`score`, and for each split the same in parts."""
    kind, model = KINDS.get(data.task.kind), scoring.model
    with mode_kept(model):
        model.eval()
        splits = {name: split for name, split in data.splits.items() if name != TRAIN}
        found = {name: kind.reported(scoring, data, split) for name, split in splits.items()}
    return {name: scores for name, (scores, _) in found.items()}, {name: report for name, (_, report) in found.items()}


def held_out_losses(
    model: PreTrainedModel,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    collator: Any,
    stage: Stage,
    projections: nn.ModuleList | None = None,
) -> dict[str, float]:
    """The mean of each possible loss term of ``stage``, unweighted, over held-out rows (``input_ids``, ``length``).

    Args:
        model: whose losses: the student or the teacher.
        student: by whose head the rows' labels are numbered.
        teacher: what is compared with.
        projections: of the model's hidden states to the teacher's width, where they are not equally wide.
    """
    with attention_kept(student, teacher), mode_kept(student, teacher):
        return _held_out_losses(model, student, teacher, dataset, collator, stage, projections)


def _held_out_losses(
    model: PreTrainedModel,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    collator: Any,
    stage: Stage,
    projections: nn.ModuleList | None,
) -> dict[str, float]:
    masked = isinstance(collator, MaskingCollator)
    objective = Objective(student, teacher, stage, dataset.column_names, masked=masked, projections=projections)
    predictions = objective.predictions
    device = next(model.parameters()).device
    if projections is not None:
        projections.to(device)
    rows = dataset.remove_columns("length")
    batches = [
        collator([*rows.select(range(i, min(i + BATCH_SIZE, len(rows))))]) for i in range(0, len(rows), BATCH_SIZE)
    ]
    counts = torch.stack([count_items(batch, predictions, words_of(batch)) for batch in batches]).sum(0).to(device)
    sums: dict[str, float] = dict.fromkeys(objective.weights, 0.0)
    model.eval()
    teacher.eval()
    with torch.no_grad():
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()}
            targets = {name: moved.pop(name) for name in predictions.targets if name in moved}
            read = (model, student_inputs(moved)), (teacher, teacher_inputs(moved) or moved)
            outputs, taught = (each(**fitted(each, inputs), **objective.wanted) for each, inputs in read)
            outputs, words = objective.as_student(outputs) if model is teacher else outputs, WordsOfBatch.of(moved)
            terms = objective.terms(outputs, taught, moved["attention_mask"], targets, counts, words=words)
            for name, term in terms.items():
                sums[name] += float(term)
    return sums
