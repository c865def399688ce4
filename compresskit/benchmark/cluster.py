"""The cells of a benchmark spread over an existing Ray cluster whose machines share the output folder."""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compresskit.benchmark.grid import Grid
from compresskit.benchmark.machine import versions
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.benchmark.store import Store
from compresskit.benchmark.todo import PATIENCE, Todo, Watcher, failure, settle
from compresskit.errors import InputError, WorkError, one_line

#: How often a cell whose worker died is continued elsewhere.
RETRIES = 3
#: Seconds in which the cluster's port must answer.
_CONNECT = 4.0


@dataclass(frozen=True)
class Needs:
    """What a cell takes of a node: ``cpus`` CPUs, as many as it has threads, and ``gpus`` GPUs (or a share of one)."""

    cpus: int
    gpus: float = 0.0


def connect(address: str | None, needs: Needs) -> None:
    """Join the cluster.

    Args:
        address: ``host:port`` or ``ray://host:port``; None: the one that ``ray start`` left on this machine.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or no node has what a cell needs.
    """
    if find_spec("ray") is None:
        raise InputError("executor ray: ray is missing; install the extra 'ray' (compresskit[ray])")
    import ray

    try:
        if address is not None:  # Ray itself tries for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT).close()
        ray.init(address or "auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        where = address or "on this machine"
        raise InputError(
            f"executor ray: no cluster {where} ({one_line(error)}); start one with `ray start --head`, or give "
            "--ray-address"
        ) from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= needs.cpus and node.get("GPU", 0) >= needs.gpus for node in nodes):
        ray.shutdown()
        have = "; ".join(sorted({f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes}))
        raise InputError(
            f"executor ray: a cell needs {needs.cpus} CPUs (--threads) and {needs.gpus:g} GPUs, which no node of the "
            f"cluster has ({have})"
        )


def run_all(todo: Todo, store: Store, shared: Shared, watch: Watcher, needs: Needs) -> None:
    """Every cell without a result, as many at a time as the cluster has room for; students once their teacher is there.

    A worker that dies costs what its cell did since its last checkpoint: the cell continues elsewhere. A cell whose
    workers keep dying is a failed record.

    Raises:
        WorkError: a node does not see the folder, or has other versions.
    """
    import ray

    task = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=RETRIES)(work_on_node)
    places = (shared.grid, Path.cwd(), store.folder.resolve(), versions(), needs.cpus)
    running: dict[Any, Cell] = {}
    done: set[Cell] = set()
    waiting = list(todo.teachers)
    try:
        while waiting or running:
            for cell in list(waiting):
                # Of cells that share a stage 1 one works at a time: another would hold its CPUs only to wait.
                taken = {other.start for other in running.values() if other.start}
                if todo.teachers[cell] in (cell, *done) and cell.start not in taken:
                    waiting.remove(cell)
                    watch.started(cell)
                    running[task.remote(cell, todo, *places)] = cell
            watch.says(f"cluster: {len(running)} cells run or are queued, {len(waiting)} wait for others")
            for answer in ray.wait(list(running))[0]:
                cell = running.pop(answer)
                try:
                    record = ray.get(answer)
                except ray.exceptions.RayTaskError as error:
                    raise WorkError(f"executor ray: {one_line(error.cause)}") from error
                except ray.exceptions.RayError as error:
                    words = f"its worker died {RETRIES + 1} times: {one_line(error)}"
                    record = failure(cell, words, store, shared)
                done.add(cell)
                watch.finished(cell, record)
    finally:
        for answer in running:
            ray.cancel(answer, force=True)


def work_on_node(
    cell: Cell, todo: Todo, grid: Grid, place: Path, folder: Path, theirs: dict[str, str], threads: int
) -> Record:
    """On a node: the cell's record, computed unless it is there."""
    if not (place.is_dir() and folder.is_dir()):
        raise WorkError(f"{platform.node()} does not see {folder if place.is_dir() else place}; nodes must share it")
    os.chdir(place)
    if versions() != theirs:
        other = ", ".join(f"{name} {number}" for name, number in versions().items() if theirs.get(name) != number)
        raise WorkError(f"{platform.node()} has other versions: {other}")
    torch.set_num_threads(threads)
    store, shared = Store(folder), _shared(grid.model_dump_json())
    while (record := settle(cell, todo, store, shared, Watcher())) is None:
        time.sleep(PATIENCE)
    return record


@cache
def _shared(grid: str) -> Shared:
    """Read once by every worker process, which makes many cells."""
    return Shared(Grid.model_validate_json(grid))
