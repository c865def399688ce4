"""Commands that are killed or told to stop at random moments: afterwards the complete result or the state before."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import same

from faults.command import Command
from faults.conftest import TIMES, Outcome, check

SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS if TIMES > 1 else [signal.SIGTERM])
def test_compress(
    number: signal.Signals, chance: random.Random, compressing: Command, tmp_path: Path, outcome: Outcome
) -> None:
    """Over an older result: one of both is there."""
    output = tmp_path / "work" / "small"
    output.parent.mkdir()
    older = ("--ratio", 2)
    assert compressing.run(output, *older)[0] == 0
    compressing.run(tmp_path / "work" / "older", *older)
    code = compressing.disturb(output, number, chance.random(), "--overwrite")
    stays = same(output, tmp_path / "work" / "older")
    check(output, tmp_path / "work" / "older" if stays else compressing.calm)
    assert code == (0 if not stays else -9 if number is signal.SIGKILL else 130)
    if number is signal.SIGTERM:
        assert not list(output.parent.glob(".*")), "a folder is left"
    assert compressing.run(output, "--overwrite")[0] == 0
    check(output, compressing.calm)
    outcome(f"{number.name} while compressing", "the older result" if stays else "the new result")


@pytest.mark.parametrize("number", SIGNALS if TIMES > 1 else [signal.SIGKILL])
def test_distill(
    number: signal.Signals, chance: random.Random, distilling: Command, tmp_path: Path, outcome: Outcome
) -> None:
    output = tmp_path / "work" / "student"
    output.parent.mkdir()
    code = distilling.disturb(output, number, chance.uniform(0, 0.9))
    if code == 0:
        check(output, distilling.calm)
        outcome(f"{number.name} while distilling", "was finished already")
        return
    assert code == (-9 if number is signal.SIGKILL else 130)
    if not output.exists():
        assert distilling.run(output)[0] == 0
    check(output, distilling.calm)
    outcome(f"{number.name} while distilling", "resumed to the undisturbed weights")


def _catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for the signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


def test_interrupt_while_loading(chance: random.Random, bench_folder: Path, tmp_path: Path, outcome: Outcome) -> None:
    """In a process of its own, whose libraries take seconds to load; from the moment on at which it is in our hands."""
    line = [sys.executable, "-m", "compresskit", "compress", "--model", bench_folder / "model", "--method", "low-rank"]
    for seconds in (0, chance.uniform(0, 0.5), chance.uniform(0.5, 3)):
        work = tmp_path / str(seconds)
        work.mkdir()
        with subprocess.Popen([*line, "--ratio", "3"], cwd=work, stderr=subprocess.PIPE, text=True) as process:
            while not _catches(process, signal.SIGTERM):  # Python itself has a handler for SIGINT, but none for this
                time.sleep(0.001)
            time.sleep(seconds)
            if process.poll() is not None:
                outcome("SIGINT in the first 3 seconds", "was finished already")
                continue
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        assert process.returncode in (130, -signal.SIGINT), said  # a shell shows 130 for both
        assert said.strip() == "compresskit: interrupted, nothing half-written", (seconds, said)
        assert list(work.iterdir()) == []
        outcome("SIGINT in the first 3 seconds", "130, one line, nothing left")
