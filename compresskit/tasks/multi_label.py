"""Any number of labels for each text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from compresskit.errors import InputError, shown
from compresskit.model.classes import class_names, cleaned, in_order
from compresskit.model.heads import has_head
from compresskit.storage.files import Rows
from compresskit.tasks import reports
from compresskit.tasks.answer import Answer, with_score
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.label_column import found_labels, is_list, label_text, not_a_label, refuse_joined
from compresskit.tasks.labels import check_teacher, map_labels
from compresskit.tasks.predictions import Counts, Form, Output, Predictions
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Place, Split, TaskData, absent_notes

#: Thresholds of a report: from them on a label counts.
_TRIED = tuple(tenth / 10 for tenth in range(1, 10))
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
        form: Form,
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

    The column of labels holds lists, or texts with one of ``,``, ``;`` and ``|`` between the labels; or there is a
    column of 0 and 1 for every label: then the declaration lists the labels, and ``label`` is ``*``. A label counts as
    predicted from the declared threshold on.
    """

    name = "multi-label"
    summary = "any number of labels for each text"
    head = "sequence-classification"
    metrics = ("macro_f1", "micro_f1", "average_precision", "exact_match")
    predictions = SeveralLabels()
    takes_labels = True
    takes_threshold = True

    def check(self, task: Task) -> None:
        super().check(task)
        if task.label == "*" and not task.labels:
            raise InputError("a column for every label (label: '*') needs labels: name each with its column")

    def columns(self, task: Task) -> tuple[str, ...]:
        return (*task.inputs, *((task.labels or {}).values() if task.label == "*" else (task.label,)))

    def read(self, task: Task, path: Path) -> tuple[Rows, str | None]:
        rows, note = super().read(task, path)
        _check_form(task, rows, path.name)
        return rows, note

    def from_hub(self, task: Task, rows: Rows) -> Rows:
        _check_form(task, rows, f"of {task.name} on the hub")
        return rows

    def labels(self, task: Task, rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> tuple[str, ...]:
        if task.labels is not None:
            return tuple(task.labels)
        # What is no list of labels is refused with its row by `target`.
        found = found_labels(
            task.name, ((place, cell) for place, row in rows for cell in _cells(row.get(task.label)) or ())
        )
        refuse_joined(task.name, found)
        if found and set(found) <= {"0", "1"}:
            raise InputError(
                f"task {task.name}: column {task.label!r} holds 0 and 1 alone: flags take a column for each label and "
                "label: '*'; if these are labels, list them under labels"
            )
        return in_order(found)

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        if task.label == "*":
            return tuple(
                name for column, name in labels.items() if _flag(row.get(column), f"{where}: column {column!r}")
            )
        value = row.get(task.label)
        cells = _cells(value)
        names = [] if cells is None else [labels.get(label_text(cell) or "") for cell in cells]
        if cells is None or len(set(names) - {None}) < len(names) - names.count(None):
            raise InputError(
                f"{where}: {shown(value)} is no list of labels, each named once, nor labels with ',', ';' or '|' "
                "between them (flags of 0 and 1 take a column for each label and label: '*')"
            )
        for cell, name in zip(cells, names, strict=True):
            if name is None:
                raise not_a_label(cell, where, labels)
        return tuple(name for name in names if name is not None)

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
        found = map_labels(data.task, data.labels, model, data.sources)
        notes = [found.note] if found.note else []
        if "macro_f1" in data.task.metrics:
            what = f"macro_f1 is the mean over {len(found.numbers)} labels"
            notes += absent_notes(data, what, list(found.numbers), lambda targets: set(chain.from_iterable(targets)))
        return "; ".join(notes) or None

    def match_teacher(self, data: TaskData, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
        return check_teacher(data, student, teacher)

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

    def labels_of(self, task: Task, model: PreTrainedModel) -> tuple[str, ...]:
        return tuple(task.labels or class_names(model.config))

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """The labels from the threshold on, and their probabilities with those of the first ``most`` labels."""
        names = list(map_labels(data.task, data.labels, scoring.model, data.sources).single)
        found = []
        for probabilities in self.answers(scoring, data, split):
            order = np.argsort(-probabilities, kind="stable")
            told = {names[i]: float(probabilities[i]) for i in order}
            given = [name for name, share in told.items() if share >= _threshold(data.task)]
            told = dict(list(told.items())[: max(most, len(given))])
            line = ", ".join(with_score(name, told[name]) for name in given) or "none of the labels"
            found.append(Answer(line, {"labels": given, "probabilities": told}))
        return found

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Any]) -> dict[str, float]:
        """At the task's threshold, over all labels of the model, whichever of them these rows have.
        ``average_precision`` is the mean over the labels that occur; it needs no threshold.
        """
        from sklearn.metrics import average_precision_score

        order = map_labels(data.task, data.labels, scoring.model, data.sources).single
        wanted = np.array([[name in names for name in order] for names in split.targets])
        probabilities = np.stack(answers)
        given = probabilities >= _threshold(data.task)
        precisions = [average_precision_score(y, p) for y, p in zip(wanted.T, probabilities.T, strict=True) if y.any()]
        return _f1(wanted, given) | {
            "average_precision": min(float(np.mean(precisions)), 1.0) if precisions else 0.0,
            "exact_match": float((wanted == given).all(axis=1).mean()),
        }

    def report(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Any]) -> reports.Report:
        order = list(map_labels(data.task, data.labels, scoring.model, data.sources).single)
        wanted = np.array([[name in names for name in order] for names in split.targets])
        probabilities = np.stack(answers)
        by_label = reports.of_labels(wanted, probabilities >= _threshold(data.task), order)
        tried = sorted({*_TRIED, _threshold(data.task)})
        by_threshold: reports.Rows = {f"from {at:g}": _f1(wanted, probabilities >= at) for at in tried}
        return reports.Report({**by_label.tables, "by threshold": by_threshold})


