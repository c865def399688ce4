"""Faults that are really caused. ``FAULT_TIMES`` says how often each is (5 in ``make test-faults``, else 1, with one
signal per command); a table at the end says what came of them.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import same

import compresskit
from faults.command import Command

TIMES = int(os.environ.get("FAULT_TIMES", "1"))

#: Minutes: `make test-faults` alone runs them.
collect_ignore = ["test_bench.py", "test_long.py"] if TIMES == 1 else []

_outcomes: dict[str, list[str]] = {}

Outcome = Callable[[str, str], None]


@pytest.fixture(scope="session")
def outcome() -> Outcome:
    """Notes what a fault ended in, for the table."""

    def note(fault: str, what: str) -> None:
        _outcomes.setdefault(fault, []).append(what)

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _outcomes:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | times caused | outcome |\n| --- | --- | --- |")
    for fault, found in _outcomes.items():
        kinds = ", ".join(f"{found.count(kind)} x {kind}" for kind in dict.fromkeys(found))
        terminalreporter.write_line(f"| {fault} | {len(found)} | {kinds} |")


@pytest.fixture(params=range(TIMES))
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Randomness whose seed is printed where a test fails."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def compressing(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """``compress``, with its undisturbed result."""
    folder = tmp_path_factory.mktemp("compress")
    arguments = ("compress", "--model", bench_folder / "model", "--method", "low-rank", "--ratio", 3, "--threads", 1)
    return Command(arguments, folder / "calm")


@pytest.fixture(scope="session")
def distilling(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """``distill`` with a checkpoint every 5 of its 60 steps, with its undisturbed result."""
    folder = tmp_path_factory.mktemp("distill")
    models = ("--student", bench_folder / "student", "--teacher", bench_folder / "teacher")
    data = ("--task", "sst2", "--data", bench_folder / "data", "--max-length", 32)
    settings = ("--max-steps", 60, "--save-every", 5, "--device", "cpu", "--threads", 1, "--dropout", 0.1)
    return Command(("distill", *models, *data, *settings), folder / "calm", working=".checkpoints")


@contextmanager
def tmpfs(place: Path, size: str) -> Iterator[Path]:
    """A small file system of its own; skips where this user may not mount one."""
    place.mkdir()
    answer = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if answer.returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", place], check=True, capture_output=True)


def check(output: Path, calm: Path) -> None:
    """The undisturbed result, bit for bit, and nothing in it that its record does not say."""
    assert same(output, calm)
    if (output / "compression.json").exists():
        assert compresskit.verify(output) == []
