"""The models of finished cells, and where they lie."""

from __future__ import annotations

from pathlib import Path

from compresskit.benchmark import scoring
from compresskit.benchmark.baselines.base import Asked, Made
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.calibration.statistics import Calibration
from compresskit.data.corpus import Part
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.tasks.predicting import Runnable

#: In a cell's folder: the model that was scored.
MODEL = "model"


def has_model(cell: Cell, record: Record, folder: Path) -> bool:
    """Whether the model of a finished cell is still there, where it has one of its own."""
    return not cell.keeps_model or record.status != "finished" or (folder / MODEL).is_dir()


def read_dense(cell: Cell, shared: Shared, dense: Path) -> Checkpoint:
    """The dense model that the cell is compared with: the task's teacher, or the pre-trained checkpoint itself."""
    return checkpoints.read(dense / MODEL) if cell.tuned else shared.read_dense(cell.origin)


def statistics(
    cell: Cell, shared: Shared, dense: Path, tokens: int, *, weigh: bool = False
) -> tuple[Calibration, float]:
    """What the matrices of the model see from which a student of the cell is made, on the text that it learns from or,
    where it is made from the task's teacher, on the task's rows; and the seconds that reading took.

    Args:
        dense: folder of the dense cell of the same model and task.
        weigh: also find how much predictions depend on each matrix.
    """
    if shared.grid.of(cell.task, cell.variant).students_from == "checkpoint":
        return shared.statistics(cell.origin, training_part(cell), tokens)
    assert cell.task is not None
    return shared.task_statistics(cell.origin, cell.task, dense / MODEL, tokens, weigh)


def training_part(cell: Cell) -> Part:
    """Of the general text, what a student may see."""
    return "all" if cell.task is not None else "training"


def asked(cell: Cell, shared: Shared, folder: Path, dense: Path | None = None) -> Asked:
    """What the cell's baseline is asked for.

    Args:
        folder: of the cell.
        dense: as of :func:`statistics`; None where shapes alone count.
    """
    found = cell.asked._replace(folder=folder, text=shared.corpus("training"))
    if dense is not None:
        found = found._replace(statistics=lambda tokens: statistics(cell, shared, dense, tokens)[0])
    if cell.task is None:
        return found
    length = scoring.trained_length(cell, shared) if cell.tuned else 0
    return found._replace(rows=shared.task(cell.task)[1], max_length=length)


def read_own(cell: Cell, shared: Shared, folder: Path, dense: Path) -> Made:
    """The model of a finished cell: its own, or what its baseline makes of the dense one."""
    if cell.learns:
        return Made(checkpoints.read(folder / MODEL, compressed=None))
    assert cell.rival is not None
    return cell.rival.make(read_dense(cell, shared, dense), asked(cell, shared, folder, dense))


def read_model(cell: Cell, shared: Shared, folder: Path, dense: Path) -> Runnable:
    """The model of a finished cell, for timing."""
    made = read_own(cell, shared, folder, dense)
    return made.checkpoint.model.float().eval() if made.run is None else made.run
