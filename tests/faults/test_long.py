"""A grid of 300 cells, a text of 2 GB: memory and file handles stay flat."""

from __future__ import annotations

import gc
import json
import os
import resource
from pathlib import Path

import numpy as np

import compresskit
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.todo import Watcher
from faults.command import finish, start
from faults.conftest import Outcome


class Gauge(Watcher):
    """Resident memory in MB, and open files, after each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int]] = []

    def finished(self, cell: Cell, record: Record) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.seen.append((pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd"))))


def _many_cells(log: Path, arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was loaded before: every training looks for garbage
    model, text, output = arguments
    gauge = Gauge()
    grid = {"methods": ("low-rank", "kronecker"), "ratios": (3,), "seeds": tuple(range(150)), "latency_rounds": 1}
    grid |= {"models": (model,), "text": text, "baselines": ("dense",), "general": {"max_steps": 1, "max_length": 16}}
    found = compresskit.bench(output=output, watcher=gauge, **grid)
    log.write_text(json.dumps({"seen": gauge.seen, "records": len(found.records), "failed": len(found.failed)}))


def test_a_grid_of_300_cells(bench_folder: Path, tmp_path: Path, outcome: Outcome) -> None:
    log = tmp_path / "log"
    process = start(log, bench_folder / "model", bench_folder / "text.txt", tmp_path / "out", target=_many_cells)
    assert finish(process, 3000) == 0, log.read_text()
    found = json.loads(log.read_text())
    assert found["records"] == len(found["seen"]) >= 301  # the dense model has one cell for each seed or one in all
    assert found["failed"] == 0
    memory, handles = map(np.array, zip(*found["seen"], strict=True))
    grown = float(np.median(memory[-50:]) - np.median(memory[50:100]))
    assert grown < 30, memory[::25]
    assert handles[-1] <= handles[50]
    outcome("a grid of 300 cells", f"{grown:+.0f} MB between cells 75 and 275, {handles[-1] - handles[50]:+d} files")


def _long_text(log: Path, arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    student, teacher, *texts = arguments
    peaks = []
    for text in texts:
        compresskit.distill(student, teacher, text=text, max_steps=5, max_length=32)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    log.write_text(json.dumps(peaks))


def test_a_text_of_two_gigabytes(bench_folder: Path, tmp_path: Path, outcome: Outcome) -> None:
    """Against the peak of a text of 20 kB in the same process."""
    block = (bench_folder / "text.txt").read_bytes()
    block *= 1 + (1 << 24) // len(block)
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        while file.tell() < 2e9:
            file.write(block)
    log = tmp_path / "log"
    try:
        models = (bench_folder / "student", bench_folder / "model")
        assert finish(start(log, *models, bench_folder / "text.txt", large, target=_long_text), 600) == 0
    finally:
        large.unlink()
    before, after = json.loads(log.read_text())
    assert after - before < 100
    outcome("a text of 2 GB, 5 steps", f"{after - before:+.0f} MB against a text of 20 kB")
