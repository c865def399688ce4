"""The exports of the closing phase: every finished model in other formats, with its size and its score there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compresskit.benchmark import cells as work
from compresskit.benchmark import finished, quality, scoring
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.records import ExportRecord, Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.errors import InputError
from compresskit.exporting import exported
from compresskit.exporting.format import FORMATS
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.sentence_vectors import bytes_behind
from compresskit.tasks.predicting import Runnable


def check(grid: Grid) -> None:
    """Refuse formats that are unknown, lack their packages or cannot be run. Raises InputError."""
    for form in _with_exact(grid.exports):
        if FORMATS.installed(form).runtime is None:
            raise InputError(f"format {form}: cannot be run in a benchmark")


def wanted(cell: Cell, grid: Grid) -> tuple[str, ...]:
    """The formats of a cell: those of the grid; of the dense model also those that hold the same unrounded; none of
    baselines that cannot be exported.
    """
    if not cell.exported:
        return ()
    return _with_exact(grid.exports) if cell.is_teacher else grid.exports


def _with_exact(forms: Sequence[str]) -> tuple[str, ...]:
    exact = (FORMATS.get(form).exact for form in forms)
    return tuple(dict.fromkeys((*filter(None, exact), *forms)))


def lacks(cell: Cell, record: Record, grid: Grid) -> bool:
    """Whether a finished cell has exports still to be made; one that failed is tried again."""
    made = {form for form, known in record.exports.items() if not known.message}
    return record.status == "finished" and not made.issuperset(wanted(cell, grid))


def export_all(cell: Cell, record: Record, shared: Shared, folder: Path, dense: Path) -> Record:
    """The record with every wanted export, and no other; what is there is kept."""
    made = {}
    for form in wanted(cell, shared.grid):
        known = record.exports.get(form)
        whole = known is not None and not known.message and exported.is_whole(form, folder / form)
        made[form] = known if known is not None and whole else _export(cell, form, shared, folder, dense)
    return record.model_copy(update={"exports": made})


def load(form: str, folder: Path) -> Runnable:
    """An exported model of the cell in ``folder``, ready to run. Raises InputError: its format cannot be run here."""
    run = FORMATS.get(form).load(folder / form)
    if run is None:
        raise InputError(f"format {form}: cannot be run here")
    return run


def _export(cell: Cell, form: str, shared: Shared, folder: Path, dense: Path) -> ExportRecord:
    """One export with its score; why there is none is a result too."""
    try:
        read = finished.read_own(cell, shared, folder, dense).checkpoint
        done = exported.write(read, folder / form, form, overwrite=True)
        found = _score(cell, form, shared, read, folder)
    except Exception as error:  # one export must not stop the others
        return ExportRecord(message=work.reason(error, folder))
    return ExportRecord(
        megabytes=done.record["megabytes"]["exported"] + bytes_behind(read.folder) / 1e6,
        score=found["score"],
        scores=found["scores"],
        versions=done.record["versions"],
    )


def _score(cell: Cell, form: str, shared: Shared, read: Checkpoint, folder: Path) -> dict[str, Any]:
    if cell.task is not None:
        return scoring.on_task(cell, shared, read.model.float().eval(), load(form, folder), folder=read.folder)
    with tempfile.TemporaryDirectory() as temporary:
        encoder: Any = read.model.base_model
        if encoder is not read.model:  # an exported head gives no hidden states: its encoder is written for them
            folder = Path(temporary)
            exported.write(replace(read, model=encoder), folder / form, form)
        run, tokenizer, how = load(form, folder), shared.tokenizer(cell.origin), shared.vectors_of(read.folder)
        return scoring.without_labels(cell, shared, lambda passages: quality.encode_run(run, tokenizer, passages, how))
