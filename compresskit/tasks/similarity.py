"""How near the similarity of two sentence vectors comes to people's judgement. No head, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compresskit.model.sentence_vectors import read_sentence_model
from compresskit.tasks.answer import Answer
from compresskit.tasks.declaration import Task
from compresskit.tasks.encoding import OfVectors, text_vectors
from compresskit.tasks.kind import Scoring
from compresskit.tasks.metrics import OF_NUMBERS
from compresskit.tasks.registry import register
from compresskit.tasks.regression import number
from compresskit.tasks.rows import Split, TaskData


@register
class Similarity(OfVectors):
    """Targets are numbers, answers are cosines (or what the model's folder compares by). A head is not used."""

    name = "similarity"
    summary = "how near the cosine of two sentence vectors comes to a number"
    metrics = tuple(OF_NUMBERS)
    inputs = ("sentence", "sentence")

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> float:
        return number(row.get(task.label), f"{where}: column {task.label!r}")

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[float]:
        how = read_sentence_model(scoring.folder)
        first, second = (text_vectors(scoring, how, texts) for texts in zip(*split.texts, strict=True))
        return [float(value) for value in how.likeness(first, second)]

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """The similarity of pairs, the vectors of single texts."""
        if any(len(texts) == 1 for texts in split.texts):
            return super().described(scoring, data, split, most)
        return [Answer(f"{value:.4f}", {"similarity": value}) for value in self.answers(scoring, data, split)]

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[float]) -> dict[str, float]:
        targets, found = np.array(split.targets), np.array(answers)
        return {metric: OF_NUMBERS[metric](targets, found, 0) for metric in data.task.metrics}
