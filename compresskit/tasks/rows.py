"""The rows of a task, read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from compresskit.storage.files import Rows
from compresskit.tasks.declaration import Task

TRAIN, DEV = "train", "dev"


class Place(NamedTuple):
    """Where a row stands: its file or hub address, and its number from 1 on."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"data {self.source}, row {self.row}"


def placed(rows: Rows, source: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows, each with its place."""
    return ((Place(source, number), row) for number, row in enumerate(rows, start=1))


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        texts: the inputs of each row, one or two; what an input is, the task's kind says (a text, mostly).
        targets: what is to be predicted for each row, as the task's kind has it: label names, numbers, answers.
        source: file name or hub address, for records.
        sha256: of the file; None for the hub.
        remark: what keeps the rows from being the official ones, e.g. ``sample``; empty otherwise.
        documents: texts among which those that answer a row are looked for; none for most kinds.
    """

    texts: list[tuple[Any, ...]]
    targets: list[Any]
    source: str
    sha256: str | None = None
    remark: str = ""
    documents: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def empty(self) -> int:
        """How many inputs are texts without a character but white space, or lists without a word."""
        inputs = [text if isinstance(text, str) else "".join(text) for row in self.texts for text in row]
        return sum(not text.strip() for text in inputs)

    def take(self, indices: Sequence[int], remark: str) -> Split:
        """Some of the rows; the remark is added to the own one."""
        return replace(
            self,
            texts=[self.texts[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            remark=", ".join(part for part in (self.remark, remark) if part),
        )


@dataclass(frozen=True)
class Table:
    """A further table that the rows of a task name, such as the documents.

    Attributes:
        rows: as its file has them.
        source: file name or hub address.
        sha256: of the file; None for the hub.
    """

    rows: Rows
    source: str
    sha256: str | None = None


@dataclass(frozen=True)
class TaskData:
    """A task with its rows, and notes for the user on how they were found.

    Attributes:
        labels: names of the classes, in the order of their numbers; empty where the task has none.
        sources: the labels of each task that ``transfer_of`` names, where it comes with compresskit and declares them.
    """

    task: Task
    splits: dict[str, Split]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    sources: tuple[tuple[str, ...], ...] = ()

    def record(self) -> dict[str, Any]:
        """Which rows these are, as plain data."""
        return {
            name: {"rows": len(split), "source": split.source, "sha256": split.sha256, "remark": split.remark}
            | ({"documents": len(split.documents)} if split.documents else {})
            for name, split in self.splits.items()
        }


def absent_notes(
    data: TaskData, mean: str, labels: Sequence[str], of: Callable[[list[Any]], AbstractSet[str]]
) -> list[str]:
    """A note on each split that has no row of some labels, which count 0 in a mean.

    Args:
        data: the task with its rows.
        mean: what the note begins with: which mean over how many.
        labels: that the mean is over.
        of: the labels among the targets of a split.
    """
    notes = []
    for name, split in data.splits.items():
        present = set() if name == TRAIN else of(split.targets)
        missing = [label for label in labels if label not in present]
        if name != TRAIN and missing:
            notes.append(f"{mean}; {name} has no row of {', '.join(missing)}")
    return notes
