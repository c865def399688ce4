"""Disks that fill or turn read-only, other file systems, several processes, damaged files."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

import compresskit
from compresskit import InputError
from compresskit.model.weights import fingerprints
from faults.command import Command, finish
from faults.conftest import Outcome, check, remount, tmpfs


def test_full_disk(
    chance: random.Random, compressing: Command, distilling: Command, tmp_path: Path, outcome: Outcome
) -> None:
    with tmpfs(tmp_path / "disk", f"{chance.randrange(16, 120)}k") as disk:
        code, said = compressing.run(disk / "small")
        assert code == 1
        assert "could not be written: " in said
        assert list(disk.iterdir()) == []
        outcome("disk full while compressing", "one line, nothing left")
        remount(disk, f"size={chance.randrange(100, 350)}k")
        code, said = distilling.run(disk / "student")
        assert code == 1
        assert not (disk / "student").exists()
        remount(disk, "size=100m")
        assert distilling.run(disk / "student")[0] == 0
        check(disk / "student", distilling.calm)
        outcome("disk full while distilling", "one line; resumed to the undisturbed weights")


def test_disk_that_turns_read_only(
    chance: random.Random, compressing: Command, distilling: Command, tmp_path: Path, outcome: Outcome
) -> None:
    with tmpfs(tmp_path / "disk", "100m") as disk:
        code = distilling.disturb(disk / "student", signal.SIGKILL, chance.uniform(0.3, 0.6))
        assert code == -signal.SIGKILL
        remount(disk, "ro")
        for command, name in ((distilling, "student"), (compressing, "small")):
            code, said = command.run(disk / name)
            assert code in (1, 2)
            assert "Read-only file system" in said
            assert len(said.strip().splitlines()) <= 2
        remount(disk, "rw")
        assert distilling.run(disk / "student")[0] == 0
        check(disk / "student", distilling.calm)
        outcome("disk turns read-only", "one line; resumed to the undisturbed weights")


def test_output_on_another_file_system(
    compressing: Command, distilling: Command, tmp_path: Path, outcome: Outcome
) -> None:
    with tmpfs(tmp_path / "disk", "100m") as disk:
        for command, name in ((compressing, "small"), (distilling, "student")):
            assert command.run(disk / name)[0] == 0
            check(disk / name, command.calm)
        outcome("output on another file system", "the undisturbed results")


def test_two_processes_with_one_output(
    chance: random.Random, compressing: Command, distilling: Command, tmp_path: Path, outcome: Outcome
) -> None:
    for command in (compressing, distilling):
        output = tmp_path / "work" / command.calm.parent.name / "out"
        output.parent.mkdir(parents=True)
        twins = []
        for _ in range(2):
            twins.append(command.start(output))
            time.sleep(chance.random() * command.seconds / 2)
        codes = sorted(map(finish, twins))
        assert codes[0] == 0
        assert codes[1] in (1, 2)
        check(output, command.calm)
        assert [path.name for path in output.parent.iterdir()] == ["out"]
    outcome("two processes with one output", "one wrote it, the other said so")


def test_two_processes_that_resume_one_run(
    distilling: Command, bench_folder: Path, tmp_path: Path, outcome: Outcome
) -> None:
    output = tmp_path / "work" / "student"
    output.parent.mkdir()
    first = distilling.start(output)
    while not list(output.parent.glob("student.checkpoints/checkpoint-*")) and first.is_alive():
        time.sleep(0.01)
    code, said = distilling.run(output, "--resume")
    assert finish(first) == 0
    assert code == 2
    assert "another process works on this run" in said
    check(output, distilling.calm)
    outcome("a run resumed while it goes on", "refused with one line")


@pytest.mark.parametrize("kind", ["bit flipped", "truncated"])
def test_damaged_shards(kind: str, chance: random.Random, bench_folder: Path, tmp_path: Path, outcome: Outcome) -> None:
    """Of a compressed model: wherever the damage is, its hash tells."""
    small = tmp_path / "small"
    compresskit.compress(bench_folder / "model", method="low-rank", ratio=3).save_pretrained(
        small, max_shard_size="30kB"
    )
    (small / "compression.json").write_text(json.dumps({"format_version": 1, "weights": fingerprints(small)}))
    compresskit.load(small)
    shard = chance.choice(sorted(small.glob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    if kind == "truncated":
        del data[chance.randrange(len(data)) :]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    shard.write_bytes(data)
    with pytest.raises(InputError, match=shard.name):
        compresskit.load(small)
    outcome(f"shard {kind}", "refused with the file's name")
