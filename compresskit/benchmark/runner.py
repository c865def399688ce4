"""``bench``: run every cell of a grid that has no result yet, time all models together, write the report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import TrainerCallback

from compresskit.benchmark import cells as work
from compresskit.benchmark import exports, latency
from compresskit.benchmark.grid import Cell, Grid, load_grid
from compresskit.benchmark.records import Record, digest
from compresskit.benchmark.report.render import render
from compresskit.benchmark.sources import Sources
from compresskit.benchmark.stand_in import timed_folder
from compresskit.benchmark.store import Store
from compresskit.errors import InputError, WorkError, unknown
from compresskit.tasks.predicting import Runnable
from compresskit.training import taught
from compresskit.validation import validate

Executor = Literal["local", "ray"]
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
class BenchResult:
    """What a benchmark made.

    Attributes:
        folder: with README.md, results.csv, index.html, ...
        records: one per cell.
    """

    folder: Path
    records: tuple[Record, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """Cells that failed, or of which an export did, each with its message."""
        return tuple(r for r in self.records if r.status == "failed" or any(e.message for e in r.exports.values()))


def bench(
    recipe: Grid | str | Path | None = None,
    *,
    output: str | Path,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    executor: Executor = "local",
    ray_address: str | None = None,
    gpus_per_cell: float = 0.0,
    **changes: Any,
) -> BenchResult:
    """Compare methods across ratios at equal parameters and equal training budget.

    Finished cells are skipped, a killed one continues, a failed one is tried again. Processes may share a folder.

    Args:
        recipe: a bench recipe: short name, YAML file or :class:`Grid`. Default: the default grid.
        output: folder for records, models and report.
        overwrite: remove cells of other configurations from it.
        watcher: is told what happens.
        executor: ``local``: cells one after the other here. ``ray``: spread over a Ray cluster whose nodes share the
            output folder, the current folder and the packages' versions; each takes as many CPUs as torch has threads
            here. The closing phase runs here.
        ray_address: of the cluster. Default: the one that runs on this machine.
        gpus_per_cell: that a cell takes of its node, also a share; on a cluster only.
        changes: fields of :class:`Grid` that replace the recipe's. With other ``tasks``, its ``per_task`` loses what is
            said of tasks that are not among them.

    Raises:
        InputError: refused before any cell runs: bad grid, model, data or folder; a damaged record.

    Example (two cells and two baselines, a minute)::

        result = compresskit.bench(methods=("low-rank", "kronecker"), ratios=(8,), output="reports/local/first")
        print((result.folder / "README.md").read_text())
    """
    if executor not in get_args(Executor):
        raise unknown("executor", executor, get_args(Executor))
    if executor != "ray" and (ray_address is not None or gpus_per_cell):
        raise InputError("a Ray address or GPUs per cell are for the executor ray")
    start = recipe if isinstance(recipe, Grid) else Grid() if recipe is None else load_grid(recipe)
    given = {name: value for name, value in changes.items() if value is not None}
    if start.per_task and "tasks" in given:  # what a recipe says of tasks that are not asked for does not matter
        given.setdefault("per_task", {task: start.per_task[task] for task in start.per_task if task in given["tasks"]})
    grid: Grid = validate(Grid, start.model_dump() | given, "bench").checked()
    exports.check(grid)
    if executor == "ray":
        from compresskit.benchmark import cluster

        needs = cluster.Needs(torch.get_num_threads(), gpus_per_cell)
        cluster.connect(ray_address, needs)
    watch = watcher or Watcher()
    store = Store(Path(output))
    sources = Sources(grid)
    cells = sources.cells()
    found = {cell: store.record(cell) for cell in cells}
    sources.check()
    store.records()  # a damaged record of a cell that is no longer asked for is named too
    store.open(grid, cells, overwrite=overwrite)
    watch.opened(cells, [found[cell] for cell in cells])
    todo = _todo(cells, store, grid)
    if executor == "ray":
        cluster.run_all(todo, store, sources, watch, needs)
    else:
        _run_all(todo, store, sources, watch)
    with store.alone(lambda: watch.says("waiting for the folder")):
        try:
            _close(cells, store, sources, watch)
        finally:
            records = render(store)
    return BenchResult(store.folder, records)


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


def _todo(cells: Sequence[Cell], store: Store, grid: Grid) -> Todo:
    records = {cell: store.record(cell) for cell in cells}
    failed = frozenset(cell.key for cell, record in records.items() if record is not None and record.status == "failed")
    again = bool(grid.exports) and any(
        record is None or exports.lacks(cell, record, grid) for cell, record in records.items()
    )
    dense = _dense_cells(cells)
    return Todo({cell: dense[cell.origin, cell.task] for cell in cells}, failed, again)


def _run_all(todo: Todo, store: Store, sources: Sources, watch: Watcher) -> None:
    """Every cell without a result, in order; those that another process works on are waited for."""
    waiting = list(todo.teachers)
    while waiting:
        busy = []
        for cell in waiting:
            record = None if todo.teachers[cell] in busy else settle(cell, todo, store, sources, watch)
            if record is None:
                busy.append(cell)
            else:
                watch.finished(cell, record)
        if len(busy) == len(waiting):
            watch.says("waiting for another process")
            time.sleep(PATIENCE)
        waiting = busy


def settle(cell: Cell, todo: Todo, store: Store, sources: Sources, watch: Watcher) -> Record | None:
    """The record of a cell, computed unless it is there; None while another process works on it."""
    teacher = next(other for own, other in todo.teachers.items() if own.key == cell.key)
    with store.lock(cell) as mine:
        if not mine:
            return None
        record = store.record(cell)
        retry = record is not None and record.status == "failed" and cell.key in todo.failed
        if record is None or retry or (todo.again and not work.has_model(cell, record, store.path(cell))):
            watch.started(cell)
            folders = store.path(cell), store.path(teacher), store.start(cell)
            shop = work.Workshop(cell, sources, *folders, watch.callbacks, watch.says)
            known = store.record(teacher)
            if cell.key != teacher.key and known is not None and known.status != "finished":
                record = shop.failure(f"its teacher failed: {known.message}")
            else:
                record = shop.run()
            store.write(cell, record)
        if record.status != "failed":
            work.clear(store.path(cell))
    return record


def failure(cell: Cell, message: str, store: Store, sources: Sources) -> Record:
    """Keep a record of a cell that could not be made."""
    record = work.Workshop(cell, sources, store.path(cell), store.path(cell)).failure(message)
    store.write(cell, record)
    return record


def _dense_cells(cells: Sequence[Cell]) -> dict[tuple[str | None, str | None], Cell]:
    return {(cell.origin, cell.task): cell for cell in cells if cell.recipe is None and cell.method == "dense"}


def _close(cells: Sequence[Cell], store: Store, sources: Sources, watch: Watcher) -> None:
    """The closing phase: export all finished models where the grid asks for it, and time them in one go, unless their
    records come from one phase already.
    """
    for cell in cells:
        if (store.path(cell) / work.OUTPUTS).is_dir():
            taught.remove(store.path(cell) / work.OUTPUTS)
    found = {cell: store.record(cell) for cell in cells}
    records = {cell: record for cell, record in found.items() if record is not None and record.status == "finished"}
    lacking = any(exports.lacks(cell, record, sources.grid) for cell, record in records.items())
    if not records or (_timed_together(records.values()) and not lacking):
        return
    dense = _dense_cells(cells)
    teachers = {cell: dense[cell.origin, cell.task] for cell in records}
    for place, (cell, record) in enumerate(records.items()):
        records[cell] = exports.export_all(cell, record, sources, store.path(cell), store.path(teachers[cell]))
        store.write(cell, records[cell])
        if sources.grid.exports:
            watch.progress("exporting", place + 1, len(records))
    if not _timed_together(records.values()):
        with tempfile.TemporaryDirectory() as spare:
            _time_all(records, teachers, store, sources, watch, Path(spare))


def _timed_together(records: Collection[Record]) -> bool:
    """Whether one phase timed all cells and their exports."""
    timed = [record.latency for record in records]
    timed += [export.latency for record in records for export in record.exports.values() if not export.message]
    phases = {latency.phase if latency is not None else None for latency in timed}
    return len(phases) == 1 and None not in phases


def _time_all(
    records: Mapping[Cell, Record],
    teachers: Mapping[Cell, Cell],
    store: Store,
    sources: Sources,
    watch: Watcher,
    spare: Path,
) -> None:
    """Time all finished models and their exports; ``spare`` takes the stand-ins of models that were deleted."""

    def folder(cell: Cell) -> Path:
        return timed_folder(cell, records[cell], sources, store.path(cell), spare)

    # Equally built models are equally fast: of cells that differ in seed or data alone one is timed.
    builds = {cell: _build(cell, sources) for cell in records}
    timed: dict[str, tuple[Cell, Callable[[], Runnable]]] = {}
    for cell, record in records.items():
        if builds[cell] not in timed:
            folders = (folder(cell), folder(teachers[cell]))
            timed[builds[cell]] = (cell, partial(work.read_model, cell, sources, *folders))
        for form, export in record.exports.items():
            if not export.message:
                load = partial(exports.load, form, store.path(cell))
                timed.setdefault(f"{builds[cell]} {form}", (cell, load))
    models: dict[str, Runnable] = {}
    memory: dict[str, float | None] = {}
    compared: dict[str, str] = {}
    for place, (build, (cell, read)) in enumerate(timed.items()):
        try:
            models[build], memory[build] = latency.load_and_measure(read)
        except InputError as error:
            raise WorkError(f"{cell} cannot be timed: {error}") from None
        compared[build] = builds[teachers[cell]]
        watch.progress("measuring memory", place + 1, len(timed))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    phase = digest([now, sorted(cell.key for cell in records)])[:12]
    timings = latency.time_models(models, compared, phase, sources.grid.latency_rounds, watch.progress)
    figures = {name: {"latency": timings[name], "peak_memory": memory[name]} for name in timings}
    for cell, record in records.items():
        build = builds[cell]
        made = {
            form: export if export.message else export.model_copy(update=figures[f"{build} {form}"])
            for form, export in record.exports.items()
        }
        store.write(cell, record.model_copy(update={**figures[build], "exports": made}))


def _build(cell: Cell, sources: Sources) -> str:
    """What decides how a cell's model is built."""
    head = sources.task(cell.task)[0].kind if cell.task is not None else ""
    recipe = cell.recipe.model_dump(mode="json") if cell.recipe is not None else None
    of_teacher = [cell.task_name] if sources.grid.students_from == "teacher" else []  # its statistics choose shapes
    return digest([cell.origin, cell.method, recipe, cell.ratio, head, *of_teacher])
