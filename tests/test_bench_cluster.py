"""Benchmarks spread over a Ray cluster. All but the refusals need ray, which the development install leaves out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Run, refused
from test_bench_processes import table

from compresskit.benchmark import cluster as clusters


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
    mine = psutil.Process().children(recursive=True)
    return [
        process for process in mine if "_work" in "".join(process.cmdline()) and process.cmdline()[0][:5] == "ray::"
    ]


def command(root: Path, grid: Path, output: Path) -> list[str]:
    line = [sys.executable, "-m", "compresskit", "bench", "--recipe", str(grid), "--threads", "1"]
    line += ["--model", str(root / "model"), "--text", str(root / "text.txt")]
    return [*line, "--output", str(output)]


@pytest.mark.slow
def test_a_killed_worker_costs_its_cell_and_the_table_is_the_same(
    cluster: str, bench_folder: Path, tmp_path: Path
) -> None:
    grid: dict[str, Any] = {"version": 1, "methods": ["low-rank", "kronecker"], "ratios": [3], "latency_rounds": 1}
    grid |= {"baselines": ["dense"], "general": {"max_length": 32, "max_steps": 300}}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    here = command(bench_folder, tmp_path / "grid.yaml", tmp_path / "here")
    subprocess.run(here, check=True, capture_output=True)
    line = command(bench_folder, tmp_path / "grid.yaml", Path("spread"))  # relative: workers go where the command is
    line += ["--executor", "ray", "--ray-address", cluster]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 400
    together = 0
    while not list(tmp_path.glob("spread/cells/*/model.checkpoints/checkpoint-100")) and process.poll() is None:
        assert time.monotonic() < deadline
        together = max(together, len(workers()))
        time.sleep(0.05)
    (saved, *_) = tmp_path.glob("spread/cells/*/model.checkpoints/checkpoint-100")
    open_files = [worker for worker in workers() if any(str(saved.parents[1]) in f.path for f in worker.open_files())]
    (victim,) = open_files  # the one that holds the lock of this cell
    victim.send_signal(signal.SIGKILL)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert together == 2  # the two students at the same time
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
        refused(run(*arguments, "--executor", "ray", "--ray-address", "127.0.0.1:1"), "no cluster 127.0.0.1:1")
    monkeypatch.setattr(clusters, "find_spec", lambda _: None)
    refused(run(*arguments, "--executor", "ray"), "ray is missing; install the extra 'ray'")
