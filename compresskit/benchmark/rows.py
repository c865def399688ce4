"""What a grid asks for, row by row, and the cells that become of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from compresskit.benchmark.baselines.base import DENSE, Asked, Baseline
from compresskit.benchmark.baselines.registry import find
from compresskit.planning.recipe import Recipe
from compresskit.tasks.loading import evaluation_only, load_task


class Row(NamedTuple):
    """One cell that a grid asks for, as it asks for it.

    Attributes:
        model: a folder or hub id; None: the embedded checkpoint.
        task: a name or YAML file; None: quality without labels.
        seed: of its training.
        name: what tables call it: the baseline, or ``METHOD``, or ``METHOD + VARIANT``.
        baseline: the grid's entry; empty: a student of a method.
        recipe: of a student; None for a baseline.
        ratio: as asked; None for what has a ratio of its own.
        variant: name of the variant; empty: as the grid says.
    """

    model: str | None
    task: str | None
    seed: int
    name: str
    baseline: str = ""
    recipe: Recipe | None = None
    ratio: float | None = None
    variant: str = ""

    @property
    def tuned(self) -> bool:
        """As :attr:`Cell.tuned`."""
        return is_tuned(self.task)


@dataclass(frozen=True)
class Cell:
    """One result to be: a model made smaller one way, for one task, with one seed.

    Attributes:
        model: the short name of the dense checkpoint.
        origin: what reads it: None for the embedded one.
        method: what tables call the row, as in :class:`Row`.
        recipe: None for a baseline.
        ratio: as asked; None for baselines and explicit shapes.
        task: name or file; None for quality without labels.
        task_name: the declared name; empty without a task.
        seed: of its training.
        key: hash of all that decides the result.
        start: name of the folder with what it shares with other cells (stage 1 and what comes before it, or the
            compressed teacher); empty: it has its own.
        baseline: the grid's entry for a baseline; empty for a student of a method.
        variant: of a student; empty: as the grid says.
        tuned: whether the task has a teacher fine-tuned on it, from which students learn in a stage 2; otherwise the
            checkpoint itself is the teacher.
    """

    model: str
    origin: str | None
    method: str
    recipe: Recipe | None = field(hash=False)
    ratio: float | None
    task: str | None
    task_name: str
    seed: int
    key: str
    start: str = ""
    baseline: str = ""
    variant: str = ""
    tuned: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder, unique through the key."""
        method = re.sub(r"[^\w.-]+", "-", self.method)
        parts = [self.model, method, f"{self.ratio:g}x" if self.ratio else "", self.task_name, f"seed{self.seed}"]
        return "-".join(part for part in (*parts, self.key[:8]) if part)

    @property
    def rival(self) -> Baseline | None:
        """The baseline that it is; None for a student of a method."""
        return find(self.baseline)[0] if self.baseline else None

    @property
    def asked(self) -> Asked:
        """What the grid asks of its baseline."""
        return Asked(self.baseline.partition(":")[2], self.ratio)

    @property
    def is_teacher(self) -> bool:
        """Whether it is the dense model that the others are compared with."""
        return self.baseline == DENSE

    @property
    def learns(self) -> bool:
        """Whether its model is trained on the students' budget."""
        return self.rival is None or self.rival.trained

    @property
    def keeps_model(self) -> bool:
        """Whether it has a model of its own in its folder; others are made from the dense one."""
        return self.learns or (self.is_teacher and self.tuned)

    @property
    def exported(self) -> bool:
        """Whether it may be exported."""
        return self.rival is None or (self.rival.exported and not self.rival.own_tokenizer)

    def __str__(self) -> str:
        ratio = f" {self.ratio:g}x" if self.ratio else ""
        return f"{self.method}{ratio}" + (f", {self.task_name}" if self.task else "") + f", seed {self.seed}"


def is_tuned(task: str | None) -> bool:
    """Whether models are fine-tuned on the task: not without one, and not where vectors are compared."""
    return task is not None and not evaluation_only(load_task(task))
