"""One number for each text or pair of texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from compresskit.errors import InputError, shown
from compresskit.model.classes import cleaned, several_at_once
from compresskit.tasks.answer import Answer
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.metrics import OF_NUMBERS
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Split, TaskData

#: How tables write numbers. Python reads more: ``1_0``, digits of other scripts.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
#: The largest number that a model of 32 bits can be trained on.
LARGEST = float(np.finfo(np.float32).max)


@register
class Regression(TaskKind):
    """Targets are numbers."""

    name = "regression"
    summary = "one number for each text or pair of texts"
    metrics = tuple(OF_NUMBERS)
    head = "sequence-classification"

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> float:
        return number(row.get(task.label), f"{where}: column {task.label!r}")

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def check_head(self, task: Task, model: PreTrainedModel) -> None:
        super().check_head(task, model)
        outputs = model.config.num_labels
        if outputs == 1 and (several := several_at_once(model)) is not None:
            raise InputError(f"task {task.name}: the model predicts {several}; {self.name} takes one number for a text")
        if outputs != 1:
            raise InputError(
                f"task {task.name} needs a head with one number; this {type(model).__name__} has {outputs}"
            )

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[float]:
        _, logits = self.logits(scoring, data, split)
        return [float(row[0]) for row in logits["logits"]]

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        return [Answer(f"{value:.4f}", {"value": value}) for value in self.answers(scoring, data, split)]

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[float]) -> dict[str, float]:
        targets, predictions = np.array(split.targets), np.array(answers)
        return {name: OF_NUMBERS[name](targets, predictions, 0) for name in data.task.metrics}


def number(value: Any, where: str) -> float:
    """A cell as a finite number; ``where`` names it in errors. Raises InputError."""
    text = cleaned(str(value))
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number and not (isinstance(value, str) and _NUMBER.fullmatch(text)):
        raise InputError(f"{where} must hold numbers, such as -2.5, not {shown(value)}")
    found = float(text)
    if not abs(found) <= LARGEST:
        raise InputError(f"{where} must hold finite numbers, not {shown(value)}")
    return found
