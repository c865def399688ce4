"""Stand-ins for timing, where a finished cell's model was deleted: speed and memory follow from shapes alone."""

from __future__ import annotations

from pathlib import Path

from compresskit.benchmark import finished
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.sources import ModelWeights
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import Recipe
from compresskit.training.reading import with_new_head


def timed_folder(cell: Cell, record: Record, shared: Shared, folder: Path, spare: Path) -> Path:
    """The cell's folder, or one below ``spare`` with a model built alike, untrained.

    Args:
        record: of the finished cell; it holds the shape of every factor.
        folder: of the cell.
        spare: where stand-ins go; one is made only once.
    """
    if finished.has_model(cell, record, folder):
        return folder
    made = spare / cell.folder
    if not made.exists():
        (made / finished.MODEL).mkdir(parents=True)
        checkpoints.save(_built_alike(cell, record, shared, folder), made / finished.MODEL)
    return made


def _built_alike(cell: Cell, record: Record, shared: Shared, folder: Path) -> Checkpoint:
    dense = shared.read_dense(cell.origin)
    if cell.tuned and cell.task is not None:
        task, data = shared.task(cell.task)
        forget = bool(shared.grid.of(cell.task).teacher.get("new_head"))
        dense = with_new_head(cell.origin, task, data.labels, forget=forget)
    if cell.rival is not None:
        return cell.rival.stand_in(dense, finished.asked(cell, shared, folder), record.made_by)
    shapes = Recipe.model_validate(record.made_by.resolved_recipe)
    apply_plan(dense.model, make_plan(dense.model, shapes, ModelWeights(dense.model)))
    return dense
