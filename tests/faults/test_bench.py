"""Benchmarks that are killed at random moments, and a cell that runs out of memory."""

from __future__ import annotations

import random
import resource
import signal
from pathlib import Path

import pytest
from conftest import BUDGET
from test_bench_processes import table

import compresskit
from compresskit.benchmark.records import Record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.todo import Watcher
from faults.command import Command, finish, start
from faults.conftest import Outcome


@pytest.fixture(scope="session")
def benching(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Two students and the dense model, with the undisturbed table."""
    root = tmp_path_factory.mktemp("bench")
    recipe = root / "grid.yaml"
    general = ", ".join(f"{name}: {value}" for name, value in BUDGET.items())
    recipe.write_text(
        f"version: 1\nmethods: [low-rank, kronecker]\nratios: [3]\nbaselines: [dense]\ngeneral: {{{general}}}\n"
        f"latency_rounds: 1\nmodels: [{bench_folder / 'model'}]\ntext: {bench_folder / 'text.txt'}\n"
    )
    return Command(("bench", "--recipe", recipe, "--threads", 1), root / "calm" / "out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed(
    number: signal.Signals, chance: random.Random, benching: Command, tmp_path: Path, outcome: Outcome
) -> None:
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    benching.disturb(output, number, chance.random())
    assert benching.run(output)[0] == 0
    assert table(output) == table(benching.calm)
    assert not list(output.glob("cells/*/work*"))
    for model in output.glob("cells/*/model"):
        assert compresskit.verify(model) == []
    outcome(f"{number.name} while benchmarking", "continued to the undisturbed table")


class Starve(Watcher):
    """One cell gets no more memory than the process has when the cell begins."""

    def started(self, cell: Cell) -> None:
        if cell.method == "kronecker":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))

    def finished(self, cell: Cell, record: Record) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _starved(log: Path, arguments: list[str]) -> None:
    recipe, output = arguments
    import torch

    torch.set_num_threads(1)
    found = compresskit.bench(recipe, output=output, watcher=Starve())
    log.write_text("\n".join(f"{record.method}: {record.status}: {record.message}" for record in found.records))


def test_out_of_memory_in_a_cell(chance: random.Random, benching: Command, tmp_path: Path, outcome: Outcome) -> None:
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    log = tmp_path / "said"
    recipe = benching.arguments[2]
    assert finish(start(log, recipe, output, target=_starved)) == 0, log.read_text()
    said = dict(line.split(": ", 1) for line in log.read_text().splitlines())
    assert said["kronecker"].startswith("failed: "), said
    assert "memory" in said["kronecker"].lower() or "alloc" in said["kronecker"].lower(), said
    assert said["low-rank"] == said["dense"] == "finished: "
    assert benching.run(output)[0] == 0
    assert table(output) == table(benching.calm)
    outcome("out of memory in a cell (rlimit)", "a failed record, the others finished; run again: all finished")
