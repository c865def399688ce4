"""The command line: what it prints and writes, interruptions, start-up time."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, outputs, refused, tiny_model
from faults.command import enter, finish, start
from safetensors.torch import load_file

import compresskit
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.report.render import command
from compresskit.cli.common import AS_CHOICES
from compresskit.errors import WorkError, no_panic
from compresskit.model import checkpoint
from compresskit.planning.size import parse_size


def test_compress_writes_a_folder_that_transformers_loads(run: Run, tiny_folder: Path) -> None:
    result = run("compress", "--model", tiny_folder, "--method", "kronecker", "--ratio", 3)
    assert result.code == 0, result.err
    folder = Path("tiny-bert-kronecker-3x")
    assert [path.name for path in Path.cwd().iterdir()] == [folder.name]  # no temporary folder left
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "compression.json",
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "vocab.txt",
    }
    model = transformers.AutoModel.from_pretrained(folder)
    expected = compresskit.compress(tiny_folder, method="kronecker", ratio=3)
    assert torch.equal(outputs(model), outputs(expected))

    record = json.loads((folder / "compression.json").read_text())
    assert record["format_version"] == 1
    assert record["ratio_asked"] == 3
    assert 3 <= record["ratio"] <= 3.03
    stored = load_file(folder / "model.safetensors")
    assert record["parameters"]["after"] == sum(tensor.numel() for tensor in stored.values())
    assert record["megabytes"]["after"] == (folder / "model.safetensors").stat().st_size / 1e6
    dense = tiny_model()
    for row in record["groups"]:
        layer = model.get_submodule(row["name"])
        weight = dense.get_submodule(row["name"]).weight
        assert row["error"] == pytest.approx(
            float((weight - layer.dense_weight()).detach().norm() / weight.detach().norm()), rel=1e-4
        )
        assert row["parameters_after"] == sum(p.numel() for n, p in layer.named_parameters() if n != "bias")

    for text in (result.out, (folder / "README.md").read_text()):
        assert "asked 3x" in text
        assert f"{record['parameters']['after']:,}" in text
        assert "attention" in text
        assert "FLOPs" in text
    assert "import compresskit" in (folder / "README.md").read_text()
    assert "recipe.yaml" in (folder / "README.md").read_text()
    assert "distil" in result.out

    again = run("compress", "--model", tiny_folder, "--recipe", folder / "recipe.yaml", "--output", "again")
    assert again.code == 0, again.err
    assert (folder / "model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_the_embedded_checkpoint_is_the_default(run: Run, embedded: Path) -> None:
    result = run("compress", "--method", "low-rank", "--ratio", 19)
    assert result.code == 0, result.err
    model = compresskit.load("all-MiniLM-L6-v2-low-rank-19x")
    assert 19 <= 22_713_216 / sum(p.numel() for p in model.parameters()) <= 19.19
    tokenizer = transformers.AutoTokenizer.from_pretrained("all-MiniLM-L6-v2-low-rank-19x")
    assert torch.isfinite(outputs(model, tokenizer("hello world", return_tensors="pt")["input_ids"])).all()


@pytest.mark.parametrize("size", ["5MB", "3000 kB", "0.02gb"])
def test_size_is_another_way_to_say_ratio(run: Run, embedded: Path, size: str) -> None:
    result = run("compress", "--method", "low-rank", "--size", size, "--output", "small")
    assert result.code == 0, result.err
    wanted = parse_size(size)
    assert 0.98 * wanted <= Path("small/model.safetensors").stat().st_size <= wanted


def test_dry_run_writes_nothing(run: Run, tiny_folder: Path) -> None:
    result = run("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 3, "--dry-run")
    assert result.code == 0
    assert "asked 3x" in result.out
    assert "nothing written" in result.out
    assert list(Path.cwd().iterdir()) == []


def test_error_allocation_and_another_class(run: Run, tiny_folder: Path) -> None:
    result = run(
        *("compress", "--model", tiny_folder, "--method", "kronecker", "--ratio", 3, "--allocation", "error"),
        *("--as", "sequence-classification", "--seed", 7, "--output", "small"),
    )
    assert result.code == 0, result.err
    assert "initialised at random: classifier.bias, classifier.weight" in result.out.replace("\n", " ")
    model = compresskit.load("small")
    assert type(model).__name__ == "BertForSequenceClassification"
    run(
        *("compress", "--model", tiny_folder, "--method", "kronecker", "--ratio", 3, "--allocation", "error"),
        *("--as", "sequence-classification", "--seed", 7, "--output", "twin"),
    )
    assert Path("small/model.safetensors").read_bytes() == Path("twin/model.safetensors").read_bytes()


def test_inspect_lists_every_matrix(run: Run, tiny_folder: Path) -> None:
    result = run("inspect", "--model", tiny_folder)
    assert result.code == 0, result.err
    assert "499x48" in result.out
    assert "not the word embedding" in result.out
    for word in ("embedding", "attention", "ffn", "head", "rank 90 %"):
        assert word in result.out
    assert "100.0 %" in result.out


def test_methods_lists_the_registry(run: Run) -> None:
    result = run("methods")
    assert result.code == 0
    for word in ("kronecker", "low-rank", "Eckart", "kroneckerbert-21"):
        assert word in result.out


def test_overwrite_replaces_only_what_compresskit_wrote(run: Run, tiny_folder: Path) -> None:
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--output", "small")
    assert run(*arguments, "--ratio", 2).code == 0
    before = Path("small/model.safetensors").read_bytes()
    result = run(*arguments, "--ratio", 3)
    assert result.code == 2
    assert "exists" in result.err
    assert Path("small/model.safetensors").read_bytes() == before
    assert run(*arguments, "--ratio", 3, "--overwrite").code == 0
    assert Path("small/model.safetensors").read_bytes() != before
    assert [path.name for path in Path.cwd().iterdir()] == ["small"]
    Path("small/finetuned").mkdir()
    result = run(*arguments, "--ratio", 2, "--overwrite")
    assert result.code == 2
    assert "holds finetuned, which compresskit did not write" in result.err
    Path("small/finetuned").rmdir()
    Path("precious").mkdir()
    Path("precious/file").write_text("mine")
    result = run(*arguments[:-1], "precious", "--ratio", 3, "--overwrite")
    assert result.code == 2
    assert "not written by compresskit" in result.err
    assert Path("precious/file").read_text() == "mine"


@pytest.mark.parametrize(("problem", "code"), [(KeyboardInterrupt, 130), (OSError(5, "Input/output error"), 1)])
def test_what_happens_between_the_two_renames_keeps_the_old_result(
    problem: BaseException, code: int, run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2, "--output", "small")
    assert run(*arguments).code == 0
    before = Path("small/model.safetensors").read_bytes()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".part-" in self.name:
            raise problem
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert run(*arguments, "--overwrite").code == code
    assert Path("small/model.safetensors").read_bytes() == before
    assert [path.name for path in Path.cwd().iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["x[/]y", "[red]z", "a b"])
def test_odd_names_are_printed_as_they_are(name: str, run: Run, tiny_folder: Path) -> None:
    arguments = ("compress", "--method", "low-rank", "--ratio", 2)
    result = run(*arguments, "--model", tiny_folder, "--output", name)
    assert result.code == 0, result.err
    assert f"Written to {name}/" in result.out
    shutil.rmtree(name.partition("/")[0])
    refused(run(*arguments, "--model", f"{name}/none"), "no such folder")


def test_multiple_choice(run: Run, tiny_folder: Path) -> None:
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2, "--as", "multiple-choice")
    assert run(*arguments, "--output", "small").code == 0
    assert "--as multiple-choice" in Path("small/README.md").read_text()
    assert type(compresskit.load("small")).__name__ == "BertForMultipleChoice"


def _slow_to_save(log: Path, arguments: list[str]) -> None:
    """The command, which stays a minute before it renames what it has written."""
    save = checkpoint.save

    def slow(*parts: Any) -> None:
        save(*parts)
        print("saved", flush=True)
        time.sleep(60)

    checkpoint.save = slow
    enter(log, arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_half_written(number: int, tmp_path: Path, tiny_folder: Path) -> None:
    """A real signal to a real process, sent once its temporary folder is there."""
    work, log = tmp_path / "work", tmp_path / "log"
    work.mkdir()
    arguments = ["compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", "2", "--output", work / "small"]
    process = start(log, *arguments, target=_slow_to_save)
    deadline = time.monotonic() + 120
    while not log.exists() or "saved" not in log.read_text():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert len(list(work.iterdir())) == 1  # the temporary folder
    os.kill(process.pid, number)
    assert finish(process) == 130
    assert "interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert list(work.iterdir()) == []


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['compresskit', '--help']\n"
        "from compresskit.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'scipy', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "compresskit", "--help"], check=True, capture_output=True, text=True
        )
        times.append(time.perf_counter() - start)
    assert "compress" in done.stdout
    assert min(times) < 0.5


def test_import_is_light_and_public_names_are_there() -> None:
    code = "import sys, compresskit\nassert not {'torch', 'transformers', 'wrapt', 'asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(compresskit, name) for name in compresskit.__all__)


def test_compressing_without_a_task_loads_nothing_that_reads_or_scores_rows(tiny_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from compresskit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done: assert not done.code\n"
        "heavy = {'datasets', 'pandas', 'pyarrow', 'sklearn', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    output = tmp_path / "small"
    arguments = ["compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", "2", "--output", output]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)
    assert (output / "compression.json").is_file()


def test_choices_of_the_command_line_are_those_of_the_library() -> None:
    assert set(AS_CHOICES) == set(checkpoint.MODEL_CLASSES)


def test_tasks_are_listed(run: Run) -> None:
    result = run("tasks")
    assert result.code == 0
    assert all(name in result.out for name in ("sst2", "squad_v2", "hans", "SST-2/train.tsv"))
    lines = result.out.splitlines()
    rows = [line.replace("\u2502", " ").split() for line in lines if line.startswith("\u2502")]
    kinds = [row[0] for row in rows if row and row[0] in ("classification", "retrieval")]
    assert kinds == ["classification", "retrieval"]  # the kinds come first, with their metrics
    listed = [row[0] for row in rows if row and row[0] in ("sst2", "nanobeir-scidocs", "squad-retrieval", "wnut17")]
    assert listed[0] == "sst2"
    assert listed.index("wnut17") < listed.index("squad-retrieval")
    assert result.out.index("Kinds: ") < result.out.index("Tasks that come with compresskit") < result.out.index("sst2")


def test_printed_commands_are_quoted(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "my $data's"
    shutil.copytree(bench_folder / "data", spaced)
    task = spaced / "my task.yaml"
    task.write_text(
        "version: 1\nname: mine\ninputs: [sentence]\nlabel: label\n"
        "files: {train: SST-2/train.tsv, dev: SST-2/dev.tsv}\nmetrics: [accuracy]\n"
    )
    flags = ("--task", task, "--data", spaced, "--max-length", "32", "--max-steps", "1")
    teacher, student = tmp_path / "a teacher", tmp_path / "a student"
    done = run("finetune", "--model", bench_folder / "model", *flags, "--output", teacher)
    words = ["compresskit", "distill", "--teacher", str(teacher), "--student", "STUDENT"]
    assert _commands(done.out) == [[*words, "--task", str(task), "--data", str(spaced)]]
    shape = ("--method", "low-rank", "--ratio", "3", "--calibration-task", task, "--data", spaced)
    done = run("compress", "--model", teacher, *shape, "--output", student)
    words = ["compresskit", "distill", "--teacher", str(teacher), "--student", str(student), "--task", str(task)]
    assert _commands(done.out)[0] == [*words, "--data", str(spaced), "--output", f"{student}-my task"]
    card = (student / "README.md").read_text()
    assert "compress --model 'a teacher' --calibration-task mine" in card
    general = ("--text", bench_folder / "text.txt", "--max-length", "32", "--max-steps", "1")
    done = run("distill", "--teacher", bench_folder / "model", "--student", bench_folder / "student", *general,
               "--output", tmp_path / "gen eral")  # fmt: skip
    words = ["compresskit", "distill", "--teacher", "TASK_TEACHER", "--student", str(tmp_path / "gen eral")]
    assert _commands(done.out) == [[*words, "--task", "TASK"]]
    grid = Grid(models=("my model",), tasks=("my task.yaml", "sst2"), data="my data", text="my text.txt")
    words = ["--model", "my model", "--task", "my task.yaml,sst2", "--data", "my data", "--text", "my text.txt"]
    assert shlex.split(command(grid)) == ["compresskit", "bench", *words]


def _commands(text: str) -> list[list[str]]:
    lines = [line.removeprefix("Next: ").strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("compresskit ")]


def _in_ascii(log: Path, arguments: list[str]) -> None:
    folder, *arguments = arguments
    os.chdir(folder)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")  # as PYTHONIOENCODING says it
    enter(log, arguments)


def test_a_console_that_cannot_show_a_label(bench_folder: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"{word}\t{label}" for word, label in (("good", "良い"), ("bad", "悪い")) * 4)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(f"text\tkind\n{rows}\n", encoding="utf-8")
    (tmp_path / "own.yaml").write_text(
        "version: 1\nname: own\ninputs: [text]\nlabel: kind\nfiles: {train: train.tsv, dev: dev.tsv}\n"
        "metrics: [accuracy]\n"
    )
    task = ("--task", "own.yaml", "--data", ".", "--max-length", "32")
    arguments = ("finetune", "--model", bench_folder / "model", *task, "--max-steps", "1", "--output", "ひ")
    log = tmp_path / "log"
    assert finish(start(log, tmp_path, *arguments, target=_in_ascii)) == 0, log.read_text()
    assert b"labels found: ??, ??" in log.read_bytes()
    assert (tmp_path / "ひ" / "model.safetensors").is_file()


def test_tables_of_narrow_terminals_lose_nothing() -> None:
    pty = pytest.importorskip("pty")
    line = shlex.join([sys.executable, "-m", "compresskit", "tasks"])
    parts: list[bytes] = []

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1 << 16)
        parts.append(data)
        return data

    pty.spawn(["/bin/sh", "-c", f"stty cols 8; {line}"], read)
    shown = b"".join(parts).decode(errors="replace")
    for word in ("task", "metrics", "sst2", "accuracy", "regression"):
        assert word in shown


def test_a_panic_of_a_rust_library_is_one_line(bench_folder: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    pair = ("the film was", "the film was good " * 4)
    with pytest.raises(WorkError, match="reading: a library failed: "), no_panic("reading"):
        words(*pair, max_length=8, stride=4, truncation="only_second", return_overflowing_tokens=True)
    with pytest.raises(KeyboardInterrupt), no_panic("reading"):
        raise KeyboardInterrupt
