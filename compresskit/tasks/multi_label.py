"""Any number of labels for each text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.classes import class_names, in_order
from compresskit.model.heads import has_head
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.label_column import found_label
from compresskit.tasks.labels import map_labels
from compresskit.tasks.predictions import Counts, Output, Predictions
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Split, TaskData

#: A label counts as predicted where its probability is at least this.
THRESHOLD = 0.5
#: What separates several labels in one cell.
_SEPARATORS = (",", ";", "|")


class SeveralLabels(Predictions):
    """For every label of its own whether it holds: a logit whose sigmoid is the label's probability."""

    def fits(self, model: PreTrainedModel) -> bool:
        return has_head(model, "sequence-classification") and (
            model.config.problem_type == "multi_label_classification"
        )

    def supervised_loss(self, student: Output, mask: Tensor, targets: Mapping[str, Tensor], count: Counts) -> Tensor:
        """Binary cross-entropy, the mean over labels."""
        labels = targets["labels"].float()
        return F.binary_cross_entropy_with_logits(student["logits"].float(), labels, reduction="sum") / count.labels

    def logits_loss(
        self,
        student: Output,
        teacher: Output,
        mask: Tensor,
        targets: Mapping[str, Tensor],
        count: Counts,
        *,
        form: Literal["kl", "mse"],
        temperature: float,
    ) -> Tensor:
        """``kl``: temperature^2 x KL(teacher || student) of the softened probabilities of each label; ``mse``: of the
        logits. The mean over labels.
        """
        ours, theirs = student["logits"].float(), teacher["logits"].clone().float()
        number = count.sequences * ours.shape[-1]
        if form == "mse":
            return (ours - theirs).square().sum() / number
        ours, theirs = ours / temperature, theirs / temperature
        taught = torch.sigmoid(theirs)
        crossed = F.binary_cross_entropy_with_logits(ours, taught, reduction="sum")
        entropy = F.binary_cross_entropy_with_logits(theirs, taught, reduction="sum")
        return temperature**2 * (crossed - entropy) / number

    def distributions(self, outputs: Output, mask: Tensor) -> list[Tensor]:
        """A label holds or not: two classes, with the logits z and 0."""
        logits = outputs["logits"]
        return [torch.stack((logits, torch.zeros_like(logits)), -1)]


@register
class MultiLabel(TaskKind):
    """Targets are tuples of label names, also empty ones.

    The column of labels holds a list, or one text with ``,``, ``;`` or ``|`` between the labels; or there is a column
    of 0 and 1 for every label: then the declaration lists the labels, and ``label`` is ``*``.
    """

    name = "multi-label"
    summary = "any number of labels for each text"
    head = "sequence-classification"
    metrics = ("macro_f1", "micro_f1", "average_precision", "exact_match")
    predictions = SeveralLabels()
    takes_labels = True

    def check(self, task: Task) -> None:
        super().check(task)
        if task.label == "*" and not task.labels:
            raise InputError("a column for every label (label: '*') needs labels: name each with its column")

    def columns(self, task: Task) -> tuple[str, ...]:
        return (*task.inputs, *((task.labels or {}).values() if task.label == "*" else (task.label,)))

    def labels(self, task: Task, rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        if task.labels is not None:
            return tuple(task.labels)
        return in_order({value for row in rows for value in _values(row.get(task.label), "")})

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        if task.label == "*":
            return tuple(
                name for column, name in labels.items() if _flag(row.get(column), f"{where}: column {column!r}")
            )
        values = _values(row.get(task.label), where)
        for value in values:
            if value not in labels:
                raise InputError(f"{where}: unknown label {value!r}; known: {', '.join(labels)}")
        return tuple(dict.fromkeys(labels[value] for value in values))

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "multi_label_classification",
        }

    def check_head(self, task: Task, model: PreTrainedModel) -> None:
        super().check_head(task, model)
        if not self.predictions.fits(model):
            kind = model.config.problem_type or "not set"
            raise InputError(
                f"task {task.name} needs a head for several labels at once (problem_type multi_label_classification); "
                f"that of this {type(model).__name__} is {kind}"
            )

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        return map_labels(data.task, data.labels, model, data.sources).note

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        numbers = map_labels(data.task, data.labels, model, data.sources).single
        rows = np.zeros((len(split), len(class_names(model.config))), dtype=np.float32)
        for row, names in zip(rows, split.targets, strict=True):
            row[[numbers[name] for name in names]] = 1.0
        return {"labels": rows.tolist()}

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[Any]:
        """Of every row the probability of each label: those of the task, then what else the model knows."""
        numbers = map_labels(data.task, data.labels, scoring.model, data.sources).single
        _, logits = self.logits(scoring, data, split)
        scores = np.stack(logits["logits"])[:, list(numbers.values())]
        return list(1 / (1 + np.exp(-scores.astype(np.float64))))

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Any]) -> dict[str, float]:
        """At the threshold 0.5, over all labels of the model, whichever of them these rows have. ``average_precision``
        is the mean over the labels that occur; it needs no threshold.
        """
        order = map_labels(data.task, data.labels, scoring.model, data.sources).single
        wanted = np.array([[name in names for name in order] for names in split.targets])
        probabilities = np.stack(answers)
        given = probabilities >= THRESHOLD
        occurring = wanted.any(axis=0)
        precision = 0.0
        if occurring.any():
            precision = sklearn_metrics.average_precision_score(wanted[:, occurring], probabilities[:, occurring])
        return {
            "macro_f1": float(sklearn_metrics.f1_score(wanted, given, average="macro", zero_division=0)),
            "micro_f1": float(sklearn_metrics.f1_score(wanted, given, average="micro", zero_division=0)),
            "average_precision": min(float(precision), 1.0),
            "exact_match": float((wanted == given).all(axis=1).mean()),
        }


def _values(value: Any, where: str) -> list[str]:
    """The labels in a cell, as texts; where labels are only looked for, ``where`` is empty and a bad cell has none.

    Raises:
        InputError: it holds something else than labels, no label, or one twice (as flags of 0 and 1 would be).
    """
    cells: Any = value
    if isinstance(value, str):
        mark = next((mark for mark in _SEPARATORS if mark in value), None)
        cells = [part for part in (value.split(mark) if mark is not None else [value]) if part.strip()]
    elif isinstance(value, int) and not isinstance(value, bool):
        cells = [value]
    plain = isinstance(cells, list) and not any(isinstance(cell, bool) for cell in cells)
    found = [found_label(cell) for cell in cells] if plain else [None]
    names = [name for name in found if name is not None and not name.startswith(("[", "{"))]
    if len(names) == len(found) and len(set(names)) == len(names):
        return names
    if not where:
        return []
    raise InputError(
        f"{where}: {value!r} is no list of labels, each named once, nor labels with ',', ';' or '|' between them "
        "(flags of 0 and 1 take a column for each label and label: '*')"
    )


def _flag(value: Any, where: str) -> bool:
    text = str(value).strip().casefold()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise InputError(f"{where} must hold 0 or 1, not {value!r}")
