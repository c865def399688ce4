"""The steps of a shrinking. Each is a single command of compresskit, and calls the function that the command calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback

from compresskit.exporting.exported import export
from compresskit.pipeline import Request
from compresskit.planning.summary import two_factors
from compresskit.progress import Progress, silent
from compresskit.training import stages
from compresskit.training.working_folder import working_folder


@dataclass(frozen=True)
class Tools:
    """What a step reports to.

    Attributes:
        progress: called with (what, done, total).
        callbacks: of transformers, for trainings.
    """

    progress: Progress = silent
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class Step(ABC):
    """A single command.

    Attributes:
        output: the folder that it writes, complete or not at all: where it is there, the step is done.
        settings: the command's other flags, by the names of the function's arguments; None is not given.
        seed: of every random choice.
        command: its name.
        doing: what it does, for a progress bar.
        trains: whether it is a training.
    """

    output: Path
    settings: Mapping[str, Any]
    seed: int = 0
    command: ClassVar[str]
    doing: ClassVar[str]
    trains: ClassVar[bool] = False

    @abstractmethod
    def run(self, tools: Tools) -> tuple[str, ...]:
        """Do it; returns what the user should know. A training that was stopped continues."""

    def words(self) -> list[str]:
        """The command as it is typed."""
        given = {**self.settings, "seed": self.seed or None, "output": self.output}
        flags = [(name, value) for name, value in given.items() if value is not None]
        named = [word for name, value in flags for word in (f"--{name.replace('_', '-')}", _as_typed(value))]
        return ["compresskit", self.command, *named]


def _as_typed(value: Any) -> str:
    """8.0 as 8."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class _Training(Step):
    trains = True

    def _how(self, tools: Tools) -> dict[str, Any]:
        resume = working_folder(self.output).exists()
        how = {"output": self.output, "resume": resume, "seed": self.seed}
        return how | {"progress": tools.progress, "callbacks": tools.callbacks}


class FineTune(_Training):
    """``finetune``: the teacher."""

    command = "finetune"
    doing = "fine-tuning the teacher"

    def run(self, tools: Tools) -> tuple[str, ...]:
        return stages.finetune(**self.settings, **self._how(tools)).notes


class Cut(Step):
    """``compress``: the student, not yet trained."""

    command = "compress"
    doing = "compressing"

    def run(self, tools: Tools) -> tuple[str, ...]:
        torch.manual_seed(self.seed)
        work = Request(**self.settings).read().calibrated(tools.progress)
        plan, _ = work.write_to(self.output, work.plan(progress=tools.progress), progress=tools.progress)
        both = two_factors(plan)
        return (*work.checkpoint.notes, *plan.notes, *([both] if both else []))


class Distil(_Training):
    """``distill``: the student learns from its teacher."""

    command = "distill"
    doing = "distilling"

    def run(self, tools: Tools) -> tuple[str, ...]:
        return stages.distill(**self.settings, **self._how(tools)).notes


@dataclass(frozen=True)
class Export(Step):
    """``export`` of the folder ``model``."""

    model: Path = field(kw_only=True)
    command = "export"
    doing = "exporting"

    def words(self) -> list[str]:
        command, name, *flags = super().words()
        return [command, name, str(self.model), *flags]

    def run(self, tools: Tools) -> tuple[str, ...]:
        return export(self.model, output=self.output, **self.settings).notes
