"""The command line: what it prints and writes, its exit codes, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import outputs, tiny_model
from safetensors.torch import load_file, save_file

import compresskit
from compresskit import cli
from compresskit.data import demo
from compresskit.model import checkpoint


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command in this process, in an empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["compresskit", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def refused(result: Result, *words: str, code: int = 2) -> None:
    """Exit code, one line, the words in it, nothing written."""
    assert result.code == code, result
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len([line for line in lines if "rror" in line]) == 1
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert list(Path.cwd().iterdir()) == []


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
    wanted = cli.parse_size(size)
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


def test_an_interrupt_between_the_two_renames_keeps_the_old_result(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2, "--output", "small")
    assert run(*arguments).code == 0
    before = Path("small/model.safetensors").read_bytes()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".part-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert run(*arguments, "--overwrite").code == 130
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


BAD_CHOICES = {
    "unknown method": (("--method", "kroneker", "--ratio", 3), "did you mean 'kronecker'"),
    "unknown recipe": (("--recipe", "kroneckerbert-9"), "unknown recipe"),
    "both": (("--method", "low-rank", "--ratio", 3, "--recipe", "kroneckerbert-8"), "not both"),
    "neither": ((), "give either a method"),
    "no ratio": (("--method", "low-rank"), "needs a ratio or a size"),
    "ratio one": (("--method", "low-rank", "--ratio", 1), "above 1"),
    "ratio nan": (("--method", "low-rank", "--ratio", "nan"), "above 1"),
    "ratio word": (("--method", "low-rank", "--ratio", "many"), "many"),
    "ratio out of reach": (("--method", "low-rank", "--ratio", 5000, "--output", "a/b"), "out of reach"),
    "ratio and size": (("--method", "low-rank", "--ratio", 3, "--size", "1MB"), "not both"),
    "bad size": (("--method", "low-rank", "--size", "5 apples"), "such as 5MB"),
    "size too small": (("--method", "low-rank", "--size", "1kB"), "too small"),
    "size too large": (("--method", "low-rank", "--size", "1GB"), "not below"),
    "ratio for shapes": (("--recipe", "kroneckerbert-8", "--ratio", 3), "explicit shapes"),
    "bad device": (("--method", "low-rank", "--ratio", 3, "--device", "quantum"), "device"),
    "device without numbers": (("--method", "low-rank", "--ratio", 3, "--device", "meta"), "device"),
    "too many threads": (("--method", "low-rank", "--ratio", 3, "--threads", 99999), "threads"),
    "bad threads": (("--method", "low-rank", "--ratio", 3, "--threads", 0), "threads"),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_bad_choices(case: str, run: Run, tiny_folder: Path) -> None:
    arguments, words = BAD_CHOICES[case]
    refused(run("compress", "--model", tiny_folder, *arguments), words)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"garbage" * 9)


def _lost_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model().save_pretrained(folder, max_shard_size="50kB")
    next(folder.glob("model-00002*")).unlink()


def _lost_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.1.intermediate.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _lost_norm(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["embeddings.LayerNorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _empty_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def _odd_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": "x"}))


def _wrong_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.intermediate.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})


def _spoiled(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["encoder.layer.1.attention.self.key.weight"][3, 4] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {folder}/pwned",))

    torch.save({"x": Payload()}, folder / "pytorch_model.bin", pickle_module=pickle)


def _compressed(folder: Path) -> None:
    shutil.rmtree(folder)
    compresskit.compress(tiny_model(), method="low-rank", ratio=2).save_pretrained(folder)


def _quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def _remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    extra = {"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.EvilModel"}}
    (folder / "config.json").write_text(json.dumps(config | extra))
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')\n")


def _vision(folder: Path) -> None:
    shutil.rmtree(folder)
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96)
    transformers.ViTModel(config).save_pretrained(folder)


def _decoder(folder: Path) -> None:
    shutil.rmtree(folder)
    transformers.GPT2Model(transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=99)).save_pretrained(
        folder
    )


def _sequence_to_sequence(folder: Path) -> None:
    shutil.rmtree(folder)
    config = transformers.BartConfig(
        d_model=48,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=99,
    )
    transformers.BartModel(config).save_pretrained(folder)


def _nothing_to_compress(folder: Path) -> None:
    shutil.rmtree(folder)
    config = transformers.SqueezeBertConfig(
        hidden_size=48,
        embedding_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=99,
    )
    transformers.SqueezeBertModel(config).save_pretrained(folder)


BAD_MODELS = {
    "empty": (_empty, "is empty"),
    "no config": (_no_config, "no config.json"),
    "broken config": (_broken_config, "config.json"),
    "no weights": (_no_weights, "has no weights"),
    "truncated": (_truncated, "model.safetensors: damaged or incomplete"),
    "garbage": (_garbage, "model.safetensors: damaged or incomplete"),
    "lost shard": (_lost_shard, "model-00002"),
    "lost norm": (_lost_norm, "lacks weight embeddings.LayerNorm.weight"),
    "empty bin": (_empty_bin, "pytorch_model.bin: damaged or incomplete"),
    "odd quantization": (_odd_quantization, "config.json: not a valid configuration"),
    "lost tensor": (_lost_tensor, "lacks weight encoder.layer.1.intermediate.dense.weight"),
    "wrong shape": (_wrong_shape, "cannot be loaded"),
    "nan": (_spoiled(float("nan")), "weight encoder.layer.1.attention.self.key.weight holds NaN"),
    "inf": (_spoiled(float("inf")), "weight encoder.layer.1.attention.self.key.weight holds NaN or infinity"),
    "pickle": (_pickle, "more than plain tensors"),
    "compressed": (_compressed, "compressed already"),
    "quantised": (_quantised, "quantised with gptq"),
    "remote code": (_remote_code, "own code is not run"),
    "vision": (_vision, "has no word embedding"),
    "decoder": (_decoder, "holds a decoder"),
    "sequence to sequence": (_sequence_to_sequence, "holds a decoder"),
    "nothing to compress": (_nothing_to_compress, "nothing to compress"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case: str, run: Run, tiny_folder: Path) -> None:
    spoil, words = BAD_MODELS[case]
    spoil(tiny_folder)
    refused(run("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2), words)
    assert not (tiny_folder / "pwned").exists()
    refused(run("inspect", "--model", tiny_folder), words)


@pytest.mark.parametrize("name", ["nowhere/", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_folder(name: str, run: Run) -> None:
    refused(run("compress", "--model", name, "--method", "low-rank", "--ratio", 2), "no such folder")


def test_a_file_is_no_model(run: Run, tiny_folder: Path) -> None:
    refused(run("inspect", "--model", tiny_folder / "config.json"), "is a file")


def test_hub_id_offline(run: Run) -> None:
    refused(run("compress", "--model", "google-bert/bert-base-uncased", "--method", "low-rank", "--ratio", 2), "hub")


@pytest.mark.parametrize("answering", [False, True])
def test_hub_id_without_network_answers_within_ten_seconds(answering: bool, tmp_path: Path) -> None:
    """A hub that refuses connections, and one that accepts and then says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answering:
            server.listen()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        start = time.monotonic()
        command = ["inspect", "--model", "google-bert/bert-base-uncased"]
        done = subprocess.run(
            [sys.executable, "-m", "compresskit", *command],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert time.monotonic() - start < 10 + 5  # five for starting Python and torch on a busy machine
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_that_cannot_be_written(run: Run, tiny_folder: Path) -> None:
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2, "--output")
    refused(run(*arguments, "/proc/small"), "cannot be written")
    refused(run(*arguments, tiny_folder / "config.json" / "small"), "cannot be written")


