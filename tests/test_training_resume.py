"""Training runs that are killed, interrupted, resumed or shared by processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from conftest import same, weights
from faults.command import enter, finish, free_port, start, start_ranks

import compresskit
from compresskit.errors import InputError
from compresskit.training.trainer import DistillationTrainer

TASK = {"task": "sst2", "max_length": 32, "device": "cpu"}

COMMAND = ["distill", "--task", "sst2", "--max-length", "32", "--device", "cpu", "--threads", "1", "--dropout", "0.1"]


def command(folder: Path, *more: object) -> list[str]:
    models = ["--student", folder / "student", "--teacher", folder / "teacher", "--data", folder / "data"]
    return [str(part) for part in (*COMMAND, *models, *more)]


def _dies(log: Path, arguments: list[str]) -> None:
    """The command kills itself in the middle of a step, as hard as any other could."""
    kill_at, *arguments = arguments
    step = DistillationTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    DistillationTrainer.training_step = training_step
    enter(log, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kill_at"),
    [("task", 35), ("general", 10)],
    ids=["task", "masked words"],
)
def test_killed_and_resumed_run_ends_in_the_same_weights(
    bench_folder: Path, masked_lm: Path, tmp_path: Path, stage: str, kill_at: int
) -> None:
    """A checkpoint every 10 steps (25 an epoch; of masked words every 3 of 7); SIGKILL between two, an epoch later."""
    every = 10 if stage == "task" else 3
    settings = ["--batch-size", "16", "--epochs", "2", "--save-every", str(every), "--learning-rate", "0.003"]
    settings += ["--device", "cpu", "--threads", "1", "--dropout", "0.1", "--max-length", "32"]
    if stage == "task":
        settings += ["--task", "sst2", "--data", bench_folder / "data"]
        settings += ["--student", bench_folder / "student", "--teacher", bench_folder / "teacher"]
    else:
        settings += ["--text", bench_folder / "text.txt"]
        settings += ["--student", masked_lm / "student", "--teacher", masked_lm / "teacher"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    log = tmp_path / "log"
    assert finish(start(log, "distill", *settings, "--output", whole)) == 0, log.read_text()
    died = finish(start(log, kill_at, "distill", *settings, "--output", broken, target=_dies))
    assert died == -signal.SIGKILL, log.read_text()
    assert not broken.exists()
    work = tmp_path / "broken.checkpoints"
    assert [path.name for path in work.glob("checkpoint-*")] == [f"checkpoint-{kill_at // every * every}"]
    # A half-written checkpoint, as a kill at another moment leaves it.
    (work / "part" / "checkpoint-999").mkdir(parents=True)
    assert finish(start(log, "distill", *settings, "--output", broken)) == 2
    assert "--resume continues it" in log.read_text()
    assert finish(start(log, "distill", *settings, "--output", broken, "--resume")) == 0, log.read_text()
    assert same(whole, broken)
    assert not work.exists()
    logs = [json.loads((folder / "training.json").read_text())["stages"][-1]["log"] for folder in (whole, broken)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    assert len(logs[0]) > kill_at


def test_resume_refuses_other_settings(bench_folder: Path, tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 12:
                raise KeyboardInterrupt

    arguments = {"data": bench_folder / "data", "output": tmp_path / "out", "max_steps": 30, "save_every": 10, **TASK}
    models = (bench_folder / "student", bench_folder / "teacher")
    with pytest.raises(KeyboardInterrupt):
        compresskit.distill(*models, callbacks=[Stop()], **arguments)
    with pytest.raises(InputError, match="another learning_rate"):
        compresskit.distill(*models, learning_rate=0.1, resume=True, **arguments)
    with pytest.raises(InputError, match="unfinished run"):
        compresskit.distill(*models, **arguments)
    changed = shutil.copytree(bench_folder / "data", tmp_path / "data")
    dev = changed / "SST-2" / "dev.tsv"
    dev.write_text(dev.read_text() + "a new row\t1\n")
    with pytest.raises(InputError, match=r"another data \(splits dev rows \d+, sha256 \w{8}; now splits dev rows"):
        compresskit.distill(*models, resume=True, **arguments | {"data": changed})
    assert (tmp_path / "out.checkpoints" / "checkpoint-10").is_dir()
    compresskit.distill(*models, resume=True, **arguments)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["fork", pytest.param("torchrun", marks=pytest.mark.sweep)])
def test_two_processes_agree_with_one(by: str, bench_folder: Path, tmp_path: Path) -> None:
    settings = ("--max-steps", "20", "--learning-rate", "0.003", "--dropout", "0", "--loss", "attention=1")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    names = ("one", "two", "accumulated")
    for name in names:
        more = ("--accumulation", "2") if name == "accumulated" else ()
        arguments = command(bench_folder, *settings, *more, "--output", tmp_path / name)
        log = tmp_path / "log"
        if name == "two" and by == "torchrun":
            line = [sys.executable, *torchrun, "-m", "compresskit", *arguments]
            done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            processes = start_ranks(log, 2, *arguments) if name == "two" else [start(log, *arguments)]
            codes = [finish(process) for process in processes]
            assert not any(codes), codes
    one = weights(tmp_path / "one")
    student = weights(bench_folder / "student")
    assert max((one[f"bert.{key}"] - student[key]).abs().max() for key in student) > 1e-2  # it did learn
    for name in ("two", "accumulated"):
        other = weights(tmp_path / name)
        assert max((one[key] - other[key]).abs().max() for key in one) < 1e-4
    records = [json.loads((tmp_path / name / "training.json").read_text())["stages"][0] for name in names]
    assert records[1]["hardware"]["processes"] == 2
    assert len({record["tokens"] for record in records}) == 1
    losses = [[entry["loss"] for entry in record["log"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_run_killed_after_its_last_step_resumes_without_another(
    bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"data": bench_folder / "data", "output": tmp_path / "out", "max_steps": 12, **TASK}
    models = (bench_folder / "student", bench_folder / "teacher")
    with monkeypatch.context() as patch:
        patch.setattr("compresskit.training.trainer.DistillationTrainer.check_weights", _fail_at(12))
        with pytest.raises(KeyboardInterrupt):
            compresskit.distill(*models, **arguments)
    record = compresskit.distill(*models, resume=True, **arguments).record
    assert record["log"][-1]["step"] == 12
    compresskit.distill(*models, **arguments | {"output": tmp_path / "whole"})
    assert same(tmp_path / "out", tmp_path / "whole")


def test_interrupt_leaves_a_run_to_resume(bench_folder: Path, tmp_path: Path) -> None:
    arguments = command(bench_folder, "--epochs", "500", "--save-every", "5", "--output", tmp_path / "out")
    log = tmp_path / "log"
    process = start(log, *arguments)
    work = tmp_path / "out.checkpoints"
    deadline = time.monotonic() + 120
    while not list(work.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.is_alive(), log.read_text()
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert "--resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert list(work.glob("checkpoint-*"))


def _fail_at(step: int):
    calls = []

    def check_weights(self) -> None:
        calls.append(self.state.global_step)
        if calls.count(step) == 2:  # the first one is that of the checkpoint
            raise KeyboardInterrupt

    return check_weights
