"""Classes that have an order, such as one to five stars: a task kind of another package.

The head gives one number. It learns the place of a label in the order (0, 1, 2, ...), and the nearest place is the
answer. Scores count how far an answer is off: four stars for five is a smaller mistake than one star for five.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.rows import Split, TaskData


class Ordinal(TaskKind):
    """Targets are label names; the declaration's ``labels`` give their order."""

    name = "ordinal"
    summary = "one of several classes that have an order"
    head = "sequence-classification"
    metrics = ("weighted_kappa", "accuracy", "within_one")
    takes_labels = True

    def check(self, task: Task) -> None:
        super().check(task)
        if task.labels is None:
            raise InputError("kind ordinal needs labels: give them in their order")

    def labels(self, task: Task, rows: Any) -> tuple[str, ...]:
        return tuple(task.labels or ())

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> str:
        value = str(row.get(task.label))
        if value not in labels:
            raise InputError(f"{where}: unknown label {value!r}; known: {', '.join(labels)}")
        return labels[value]

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        if model.config.num_labels != 1:
            raise InputError(f"task {data.task.name} needs a head with one number, not {model.config.num_labels}")
        return None

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        return {"labels": [float(data.labels.index(target)) for target in split.targets]}

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[str]:
        _, logits = self.logits(scoring, data, split)
        places = np.clip(np.rint(np.concatenate(logits["logits"])), 0, len(data.labels) - 1)
        return [data.labels[int(place)] for place in places]

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[str]) -> dict[str, float]:
        order = list(data.labels)
        wanted, given = (np.array([order.index(name) for name in names]) for names in (split.targets, answers))
        kappa = cohen_kappa_score(wanted, given, labels=range(len(order)), weights="quadratic")
        return {
            "weighted_kappa": float(np.nan_to_num(kappa)),  # not a number where one class is all there is
            "accuracy": float(np.mean(wanted == given)),
            "within_one": float(np.mean(np.abs(wanted - given) <= 1)),
        }
