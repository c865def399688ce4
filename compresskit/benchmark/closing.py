"""The closing phase: all finished models are exported where the grid asks for it, and timed in one go."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from compresskit.benchmark import cells as work
from compresskit.benchmark import exports, finished, latency
from compresskit.benchmark.provenance import digest
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.benchmark.stand_in import timed_folder
from compresskit.benchmark.store import Store
from compresskit.benchmark.todo import Watcher, teachers
from compresskit.errors import InputError, WorkError
from compresskit.tasks.predicting import Runnable
from compresskit.training import taught


def close(cells: Sequence[Cell], store: Store, shared: Shared, watch: Watcher) -> None:
    """Remove what the teachers said, export all finished models where the grid asks for it, and time them in one go,
    unless their records come from one phase already.
    """
    _forget_teachers(cells, store)
    found = {cell: store.record(cell) for cell in cells}
    records = {cell: record for cell, record in found.items() if record is not None and record.status == "finished"}
    lacking = any(exports.lacks(cell, record, shared.grid) for cell, record in records.items())
    if not records or (_timed_together(records.values()) and not lacking):
        return
    taught_by = teachers(cells)
    for place, (cell, record) in enumerate(records.items()):
        records[cell] = exports.export_all(cell, record, shared, store.path(cell), store.path(taught_by[cell]))
        store.write(cell, records[cell])
        if shared.grid.exports:
            watch.progress("exporting", place + 1, len(records))
    if not _timed_together(records.values()):
        with tempfile.TemporaryDirectory() as spare:
            _time_all(records, taught_by, store, shared, watch, Path(spare))


def _forget_teachers(cells: Sequence[Cell], store: Store) -> None:
    """Delete the teachers' kept outputs: no student needs them any more."""
    for cell in cells:
        if (store.path(cell) / work.OUTPUTS).is_dir():
            taught.remove(store.path(cell) / work.OUTPUTS)


def _timed_together(records: Collection[Record]) -> bool:
    """Whether one phase timed all cells and their exports."""
    timed = [record.latency for record in records]
    timed += [export.latency for record in records for export in record.exports.values() if not export.message]
    phases = {latency.phase if latency is not None else None for latency in timed}
    return len(phases) == 1 and None not in phases


def _time_all(
    records: Mapping[Cell, Record],
    taught_by: Mapping[Cell, Cell],
    store: Store,
    shared: Shared,
    watch: Watcher,
    spare: Path,
) -> None:
    """Time all finished models and their exports; ``spare`` takes the stand-ins of models that were deleted."""

    def folder(cell: Cell) -> Path:
        return timed_folder(cell, records[cell], shared, store.path(cell), spare)

    # Equally built models are equally fast: of cells that differ in seed or data alone one is timed.
    builds = {cell: _build(cell, shared) for cell in records}
    timed: dict[str, tuple[Cell, Callable[[], Runnable]]] = {}
    for cell, record in records.items():
        if builds[cell] not in timed:
            folders = (folder(cell), folder(taught_by[cell]))
            timed[builds[cell]] = (cell, partial(finished.read_model, cell, shared, *folders))
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
        compared[build] = builds[taught_by[cell]]
        watch.progress("measuring memory", place + 1, len(timed))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    phase = digest([now, sorted(cell.key for cell in records)])[:12]
    timings = latency.time_models(models, compared, phase, shared.grid.latency_rounds, watch.progress)
    figures = {name: {"latency": timings[name], "peak_memory": memory[name]} for name in timings}
    for cell, record in records.items():
        build = builds[cell]
        made = {
            form: export if export.message else export.model_copy(update=figures[f"{build} {form}"])
            for form, export in record.exports.items()
        }
        store.write(cell, record.model_copy(update={**figures[build], "exports": made}))


def _build(cell: Cell, shared: Shared) -> str:
    """What decides how a cell's model is built."""
    head = shared.task(cell.task)[0].kind if cell.tuned and cell.task is not None else ""
    recipe = cell.recipe.model_dump(mode="json") if cell.recipe is not None else None
    grid = shared.grid.of(cell.task, cell.variant)
    of_teacher = [cell.task_name] if grid.students_from == "teacher" else []  # its statistics choose shapes
    return digest([cell.origin, cell.method, recipe, cell.ratio, head, *of_teacher])
