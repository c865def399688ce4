"""What a model's class numbers mean in a task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.classes import Lookup, class_names, class_order, unnamed, whole_number
from compresskit.tasks.declaration import Task
from compresskit.tasks.rows import TaskData

#: A name that says which class it is.
_CLASS = re.compile(r"LABEL_[0-9]+")


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
    def classes(self) -> tuple[str, ...]:
        """The labels in the order of the model's classes."""
        return tuple(sorted(self.numbers, key=lambda label: self.numbers[label]))

    @property
    def single(self) -> dict[str, int]:
        """Label -> its one class number, for training."""
        return {label: numbers[0] for label, numbers in self.numbers.items()}


def map_labels(
    task: Task, labels: Sequence[str], model: PreTrainedModel, sources: Sequence[Sequence[str]] = ()
) -> LabelMap:
    """Match a task's labels with a model's classes by name: upper and lower case count only where they tell labels
    apart, integers match by their value, ``map_labels`` renames for transfers.

    ``LABEL_i`` of a model without names is class i: of the declared labels, else of integers the number i, else of the
    labels in their order. For a transfer it is that of the one source with as many labels.

    Where the task declares no labels, those found may be fewer than the model's (a dev file without a rare one).

    Args:
        task: the declaration.
        labels: of the task, declared or found.
        model: with a head for classes.
        sources: the labels of each task that ``transfer_of`` names, in the order of the class numbers.

    Raises:
        InputError: they differ; both are shown.
    """
    held, note = class_names(model.config), None
    names = (_names_of_unnamed(task, labels, len(held), sources) if unnamed(held) else None) or held
    if names != held:
        note = f"the model does not name its labels; taken as {', '.join(names)}, in this order"
        if task.labels is None and any(whole_number(label) is None for label in labels):
            note += " (the alphabet's; if the model has another one, declare the labels in that)"
    by_name, renamed = Lookup(labels), Lookup(list(task.map_labels))
    numbers: dict[str, tuple[int, ...]] = dict.fromkeys(labels, ())
    extra = {}
    for number, name in enumerate(names):
        source = renamed(name)
        label = by_name(task.map_labels[source] if source is not None else name)
        if label is not None:
            numbers[label] += (number,)
        else:
            extra[name] = (number,)
    if twice := [name for name in names if names.count(name) > 1]:
        alike = ", ".join(str(number) for number, name in enumerate(names) if name == twice[0])
        raise InputError(
            f"classes {alike} of the model are all called {twice[0]!r}: give them different names in its config.json "
            "(id2label)"
        )
    one_each = task.transfer_of or all(len(found) == 1 for found in numbers.values())
    if not (all(numbers.values()) and one_each and (not extra or task.labels is None)):
        hint = f" (it scores models of {' or '.join(task.transfer_of)})" if task.transfer_of else ""
        if unnamed(names):
            hint += "; name the model's in its config.json (id2label), or declare all labels of the task in their order"
        elif not task.transfer_of and len(names) == len(labels):
            pairs = ", ".join(f"{name}: ..." for name in names)
            hint += f"; if they are the same, the task pairs each with its value in the data: labels: {{{pairs}}}"
        raise InputError(
            f"labels differ: the model has {', '.join(names)}; task {task.name} has {', '.join(labels)}{hint}"
        )
    if task.transfer_of:
        meant = (f"{label} = {' or '.join(names[i] for i in found)}" for label, found in numbers.items())
        stated = f"labels of the model, as {task.name} has them: {'; '.join(meant)}"
        note = stated if note is None else f"{note}; {stated}"
    return LabelMap({**numbers, **extra}, note)


def check_order(
    task: Task,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
) -> None:
    """Refuse two heads whose classes the losses match otherwise than the task does: logits are compared by the names of
    the models alone, rows are scored by the task's, and a model without names has those of whom it is compared with.

    Args:
        task: the declaration.
        student, teacher: the models.
        ours, theirs: label of the task -> its class number in the student, and in the teacher.

    Raises:
        InputError: says what all three call their classes.
    """
    order = class_order(class_names(student.config), class_names(teacher.config))
    if order is None or any(theirs[label] != order[number] for label, number in ours.items()):
        raise InputError(
            f"labels differ: the teacher has {', '.join(class_names(teacher.config))}, the student "
            f"{', '.join(class_names(student.config))}, task {task.name} {', '.join(ours)}, and the "
            "model without names does not say which is which: name its labels in its config.json (id2label)"
        )


def check_teacher(data: TaskData, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """:func:`check_order` of the task's labels; a note on how the teacher's classes were matched, where the student's
    does not say it.

    Raises:
        InputError: see there.
    """
    ours, theirs = (map_labels(data.task, data.labels, model, data.sources) for model in (student, teacher))
    wanted = {label: ours.single[label] for label in data.labels}
    check_order(data.task, student, teacher, wanted, theirs.single)
    return f"teacher: {theirs.note}" if theirs.note and theirs.note != ours.note else None


def _names_of_unnamed(
    task: Task, labels: Sequence[str], count: int, sources: Sequence[Sequence[str]]
) -> tuple[str, ...] | None:
    """What the ``count`` classes of a model without names mean; None where that cannot be known."""
    if task.transfer_of:
        fitting = {tuple(source) for source in sources if len(source) == count}
        return fitting.pop() if len(fitting) == 1 else None
    if any(_CLASS.fullmatch(label) for label in labels):
        return None  # these say which class they are
    numbers = {whole_number(label): label for label in labels}
    if task.labels is None and len(numbers) == len(labels) and set(numbers) <= set(range(count)):
        return tuple(numbers.get(number, str(number)) for number in range(count))
    return tuple(labels) if len(labels) == count else None
