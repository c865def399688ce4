"""One class for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.classes import Lookup, class_names, in_order, several_at_once
from compresskit.storage.files import Rows
from compresskit.tasks import reports
from compresskit.tasks.answer import Answer, with_score
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.label_column import found_label, found_labels, label_text, not_a_label, refuse_joined
from compresskit.tasks.labels import LabelMap, check_teacher, map_labels
from compresskit.tasks.metrics import OF_CLASSES
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Place, Split, TaskData, absent_notes

#: Labels that are found in a file and not declared: more of them are a sign of the wrong column.
_MOST_LABELS = 1000


@register
class Classification(TaskKind):
    """Single-label classification. Targets are label names."""

    name = "classification"
    summary = "one class for each text or pair of texts"
    head = "sequence-classification"
    metrics = tuple(OF_CLASSES)
    takes_labels = True

    def check(self, task: Task) -> None:
        super().check(task)
        if task.labels is not None and len(task.labels) < 2:
            raise InputError(f"labels: {len(task.labels)} are listed; two are the least")

    def from_hub(self, task: Task, rows: Rows) -> Rows:
        """The hub has names of classes, or numbers, which count in the order of the declaration."""
        declared = task.labels or {}
        values, known = list(declared.values()), Lookup(list(declared))
        for row in rows:
            cell = row.get(task.label)
            if isinstance(cell, int) and 0 <= cell < len(values):
                row[task.label] = values[cell]
            elif isinstance(cell, str) and cell not in values and (name := known(cell)) is not None:
                row[task.label] = declared[name]
        return rows

    def labels(self, task: Task, rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> tuple[str, ...]:
        if task.labels is not None:
            return tuple(task.labels)
        # Cells without a label are refused with their rows by `target`.
        values = found_labels(task.name, ((place, row.get(task.label)) for place, row in rows))
        if len(values) > _MOST_LABELS:
            raise InputError(
                f"task {task.name}: column {task.label!r} has {len(values)} different values: is it the label? "
                "If it is, list them under labels (name: value); numbers to predict take kind: regression"
            )
        refuse_joined(task.name, values)
        return in_order(values)

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> str:
        value = row.get(task.label)
        text = found_label(value) if task.labels is None else label_text(value)
        if isinstance(value, bool) and text not in labels:
            text = str(value).lower()  # as JSON writes it
        if text is None or text not in labels:
            raise not_a_label(value, where, labels)
        return labels[text]

    def check_head(self, task: Task, model: PreTrainedModel) -> None:
        super().check_head(task, model)
        several = several_at_once(model)
        if several is not None:
            raise InputError(f"task {task.name}: the model predicts {several}; {self.name} takes one class for a text")

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        found = self._mapped(data, model)
        notes = [found.note] if found.note else []
        if len(found.classes) > 2 and "f1" in data.task.metrics:
            notes += absent_notes(data, f"f1 is the mean over {len(found.classes)} classes", found.classes, set)
        return "; ".join(notes) or None

    def match_teacher(self, data: TaskData, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
        return check_teacher(data, student, teacher)

    def class_numbers(self, data: TaskData, model: PreTrainedModel) -> dict[str, int]:
        return self._mapped(data, model).single

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        numbers = self._mapped(data, model).single
        return {"labels": [numbers[target] for target in split.targets]}

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[str]:
        """The most probable label; probabilities of classes that mean the same here (of a transfer) are added up."""
        names, scores = self._weighed(scoring, data, split)
        return [names[number] for number in scores.argmax(axis=1)]

    def labels_of(self, task: Task, model: PreTrainedModel) -> tuple[str, ...]:
        return tuple(task.labels or class_names(model.config))

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """The most probable label, and the probabilities of the first ``most`` ones."""
        names, scores = self._weighed(scoring, data, split)
        found = []
        for row in scores.astype(np.float64):
            shares = row / row.sum()
            first = [(names[number], float(shares[number])) for number in np.argsort(-shares, kind="stable")[:most]]
            told = {"label": first[0][0], "score": first[0][1], "probabilities": dict(first)}
            found.append(Answer(", ".join(with_score(*each) for each in first), told))
        return found

    def _weighed(self, scoring: Scoring, data: TaskData, split: Split) -> tuple[tuple[str, ...], np.ndarray]:
        """The labels, and for each row (rows, labels) what is in proportion to their probabilities."""
        found = self._mapped(data, scoring.model)
        _, logits = self.logits(scoring, data, split)
        scores = np.stack(logits["logits"])
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        names = found.classes
        return names, np.stack([shifted[:, found.numbers[name]].sum(axis=1) for name in names], axis=1)

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[str]) -> dict[str, float]:
        """By the classes of the model, whichever of them these rows have: in the order of the declaration, else in the
        model's own.
        """
        order = self._order(scoring, data)
        targets, predictions = (np.array([order.index(name) for name in names]) for names in (split.targets, answers))
        return {name: OF_CLASSES[name](targets, predictions, len(order)) for name in data.task.metrics}

    def report(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[str]) -> reports.Report:
        return reports.of_classes(split.targets, answers, self._order(scoring, data))

    def _order(self, scoring: Scoring, data: TaskData) -> list[str]:
        found = self._mapped(data, scoring.numbered_by or scoring.model)
        return list(found.numbers if data.task.labels is not None else found.classes)

    @staticmethod
    def _mapped(data: TaskData, model: PreTrainedModel) -> LabelMap:
        return map_labels(data.task, data.labels, model, data.sources)