def test_a_full_disk_leaves_nothing(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    result = run("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2)
    refused(result, "No space left on device", code=1)


def test_an_unexpected_error_is_one_line_and_debug_shows_where(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(checkpoint, "save", bug)
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2)
    refused(run(*arguments), "ZeroDivisionError: surprise", "--debug", code=1)
    with pytest.raises(ZeroDivisionError):
        run(*arguments, "--debug")
    assert list(Path.cwd().iterdir()) == []


def test_no_embedded_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "not-installed-anywhere")
    refused(run("compress", "--method", "low-rank", "--ratio", 2), "--model", "extra 'demo'")


def test_an_embedded_checkpoint_with_another_hash(run: Run, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    refused(run("inspect"), "is not the published")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing_half_written(number: int, tmp_path: Path, tiny_folder: Path) -> None:
    """A real signal to a real process, sent once its temporary folder is there."""
    work = tmp_path / "work"
    work.mkdir()
    slow = "import time; from compresskit.model import checkpoint as c; s = c.save\n"
    slow += "def save(*a):\n    s(*a)\n    print('saved', flush=True)\n    time.sleep(60)\n"
    slow += "c.save = save\nfrom compresskit.cli import main; main()"
    arguments = ["compress", "--model", str(tiny_folder), "--method", "low-rank", "--ratio", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    assert len(list(work.iterdir())) == 1  # the temporary folder
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
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
    code = (
        "import sys, compresskit\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert all(hasattr(compresskit, name) for name in compresskit.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choices_of_the_command_line_are_those_of_the_library() -> None:
    assert set(cli.AS_CHOICES) == set(checkpoint.MODEL_CLASSES)
