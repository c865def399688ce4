"""Commands in processes of their own, forked from one that has the libraries loaded: many are started here."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_forks = multiprocessing.get_context("forkserver")
_COMMANDS = ("compresskit.benchmark.runner", "compresskit.cli", "compresskit.folders.verification")
_forks.set_forkserver_preload([*_COMMANDS, "scipy.stats", "sklearn.metrics", "tensorly.decomposition"])


def enter(log: Path, arguments: list[str]) -> None:
    """In the new process: what the command line does, with all it says in a file."""
    gc.freeze()  # the libraries stay: to look through them for garbage takes half a second each time
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["compresskit", *arguments]
    from compresskit.__main__ import main

    main()


def start(log: Path, *arguments: object, target: Callable[[Path, list[str]], None] = enter) -> Any:
    """The process of a command; all it says goes into ``log``."""
    process = _forks.Process(target=target, args=(log, list(map(str, arguments))))
    process.start()
    return process


def start_ranks(log: Path, count: int, *arguments: object) -> list[Any]:
    """The processes of a command that torchrun would start: what it tells each one stands in the environment."""
    port = free_port()
    return [
        start(log.with_name(f"{log.name}-{rank}"), rank, count, port, *arguments, target=_rank) for rank in range(count)
    ]


def _rank(log: Path, arguments: list[str]) -> None:
    rank, count, port, *arguments = arguments
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    enter(log, arguments)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def finish(process: Any, seconds: float = 300) -> int:
    """The exit code; minus the signal's number where one ended it."""
    process.join(seconds)
    assert process.exitcode is not None, "the process hangs"
    code: int = process.exitcode
    return code


@dataclass
class Command:
    """A command that writes one output, and its undisturbed result.

    Attributes:
        arguments: all but the output.
        calm: the undisturbed result.
        working: ending of the folder beside the output that an unfinished run leaves; empty where there is none.
        seconds: that the undisturbed run took.
    """

    arguments: tuple[object, ...]
    calm: Path
    working: str = ""
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        begun = time.monotonic()
        assert self.run(self.calm)[0] == 0
        self.seconds = time.monotonic() - begun

    def start(self, output: Path, *more: object) -> Any:
        """Begin; goes on with an unfinished run where there is one."""
        resume = ["--resume"] if self.working and output.with_name(output.name + self.working).exists() else []
        return start(self.log(output), *self.arguments, "--output", output, *resume, *more)

    def run(self, output: Path, *more: object) -> tuple[int, str]:
        """Exit code, and what was said."""
        code = finish(self.start(output, *more))
        said = self.log(output).read_text(errors="replace")
        assert "Traceback" not in said, said
        return code, said

    def disturb(self, output: Path, number: signal.Signals, share: float, *more: object) -> int:
        """Send a signal once this share of the undisturbed time is over; the exit code."""
        process = self.start(output, *more)
        time.sleep(share * self.seconds)
        if process.is_alive():
            os.kill(process.pid, number)
        code = finish(process)
        assert "Traceback" not in self.log(output).read_text(errors="replace")
        return code

    @staticmethod
    def log(output: Path) -> Path:
        """Where it says what."""
        folder = output.parent.parent / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{output.name}.log"
