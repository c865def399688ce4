"""One class for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.storage.files import Rows
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.labels import map_labels
from compresskit.tasks.metrics import METRICS
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Split, TaskData

#: Labels that are found in a file and not declared: more of them are a sign of the wrong column.
_MOST_LABELS = 1000


@register
class Classification(TaskKind):
    """Single-label classification. Targets are label names."""

    name = "classification"
    summary = "one class for each text or pair of texts"
    head = "sequence-classification"
    takes_labels = True

    def from_hub(self, task: Task, rows: Rows) -> Rows:
        """The hub has class numbers; they count in the order of the declaration."""
        values = list((task.labels or {}).values())
        for row in rows:
            number = row.get(task.label)
            if isinstance(number, int) and 0 <= number < len(values):
                row[task.label] = values[number]
        return rows

    def labels(self, task: Task, rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        if task.labels is not None:
            return tuple(task.labels)
        values = {str(row[task.label]) for row in rows if row.get(task.label) is not None}
        if len(values) < 2:
            raise InputError(
                f"task {task.name}: column {task.label!r} has {len(values)} different labels, needs two or more"
            )
        if len(values) > _MOST_LABELS:
            raise InputError(
                f"task {task.name}: column {task.label!r} has {len(values)} different values: is it the label?"
            )
        return tuple(sorted(values))

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> str:
        value = row.get(task.label)
        if str(value) not in labels:
            raise InputError(f"{where}: unknown label {value!r}; known: {', '.join(labels)}")
        return labels[str(value)]

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        return map_labels(data.task, data.labels, model).note

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        numbers = map_labels(data.task, data.labels, model).single
        return {"labels": [numbers[target] for target in split.targets]}

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[str]:
        """The most probable label; probabilities of classes that mean the same here (of a transfer) are added up."""
        classes = map_labels(data.task, data.labels, scoring.model).numbers
        _, logits = self.logits(scoring, data, split)
        scores = np.stack(logits["logits"])
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        merged = np.stack([shifted[:, numbers].sum(axis=1) for numbers in classes.values()], axis=1)
        names = list(classes)
        return [names[number] for number in merged.argmax(axis=1)]

    def measure(self, data: TaskData, split: Split, answers: Sequence[str]) -> dict[str, float]:
        # A model may know labels that the rows at hand do not have.
        order = list(dict.fromkeys([*data.labels, *answers]))
        targets, predictions = (np.array([order.index(name) for name in names]) for names in (split.targets, answers))
        return {name: METRICS[name](targets, predictions, len(data.labels)) for name in data.task.metrics}
