"""The cells of a run: what is left to do, and one of them settled, here or on a node of a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import TrainerCallback

from compresskit.benchmark import cells as work
from compresskit.benchmark import exports, finished
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.benchmark.store import Store

#: Seconds between two looks at a cell that another process works on.
PATIENCE = 1.0


@dataclass
class Watcher:
    """Is told what happens; the command line draws it."""

    callbacks: tuple[TrainerCallback, ...] = field(default=())

    def opened(self, cells: Sequence[Cell], records: Sequence[Record | None]) -> None:
        """The grid with what is finished already."""

    def started(self, cell: Cell) -> None:
        """Work on a cell begins."""

    def says(self, what: str) -> None:
        """What is done now."""

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell has its record."""

    def progress(self, what: str, done: int, total: int) -> None:
        """In the closing phase."""


@dataclass(frozen=True)
class Todo:
    """The cells of a run.

    Attributes:
        teachers: every cell with the dense one of its model and task, in order.
        failed: keys of cells that failed in an earlier run: they are tried again.
        again: whether models that were deleted to save room are made again: they are exported. (For timing alone a
            stand-in of the same build will do.)
    """

    teachers: dict[Cell, Cell]
    failed: frozenset[str]
    again: bool


def find_todo(cells: Sequence[Cell], store: Store, grid: Grid) -> Todo:
    """What a run has to do for these cells."""
    records = {cell: store.record(cell) for cell in cells}
    failed = frozenset(cell.key for cell, record in records.items() if record is not None and record.status == "failed")
    again = bool(grid.exports) and any(
        record is None or exports.lacks(cell, record, grid) for cell, record in records.items()
    )
    return Todo(teachers(cells), failed, again)


def run_all(todo: Todo, store: Store, shared: Shared, watch: Watcher) -> None:
    """Every cell without a result, in order; those that another process works on are waited for."""
    waiting = list(todo.teachers)
    while waiting:
        busy = []
        for cell in waiting:
            record = None if todo.teachers[cell] in busy else settle(cell, todo, store, shared, watch)
            if record is None:
                busy.append(cell)
            else:
                watch.finished(cell, record)
        if len(busy) == len(waiting):
            watch.says("waiting for another process")
            time.sleep(PATIENCE)
        waiting = busy


def settle(cell: Cell, todo: Todo, store: Store, shared: Shared, watch: Watcher) -> Record | None:
    """The record of a cell, computed unless it is there; None while another process works on it."""
    teacher = todo.teachers[cell]
    with store.lock(cell) as mine:
        if not mine:
            return None
        record = store.record(cell)
        retry = record is not None and record.status == "failed" and cell.key in todo.failed
        if record is None or retry or (todo.again and not finished.has_model(cell, record, store.path(cell))):
            watch.started(cell)
            folders = store.path(cell), store.path(teacher), store.start(cell)
            shop = work.Workshop(cell, shared, *folders, watch.callbacks, watch.says)
            known = store.record(teacher)
            if cell != teacher and known is not None and known.status != "finished":
                record = shop.failure(f"its teacher failed: {known.message}")
            else:
                record = shop.run()
            store.write(cell, record)
        if record.status != "failed":
            work.clear(store.path(cell))
    return record


def failure(cell: Cell, message: str, store: Store, shared: Shared) -> Record:
    """Keep a record of a cell that could not be made."""
    record = work.Workshop(cell, shared, store.path(cell), store.path(cell)).failure(message)
    store.write(cell, record)
    return record


def teachers(cells: Iterable[Cell]) -> dict[Cell, Cell]:
    """Every cell with the dense one of its model and task, in order."""
    cells = list(cells)
    dense = {(cell.origin, cell.task): cell for cell in cells if cell.is_teacher}
    return {cell: dense[cell.origin, cell.task] for cell in cells}
