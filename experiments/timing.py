"""What these programs share: timing side by side, and what a report says about the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from compresskit.benchmark.machine import git_state, hardware

_PACKAGES = (
    "torch", "transformers", "scipy", "compresskit", "linear-operator", "opt-einsum", "peft", "pyfastkron", "tensorly",
    "tensorly-torch",
)  # fmt: skip
REPORT = Path(__file__).resolve().parents[1] / "reports" / "speed"


class Time(NamedTuple):
    """Seconds: median over the rounds, and half the interquartile range."""

    median: float
    spread: float


def side_by_side(runs: Mapping[str, Callable[[], object]], rounds: int, least: float = 0.02) -> dict[str, Time]:
    """Time every run once a round, so that a slow moment of the machine meets all of them.

    Args:
        runs: by name.
        rounds: after one that is not counted.
        least: seconds that one timing takes at least; short runs are repeated.
    """
    repeats = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, round(least / _once(run, 1)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(_once(run, repeats[name]))
    quartiles = {name: np.percentile(seconds, [25, 50, 75]) for name, seconds in found.items()}
    return {name: Time(float(middle), float(high - low) / 2) for name, (low, middle, high) in quartiles.items()}


def _once(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def made_on() -> str:
    """Machine, versions and commit, for the foot of a report."""
    machine = hardware()
    found = {package.metadata["Name"].lower().replace("_", "-"): package.version for package in distributions()}
    versions = ", ".join(f"{name} {found[name]}" for name in _PACKAGES if name in found)
    return (
        f"{machine.processor} ({machine.machine}), {machine.cores} cores, {machine.memory_gib} GiB; "
        f"{torch.backends.cpu.get_cpu_capability()}; Python {platform.python_version()}, {versions}; "
        f"commit {git_state() or 'unknown'}; load average {os.getloadavg()[0]:.1f} at the end.\n"
    )


def milliseconds(times: Mapping[str, Time]) -> dict[str, dict[str, float]]:
    """The times as a row of a report's JSON file has them."""
    return {
        "milliseconds": {name: 1e3 * time.median for name, time in times.items()},
        "spread": {name: 1e3 * time.spread for name, time in times.items()},
    }
