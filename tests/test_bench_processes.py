"""Benchmarks that are killed, interrupted or shared by processes."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_bench
from faults.command import finish, start
from filelock import FileLock

from compresskit.benchmark.records import RECORD
from compresskit.benchmark.store import Store
from compresskit.benchmark.todo import Watcher

MEASURED = ("latency", "speedup", "peak_memory", "seconds")


def table(folder: Path) -> list[dict[str, str]]:
    """The table without what is measured by a clock."""
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in csv.DictReader(file)]


@pytest.mark.sweep  # tests/faults kills at chosen moments; this one at many
def test_killed_at_a_random_moment_gives_the_same_table(bench_folder: Path, tmp_path: Path) -> None:
    stage = {"max_length": 32, "max_steps": 250}  # a checkpoint is saved every 100 steps
    grid: dict[str, Any] = {"version": 1, "methods": ["low-rank"], "ratios": [3], "baselines": ["dense"]}
    grid |= {"general": stage, "latency_rounds": 1}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    flags = ["--model", str(bench_folder / "model"), "--text", str(bench_folder / "text.txt"), "--threads", "1"]
    line = ["bench", "--recipe", tmp_path / "grid.yaml", *flags, "--output"]
    log = tmp_path / "log"
    assert finish(start(log, *line, tmp_path / "calm")) == 0, log.read_text()
    saved = [f"model.checkpoints/checkpoint-{step}" for step in (100, 200)]
    moment = random.choice(["work", "model.checkpoints", *saved, "model", RECORD])
    process = start(log, *line, tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob(f"cells/*low-rank*/{moment}")) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert finish(process) == -signal.SIGKILL, moment
    assert finish(start(log, *line, tmp_path / "killed")) == 0, log.read_text()
    assert table(tmp_path / "killed") == table(tmp_path / "calm"), moment
    assert not list((tmp_path / "killed").glob("cells/*/work*"))


@pytest.mark.sweep  # the locks that it rests on are tested below
def test_two_runs_share_a_folder(bench_folder: Path, tmp_path: Path) -> None:
    stage = {"max_length": 32, "max_steps": 30}
    grid: dict[str, Any] = {"version": 1, "methods": ["low-rank"], "ratios": [2, 3], "general": stage}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid | {"baselines": ["dense"], "latency_rounds": 1}))
    flags = ["--model", str(bench_folder / "model"), "--text", str(bench_folder / "text.txt"), "--threads", "1"]
    line = ["bench", "--recipe", tmp_path / "grid.yaml", *flags, "--output", tmp_path / "out"]
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    processes = [start(log, *line) for log in logs]
    codes = [finish(process) for process in processes]
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    # A line "[n/3] cell: result (seconds)" for what a process computed itself: every cell once.
    computed = [part for text in said for part in text.splitlines() if part.startswith("[")]
    assert len(computed) == 3, said
    assert len(table(tmp_path / "out")) == 3


def test_locked_cells_are_waited_for(bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny_bench(bench_folder, tmp_path / "out")
    store = Store(result.folder)
    said: list[str] = []

    class Listener(Watcher):
        def says(self, what: str) -> None:
            said.append(what)

    (record,) = (r for r in result.records if r.method == "low-rank")
    (folder,) = store.folder.glob("cells/*low-rank*")
    (folder / RECORD).rename(tmp_path / "kept.json")
    lock = FileLock(folder / ".lock")
    lock.acquire()

    def other_process_finishes(_seconds: float) -> None:
        (tmp_path / "kept.json").rename(folder / RECORD)
        lock.release()

    monkeypatch.setattr("compresskit.benchmark.todo.time.sleep", other_process_finishes)
    again = tiny_bench(bench_folder, tmp_path / "out", watcher=Listener())
    assert "waiting for another process" in said
    assert record.score == next(r.score for r in again.records if r.method == "low-rank")


def test_interrupt_says_how_to_continue(bench_folder: Path, tmp_path: Path) -> None:
    grid = {"version": 1, "ratios": [3], "baselines": ["dense"], "general": {"max_length": 32, "max_steps": 5000}}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    line = ["bench", "--recipe", tmp_path / "grid.yaml", "--output", tmp_path / "out"]
    line += ["--model", bench_folder / "model", "--text", bench_folder / "text.txt", "--threads", "1"]
    process = start(tmp_path / "log", *line)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/cells/*/model.checkpoints")) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.is_alive(), (tmp_path / "log").read_text()
    os.kill(process.pid, signal.SIGINT)
    code, said = finish(process), (tmp_path / "log").read_text()
    assert code == 130, said
    assert "Finished cells are kept: the same command continues." in said
    assert "Traceback" not in said
