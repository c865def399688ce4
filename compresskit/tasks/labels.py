"""What a model's class numbers mean in a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.tasks.declaration import Task


@dataclass(frozen=True)
class LabelMap:
    """What a model's classes mean in a task.

    Attributes:
        numbers: label of the task -> the class numbers of the model that mean it.
        note: how they were matched, where names alone did not say.
    """

    numbers: dict[str, tuple[int, ...]]
    note: str | None = None

    @property
    def single(self) -> dict[str, int]:
        """Label -> its one class number, for training."""
        return {label: numbers[0] for label, numbers in self.numbers.items()}


def map_labels(task: Task, labels: Sequence[str], model: PreTrainedModel) -> LabelMap:
    """Match a task's labels with a model's classes: by name (upper and lower case count only where they tell labels
    apart), through ``map_labels`` for transfers, in their order where the model has only ``LABEL_0``, ``LABEL_1``, ...

    Where the task declares no labels, those found may be fewer than the model's (a dev file without a rare one).

    Raises:
        InputError: they differ; both are shown.
    """
    named = model.config.id2label or {}
    names = [str(name) for _, name in sorted((int(number), name) for number, name in named.items())]
    by_name = _lookup(list(labels))
    renamed = _lookup(list(task.map_labels))
    numbers: dict[str, tuple[int, ...]] = dict.fromkeys(labels, ())
    extra = {}
    for number, name in enumerate(names):
        source = renamed(name)
        label = by_name(task.map_labels[source] if source is not None else name)
        if label is not None:
            numbers[label] += (number,)
        else:
            extra[name] = (number,)
    one_each = task.transfer_of or all(len(found) == 1 for found in numbers.values())
    if all(numbers.values()) and one_each and (not extra or task.labels is None):
        note = None
        if task.transfer_of:
            meant = (f"{label} = {' or '.join(names[i] for i in found)}" for label, found in numbers.items())
            note = f"labels of the model, as {task.name} has them: {'; '.join(meant)}"
        return LabelMap({**numbers, **extra}, note)
    if len(names) == len(labels) and all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        note = f"the model does not name its labels; taken as {', '.join(labels)}, in this order"
        return LabelMap({label: (number,) for number, label in enumerate(labels)}, note)
    hint = f" (it scores models of {' or '.join(task.transfer_of)})" if task.transfer_of else ""
    raise InputError(f"labels differ: the model has {', '.join(names)}; task {task.name} has {', '.join(labels)}{hint}")


class _lookup:  # noqa: N801 (used as a function)
    """A name as one of ``known`` has it: exactly, else without regard to case where that is unambiguous."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known = set(known)
        folded = [name.casefold() for name in known]
        self.folded = {name.casefold(): name for name in known if folded.count(name.casefold()) == 1}

    def __call__(self, name: str) -> str | None:
        return name if name in self.known else self.folded.get(name.casefold())
