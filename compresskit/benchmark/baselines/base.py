"""What a baseline owes: a row of a benchmark's table whose model no method of factorising made.

One file per baseline answers the interface :class:`Baseline`; training, scoring, exporting, timing and the report then
work for it without a change elsewhere. A grid names it ``NAME``, or ``NAME:ARGUMENT`` where it takes an argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedModel, TrainerCallback

from compresskit.benchmark.provenance import MadeBy
from compresskit.calibration.statistics import Calibration
from compresskit.data.corpus import Corpus
from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint, weight_files
from compresskit.model.targets import count_parameters
from compresskit.tasks.predicting import Runnable
from compresskit.tasks.rows import TaskData

#: The dense model itself: of a task its fine-tuned teacher, which every other row is compared with.
DENSE = "dense"


class Asked(NamedTuple):
    """What a grid asks of a baseline.

    Attributes:
        argument: what stands behind the colon; empty where the baseline takes none.
        ratio: dense parameters / parameters; None where the baseline has no ratios.
        rows: of the task; None without one.
        max_length: tokens of a sequence of the task.
        text: general text that no score is taken on.
        folder: the cell's own, where a baseline that is not trained may keep files, in a folder of its own in it.
        statistics: reads about so many tokens of the text that students learn from, or of the task, with the model that
            the baseline gets, and says what its matrices see; None where nobody asks for what matters in it.
    """

    argument: str = ""
    ratio: float | None = None
    rows: TaskData | None = None
    max_length: int = 0
    folder: Path = Path()
    text: Corpus | None = None
    statistics: Callable[[int], Calibration] | None = None


@dataclass(frozen=True)
class Made:
    """What a baseline made of the dense model.

    Attributes:
        checkpoint: the model, in the dense one's class, and the folder whose tokenizer and other files belong to it.
        made_by: fields of :class:`compresskit.benchmark.provenance.MadeBy` that the baseline adds to the record:
            ``layers``, ``calibration``, or ``facts`` for anything else.
        run: what is scored and timed in the place of the checkpoint's model, such as an exported graph; None: the
            model itself. It runs on the CPU. Without a task it gives ``last_hidden_state``.
    """

    checkpoint: Checkpoint
    made_by: Mapping[str, Any] = field(default_factory=dict)
    run: Runnable | None = None


class Baseline(ABC):
    """One kind of row. Only ``name``, ``summary`` and :meth:`make` must be given; everything else has an answer that
    suits a plain model in its own class.

    Attributes:
        name: what a grid calls it.
        summary: one line for lists.
        argument: what stands behind the colon, for messages, e.g. ``HUB_ID``; empty: it takes no argument.
        rated: whether it has one row for each ratio of the grid, as methods have; otherwise one of its own size.
        trained: whether its model learns on the students' budget. Then it has one row per seed and its model is kept
            in a folder. Otherwise it is made anew from the dense model whenever it is needed, always the same.
        own_tokenizer: whether its texts are cut into tokens by the tokenizer that lies with its own checkpoint. It
            then needs a task, has no exports, and where it is trained learns the task from its labels, as the teacher
            did: what the teacher makes of other tokens says nothing to it.
        pace: of its training: its learning rate, where the students' is 1. Dense matrices take smaller steps than
            factors.
        exported: whether its model may be exported where the grid asks for exports.
        cpu_only: whether its model runs on CPUs alone.
        packages: distributions, as pip names them, that it needs beyond those of compresskit itself. Their versions are
            part of the record, and of what decides a result.
        extra: the extra of the baseline's own distribution that brings these packages; empty: there is none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    argument: ClassVar[str] = ""
    rated: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    own_tokenizer: ClassVar[bool] = False
    pace: ClassVar[float] = 1.0
    exported: ClassVar[bool] = True
    cpu_only: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    def check(self, argument: str) -> None:
        """Refuse an argument, before any cell runs. Raises InputError."""
        if self.argument and not argument:
            raise InputError(f"baseline {self.name}: give {self.name}:{self.argument}")
        if argument and not self.argument:
            raise InputError(f"baseline {self.name}:{argument}: takes no argument; give {self.name}")

    def content(self, argument: str) -> Mapping[str, str]:
        """Hashes of what its model is made of beside the dense one: name -> SHA-256. Results are found again by them.

        Raises:
            InputError: it cannot be read; no cell runs then.
        """
        return {}

    @abstractmethod
    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The baseline's model from a freshly read dense one, which may be changed. This is what is timed as the
        seconds of compressing.

        Raises:
            UnreachableError: this model cannot be made smaller this way; the row says so.
        """

    def counted(self, dense: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
        """The model whose parameters and FLOPs are the row's: ``dense`` where they are the same but cannot be counted
        in ``model``.
        """
        return model

    def parameters(self, dense: PreTrainedModel, model: PreTrainedModel) -> int:
        """The parameters that are the row's."""
        return count_parameters(self.counted(dense, model))

    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """What its training calls beside what every training calls."""
        return ()

    def megabytes(self, made: Checkpoint) -> float:
        """10^6 bytes of the model; of its weight files, unless it has another way of lying on a disk. Layers behind an
        encoder of sentence vectors are not among them: the benchmark adds those of every row.
        """
        return megabytes(made)

    def stand_in(self, dense: Checkpoint, asked: Asked, made_by: MadeBy) -> Checkpoint:
        """A model built like the trained one, with any weights: it is timed where the trained one was deleted."""
        return self.make(dense, asked).checkpoint

    def fact(self, model: str, made_by: MadeBy) -> str:
        """What the report says of it below the tables, ``model`` being the dense one's name; empty: nothing."""
        return ""


def megabytes(made: Checkpoint) -> float:
    """10^6 bytes of the weight files in a checkpoint's folder, without those of layers behind its encoder."""
    assert made.folder is not None
    return sum(file.stat().st_size for file in weight_files(made.folder)) / 1e6
