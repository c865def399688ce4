"""Benchmarks spread over a Ray cluster. All but the refusals need ray, which the development install leaves out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import Run, refused
from test_bench_processes import table

from compresskit.benchmark import cluster as clusters
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.machine import versions
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.todo import Todo, Watcher
from compresskit.errors import WorkError


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each, processes of this machine."""
    pytest.importorskip("ray", reason="ray is not installed: pip install compresskit[ray]")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


def workers() -> list[psutil.Process]:
    """Worker processes of the cluster that make a cell now."""
    return [process for process in psutil.Process().children(recursive=True) if "ray::_work" in title(process)]


def title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def has_checkpoint(worker: psutil.Process) -> bool:
    """Whether the cell whose lock the worker holds could be continued."""
    locks = [Path(file.path) for file in worker.open_files() if file.path.endswith(".lock")]
    return any(list(lock.parent.glob("model.checkpoints/checkpoint-*")) for lock in locks)


def command(root: Path, grid: Path, output: Path) -> list[str]:
    line = [sys.executable, "-m", "compresskit", "bench", "--recipe", str(grid), "--threads", "1"]
    line += ["--model", str(root / "model"), "--text", str(root / "text.txt")]
    return [*line, "--output", str(output)]


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_and_the_table_is_the_same(
    cluster: str, bench_folder: Path, tmp_path: Path
) -> None:
    grid: dict[str, Any] = {"version": 1, "methods": ["low-rank", "kronecker"], "ratios": [3], "latency_rounds": 1}
    grid |= {"baselines": ["dense"], "general": {"max_length": 32, "max_steps": 1500}}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    here = command(bench_folder, tmp_path / "grid.yaml", tmp_path / "here")
    subprocess.run(here, check=True, capture_output=True)
    line = command(bench_folder, tmp_path / "grid.yaml", Path("spread"))  # relative: workers go where the command is
    line += ["--executor", "ray", "--ray-address", cluster]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 400
    victim = None
    while victim is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        both = workers()
        victim = next(filter(has_checkpoint, both), None) if len(both) == 2 else None  # the two students at once
    victim.send_signal(signal.SIGKILL)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert len([row for row in said.splitlines() if row.startswith("[")]) == 3
    assert table(tmp_path / "spread") == table(tmp_path / "here")


def test_refused_by_a_cluster(cluster: str, run: Run, bench_folder: Path) -> None:
    arguments = ("bench", "--model", bench_folder / "model", "--text", bench_folder / "text.txt", "--output", "out")
    ray = ("--executor", "ray", "--ray-address", cluster)
    refused(run(*arguments, *ray, "--threads", 1, "--gpus-per-cell", 1), "1 GPUs, which no node", "1 CPUs, 0 GPUs")


def test_refused_without_a_cluster(run: Run, bench_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("bench", "--model", bench_folder / "model", "--text", bench_folder / "text.txt", "--output", "out")
    refused(run(*arguments, "--gpus-per-cell", 1), "GPUs per cell are for the executor ray")
    refused(run(*arguments, "--ray-address", "x:1"), "are for the executor ray")
    if clusters.find_spec("ray") is not None:
        for address in ("127.0.0.1:1", "127.0.0.1:99999", "nonsense"):
            refused(run(*arguments, "--executor", "ray", "--ray-address", address), f"no cluster {address}")
    monkeypatch.setattr(clusters, "find_spec", lambda _: None)
    refused(run(*arguments, "--executor", "ray"), "ray is missing; install the extra 'ray'")


def test_nodes_that_cannot_do_it_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: Any = (None, None, Grid())
    with pytest.raises(WorkError, match=r"does not see .*elsewhere; nodes must share it"):
        clusters.work_on_node(*given, tmp_path, tmp_path / "elsewhere", versions(), 1)
    with pytest.raises(WorkError, match=rf"has other versions: torch {re.escape(versions()['torch'])}$"):
        clusters.work_on_node(*given, tmp_path, tmp_path, versions() | {"torch": "1.0"}, 1)


def test_teachers_come_first_and_a_shared_stage_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs together, on a stand-in for Ray that finishes the task that waits longest."""

    def cell(name: str, task: str, start: str = "") -> Cell:
        return Cell(
            "model", None, name, None, None, task, task, 0, f"{name} {task}", start, "dense" if name == "dense" else ""
        )

    teachers = {task: cell("dense", task) for task in ("rte", "cola")}
    students = [cell(name, task, name) for task in teachers for name in ("low-rank", "tucker")]
    todo = Todo({one: teachers[one.task_name] for one in (*teachers.values(), *students)}, frozenset(), False)
    queue: list[Cell] = []
    together: list[set[str]] = []

    def wait(_: list[Cell]) -> tuple[list[Cell], list[Cell]]:
        together.append({one.key for one in queue})
        return [queue.pop(0)], []

    def remote(one: Cell, *_: Any) -> Cell:
        queue.append(one)
        return one

    ray = SimpleNamespace(remote=lambda **_: lambda _: SimpleNamespace(remote=remote), wait=wait, get=lambda one: one)
    monkeypatch.setitem(sys.modules, "ray", ray)
    places: Any = SimpleNamespace(folder=tmp_path), SimpleNamespace(grid=Grid())
    clusters.run_all(todo, *places, Watcher(), clusters.Needs(1))
    assert together == [
        {"dense rte", "dense cola"},
        {"dense cola", "low-rank rte", "tucker rte"},
        {"low-rank rte", "tucker rte"},
        {"tucker rte", "low-rank cola"},
        {"low-rank cola", "tucker cola"},
        {"tucker cola"},
    ]
