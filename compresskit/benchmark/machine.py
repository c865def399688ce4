"""The machine and the software that a benchmark runs on."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from compresskit import __version__
from compresskit.benchmark.provenance import Hardware, digest

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scipy")


@cache
def hardware() -> Hardware:
    """What this machine is."""
    memory = None
    if hasattr(os, "sysconf"):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return Hardware(
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count(),
        memory_gib=memory,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )


def host(machine: Hardware) -> str:
    """A hash of the hardware and the threads: figures of another kind of machine are not mixed with these."""
    return digest(machine.model_dump(mode="json"))[:16]


def versions() -> dict[str, str]:
    """Of Python, compresskit and the libraries that decide a result."""
    return {"python": platform.python_version(), "compresskit": __version__} | {n: version(n) for n in _LIBRARIES}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@cache
def git_state() -> str | None:
    """Commit of the checkout that runs, with ``-dirty`` where files differ; None for an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if tracked.returncode == 0 else None
