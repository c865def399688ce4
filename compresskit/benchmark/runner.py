"""``bench``: run every cell of a grid that has no result yet, time all models together, write the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from compresskit.benchmark import exports
from compresskit.benchmark.closing import close
from compresskit.benchmark.grid import Grid, load_grid
from compresskit.benchmark.records import Record
from compresskit.benchmark.report.render import render
from compresskit.benchmark.rows import is_tuned
from compresskit.benchmark.shared import Shared
from compresskit.benchmark.store import Store
from compresskit.benchmark.todo import Watcher, find_todo, run_all
from compresskit.errors import InputError, unknown
from compresskit.model import checkpoint
from compresskit.model.sentence_vectors import has_sentence_model
from compresskit.validation import validate

Executor = Literal["local", "ray"]


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
            said of tasks that are not among them, and with other ``methods`` its ``method_seeds`` likewise.

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
    grid = _find_grid(recipe, changes)
    exports.check(grid)
    if executor == "ray":
        from compresskit.benchmark import cluster

        needs = cluster.Needs(torch.get_num_threads(), gpus_per_cell)
        cluster.connect(ray_address, needs)
    watch = watcher or Watcher()
    store = Store(Path(output))
    shared = Shared(grid)
    cells = shared.cells()
    found = {cell: store.record(cell) for cell in cells}
    shared.check()
    store.records()  # a damaged record of a cell that is no longer asked for is named too
    store.open(grid, cells, overwrite=overwrite)
    watch.opened(cells, [found[cell] for cell in cells])
    todo = find_todo(cells, store, grid)
    if executor == "ray":
        cluster.run_all(todo, store, shared, watch, needs)
    else:
        run_all(todo, store, shared, watch)
    with store.alone(lambda: watch.says("waiting for the folder")):
        try:
            close(cells, store, shared, watch)
        finally:
            records = render(store)
    return BenchResult(store.folder, records)


def usual_grid(changes: Mapping[str, Any]) -> Grid:
    """The grid that ``changes`` begin with where there is no recipe: without a task the one of vectors, where they name
    a unit, or where all their models are made for vectors of sentences, as the embedded one is.

    Raises:
        InputError: no such model.
    """
    models, unit = tuple(changes.get("models", ())), changes.get("unit")
    if changes.get("tasks"):
        return Grid()
    if unit is None:
        unit = all(has_sentence_model(checkpoint.read(model).folder) for model in models or (None,))
    return Grid.of_vectors(models) if unit else Grid()


def _find_grid(recipe: Grid | str | Path | None, changes: dict[str, Any]) -> Grid:
    given = {name: value for name, value in changes.items() if value is not None}
    start = recipe if isinstance(recipe, Grid) else usual_grid(given) if recipe is None else load_grid(recipe)
    if start.per_task and "tasks" in given:  # what a recipe says of tasks that are not asked for does not matter
        given.setdefault("per_task", {task: start.per_task[task] for task in start.per_task if task in given["tasks"]})
    if start.method_seeds and "methods" in given:
        seeds = {method: own for method, own in start.method_seeds.items() if method in given["methods"]}
        given.setdefault("method_seeds", seeds)
    grid: Grid = validate(Grid, start.model_dump() | given, "bench")
    grid.checked()
    unread = [name for name in ("task", "teacher") if given.get(name)]
    if unread and not any(map(is_tuned, grid.tasks)):
        raise InputError(f"{unread[0]}: are settings of trainings on a task, and none is trained on: leave them out")
    return grid
