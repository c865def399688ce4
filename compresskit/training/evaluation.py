"""Predictions and scores of a model on a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.planning.stage import Stage
from compresskit.tasks import squad
from compresskit.tasks.encoding import encode
from compresskit.tasks.labels import check_head, map_labels
from compresskit.tasks.metrics import METRICS
from compresskit.tasks.task import TRAIN, Split, TaskData
from compresskit.training.attention import attention_kept
from compresskit.training.batches import MaskingCollator
from compresskit.training.objective import TARGETS, Objective, count_items

BATCH_SIZE = 32
Progress = Callable[[str, int, int], None]


class Runnable(Protocol):
    """A transformers model, or what is called like one and gives its outputs by their names."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""

    def __call__(self, **inputs: Tensor) -> Any:
        """The outputs."""


def score(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TaskData,
    max_length: int,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    run: Runnable | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric on every split but ``train``: ``{split: {metric: score}}``, all as fractions, in the model's dtype.

    A task with ``transfer_of`` is scored with the labels of the model's own task: the probabilities of labels that mean
    the same here are added up. In a group of processes each one predicts its share, and all get the result.

    Args:
        run: computes the outputs in the place of ``model``, which then only says what they mean.

    Raises:
        InputError: the model's head or its labels do not fit the task.
    """
    was_training = model.training
    model.eval()
    try:
        return {
            name: _score_split(model, tokenizer, data, split, max_length, batch_size, progress, run or model)
            for name, split in data.splits.items()
            if name != TRAIN
        }
    finally:
        model.train(was_training)


def _score_split(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TaskData,
    split: Split,
    max_length: int,
    batch_size: int,
    progress: Progress | None,
    run: Runnable,
) -> dict[str, float]:
    task = data.task
    check_head(task, model)
    dataset = encode(task, split, tokenizer, max_length)
    outputs = predict(run, tokenizer, dataset, batch_size, progress)
    if task.kind == "spans":
        allow_none = any(not target.texts for target in split.targets)
        columns = {name: dataset[name] for name in ("example", "offsets")}
        answers = squad.best_answers(
            outputs["start_logits"], outputs["end_logits"], columns, split.texts, allow_none=allow_none
        )
        found = squad.scores(answers, split.targets)
        return {name: found[name] for name in task.metrics}
    logits = np.stack(outputs["logits"])
    if task.kind == "regression":
        targets, predictions = np.array(split.targets), logits[:, 0]
    else:
        classes = map_labels(task, data.labels, model).numbers
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        merged = np.stack([shifted[:, numbers].sum(axis=1) for numbers in classes.values()], axis=1)
        order = list(classes)
        targets, predictions = np.array([order.index(label) for label in split.targets]), merged.argmax(axis=1)
    return {name: METRICS[name](targets, predictions, len(data.labels)) for name in task.metrics}


def predict(
    model: Runnable, tokenizer: Any, dataset: Dataset, batch_size: int, progress: Progress | None = None
) -> dict[str, list[np.ndarray]]:
    """Logits of every sequence, in the data set's order; computed in batches of similar length, without padding work
    that a shorter batch would not have.
    """
    from accelerate import PartialState

    state = PartialState()
    columns = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    inputs = dataset.select_columns(columns)
    order = np.argsort(-np.asarray(dataset["length"]), kind="stable")[state.process_index :: state.num_processes]
    collate = DataCollatorWithPadding(tokenizer)
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size].tolist()
            batch = collate([inputs[row] for row in rows])
            output = model(**{key: value.to(model.device) for key, value in batch.items()})
            logits = {key: _array(value) for key, value in output.items() if key.endswith("logits")}
            found += [(row, {key: value[i] for key, value in logits.items()}) for i, row in enumerate(rows)]
            if progress is not None:
                progress("predicting", min(start + batch_size, len(order)), len(order))
    if state.num_processes > 1:
        found = gather_object(found)
    ordered = dict(found)
    return {key: [ordered[row][key] for row in range(len(dataset))] for key in found[0][1]}


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.float().cpu().numpy()
    return array


def held_out_losses(
    model: PreTrainedModel, teacher: PreTrainedModel, dataset: Dataset, collator: Any, stage: Stage
) -> dict[str, float]:
    """The mean of each possible loss term of ``stage``, unweighted, over held-out rows (``input_ids``, ``length``)."""
    with attention_kept(model, teacher):
        return _held_out_losses(model, teacher, dataset, collator, stage)


def _held_out_losses(
    model: PreTrainedModel, teacher: PreTrainedModel, dataset: Dataset, collator: Any, stage: Stage
) -> dict[str, float]:
    masked = isinstance(collator, MaskingCollator)
    objective = Objective(model, teacher, stage, dataset.column_names, masked=masked)
    device = next(model.parameters()).device
    rows = dataset.remove_columns("length")
    batches = [
        collator([*rows.select(range(i, min(i + BATCH_SIZE, len(rows))))]) for i in range(0, len(rows), BATCH_SIZE)
    ]
    counts = torch.stack([count_items(batch) for batch in batches]).sum(0).to(device)
    sums: dict[str, float] = dict.fromkeys(objective.weights, 0.0)
    states = [(each, each.training) for each in (model, teacher)]
    with torch.no_grad():
        for each, _ in states:
            each.eval()
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()}
            targets = {name: moved.pop(name) for name in TARGETS if name in moved}
            outputs, taught = (each(**moved, **objective.wanted) for each, _ in states)
            terms = objective.terms(outputs, taught, moved["attention_mask"], targets, counts)
            for name, term in terms.items():
                sums[name] += float(term)
    for each, training in states:
        each.train(training)
    return sums
