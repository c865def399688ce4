"""Commands that are killed or told to stop at random moments: afterwards the complete result or the state before."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from conftest import same

from faults.command import Command
from faults.conftest import Outcome, check

SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
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


@pytest.mark.parametrize("number", SIGNALS)
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
