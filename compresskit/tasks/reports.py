"""Scores in parts, behind the metrics of a task: by class, by label, by kind of entity, by size of the number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compresskit.tasks.metrics import OF_NUMBERS

#: Row -> column -> number; whole numbers count rows, others are fractions or in the unit of the targets.
Rows = dict[str, dict[str, float]]
#: Rows of scikit-learn's reports that are of no class.
_MEANS = ("accuracy", "micro avg", "macro avg", "weighted avg", "samples avg")
#: How many parts numbers are cut into, by their size.
PARTS = 5


@dataclass(frozen=True)
class Report:
    """The scores of one split in parts.

    Attributes:
        tables: title -> rows. A number that cannot be given, such as a correlation of one row, is left out.
        classes: of :attr:`confusion`, in its order.
        confusion: for each true class (row) how many were taken for each class (column); None where there are none.
    """

    tables: dict[str, Rows] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    confusion: list[list[int]] | None = None

    def record(self) -> dict[str, Any]:
        """As plain data."""
        found: dict[str, Any] = {"tables": self.tables}
        if self.confusion is not None:
            found["confusion"] = {"classes": list(self.classes), "true by row, predicted by column": self.confusion}
        return found


def of_anything(targets: Sequence[Any], answers: Sequence[Any]) -> Report:
    """Of single names, or of numbers; an empty report of anything else."""
    both = [*targets, *answers]
    if all(isinstance(value, str) for value in both):
        return of_classes(targets, answers, sorted(set(both)))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in both):
        return of_numbers(targets, answers)
    return Report()


def of_classes(targets: Sequence[str], answers: Sequence[str], classes: Sequence[str]) -> Report:
    """Precision, recall, F1 and support of every class, as scikit-learn's ``classification_report`` has them, and the
    confusion of classes. What cannot be divided counts as 0.
    """
    from sklearn.metrics import classification_report, confusion_matrix

    order = list(classes)
    names = _unlike_means(order)
    found = classification_report(targets, answers, labels=order, target_names=names, output_dict=True, zero_division=0)
    confusion = confusion_matrix(targets, answers, labels=order)
    return Report({"by class": _rows(found, len(targets))}, tuple(order), confusion.tolist())


def of_labels(targets: np.ndarray, answers: np.ndarray, labels: Sequence[str]) -> Report:
    """The same of every label, where a text may have several.

    Args:
        targets, answers: (rows, labels) of 0 and 1.
        labels: their names.
    """
    from sklearn.metrics import classification_report

    wanted, given, numbers = targets.astype(int), answers.astype(int), range(len(labels))
    if len(labels) == 1:  # one column would be two classes
        wanted, given, numbers = wanted.ravel(), given.ravel(), range(1, 2)
    found = classification_report(
        wanted, given, labels=list(numbers), target_names=_unlike_means(labels), output_dict=True, zero_division=0
    )
    return Report({"by label": _rows(found, len(targets))})


def of_entities(targets: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> Report:
    """The same of every type of entity, as seqeval's ``classification_report`` has them; empty without an entity."""
    from seqeval.metrics import classification_report
    from seqeval.metrics.sequence_labeling import get_entities

    wanted, given = ([list(tags) for tags in rows] for rows in (targets, answers))
    if not get_entities(wanted) and not get_entities(given):
        return Report()
    return Report({"by type": _rows(classification_report(wanted, given, output_dict=True, zero_division=0), 0)})


def _unlike_means(names: Sequence[str]) -> list[str]:
    """The names; those that scikit-learn gives to means over all are marked, or one would hide the other."""
    return [f"{name} (class)" if name in _MEANS else name for name in names]


def _rows(found: dict[str, Any], total: int) -> Rows:
    """A report of scikit-learn or seqeval, whose accuracy stands alone, as rows."""
    rows: Rows = {}
    for name, values in found.items():
        if isinstance(values, dict):
            rows[name] = {
                key.replace("-score", ""): int(value) if key == "support" else float(value)
                for key, value in values.items()
            }
        else:
            rows[name] = {"f1": float(values), "support": total}
    return rows


def of_numbers(targets: Sequence[float], answers: Sequence[float]) -> Report:
    """Correlations over all rows, and the same by fifths of the rows, from the lowest target to the highest."""
    wanted, given = np.asarray(targets, dtype=float), np.asarray(answers, dtype=float)
    parts = [part for part in np.array_split(np.argsort(wanted, kind="stable"), PARTS) if len(part)]
    rows = {f"fifth {number}": _of_part(wanted[part], given[part]) for number, part in enumerate(parts, start=1)}
    return Report({"by size of the target": {**rows, "all": _of_part(wanted, given)}})


def _of_part(targets: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    found = {
        "target from": float(targets.min()),
        "target to": float(targets.max()),
        "mean target": float(targets.mean()),
        "mean answer": float(answers.mean()),
    }
    if len(np.unique(targets)) > 1 and len(np.unique(answers)) > 1:  # constants have no correlation
        found |= {name: OF_NUMBERS[name](targets, answers, 0) for name in ("pearson", "spearman")}
    return found | {"support": len(targets)}