def _threshold(task: Task) -> float:
    return 0.5 if task.threshold is None else task.threshold


def _f1(wanted: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """Of two tables of flags, (rows, labels)."""
    # Label by label: scikit-learn takes one column for two classes, of which it would give the mean.
    from sklearn.metrics import f1_score

    labels = zip(wanted.T, given.T, strict=True)
    return {
        "macro_f1": float(np.mean([f1_score(y, g, zero_division=0) for y, g in labels])),
        "micro_f1": float(f1_score(wanted.ravel(), given.ravel(), zero_division=0)),
    }


def _cells(value: Any) -> list[Any] | None:
    """The single labels that a cell of the column holds; None where it is no list of labels."""
    if isinstance(value, str):
        text = cleaned(value)
        marks = [mark for mark in _SEPARATORS if mark in text]
        parts = text.split(marks[0]) if marks else [text]
        return None if is_list(text) else [part for part in parts if part.strip()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, list) and not any(isinstance(cell, bool) for cell in value):
        return value
    return None


def _check_form(task: Task, rows: Rows, source: str) -> None:
    """Refuse a column whose cells are read in more than one way. Raises InputError naming two rows."""
    first: dict[str, tuple[int, Any]] = {}
    for number, row in enumerate(rows, start=1):
        cell = row.get(task.label)
        forms = [f"has {mark!r} between labels" for mark in _SEPARATORS if isinstance(cell, str) and mark in cell]
        for form in ["is a list"] if isinstance(cell, list) else forms:
            first.setdefault(form, (number, cell))
        if len(first) > 1:
            one, other = [(f"row {row} {form} ({shown(held)})") for form, (row, held) in first.items()][:2]
            raise InputError(
                f"data {source}: column {task.label!r}: {one}, {other}: write all rows in one way; labels that hold "
                "such a mark take lists in JSON lines"
            )


def _flag(value: Any, where: str) -> bool:
    text = str(value).strip().casefold()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise InputError(f"{where} must hold 0 or 1, not {shown(value)}")
