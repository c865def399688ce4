"""Bad input: one clear line, the right exit code, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from conftest import Run, refused, tiny_model
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import compresskit
from compresskit.errors import WorkError
from compresskit.model import checkpoint, demo
from compresskit.model.output import output_folder
from compresskit.storage import hub

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


def _exported(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.onnx")
    (folder / "export.json").write_text("{}")


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
    config = transformers.BertConfig(hidden_size=48, num_hidden_layers=0, num_attention_heads=4, vocab_size=99)
    transformers.BertModel(config).save_pretrained(folder)


BAD_MODELS = {
    "empty": (_empty, "is empty"),
    "no config": (_no_config, "no config.json"),
    "broken config": (_broken_config, "config.json"),
    "no weights": (_no_weights, "has no weights"),
    "export": (_exported, "is an export, which predict and evaluate run"),
    "truncated": (_truncated, "model.safetensors: damaged or incomplete"),
    "garbage": (_garbage, "model.safetensors: damaged or incomplete"),
    "lost shard": (_lost_shard, "model-00002"),
    "lost norm": (_lost_norm, "lacks weight embeddings.LayerNorm.weight"),
    "empty bin": (_empty_bin, "pytorch_model.bin: damaged or incomplete"),
    "odd quantization": (_odd_quantization, "config.json: not a valid configuration"),
    "lost tensor": (_lost_tensor, "lacks weight encoder.layer.1.intermediate.dense.weight"),
    "wrong shape": (_wrong_shape, "encoder.layer.1.intermediate.dense.weight is 3x3, config.json says 96x48"),
    "nan": (_spoiled(float("nan")), "weight encoder.layer.1.attention.self.key.weight holds NaN"),
    "inf": (_spoiled(float("inf")), "weight encoder.layer.1.attention.self.key.weight holds NaN or infinity"),
    "pickle": (_pickle, "more than plain tensors"),
    "compressed": (_compressed, "compressed already"),
    "quantised": (_quantised, "quantised with gptq"),
    "remote code": (_remote_code, "own code is not run"),
    "vision": (_vision, "as word embedding"),
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


@pytest.mark.sweep
def test_hub_id_without_network_answers_within_ten_seconds(tmp_path: Path) -> None:
    """A hub that refuses connections, and one that accepts and then says nothing."""
    code = """
import sys, time
begun = time.monotonic()
import compresskit.pipeline, tensorly.decomposition
from compresskit.__main__ import main
loaded = time.monotonic()
try:
    main()
finally:
    print(loaded - begun, time.monotonic() - loaded)
"""
    line = [sys.executable, "-c", code, "inspect", "--model", "google-bert/bert-base-uncased"]
    for hub_is in ("refusing", "silent"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if hub_is == "silent":
                server.listen()
            environment = {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
            }
            done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, hub_is
        assert "the hub cannot be reached" in done.stderr, hub_is
        assert "Traceback" not in done.stderr, hub_is
        # Loading takes long on a busy machine, and so would everything else.
        loading, asking = map(float, done.stdout.split())
        assert asking < 10 + loading, hub_is


def test_a_data_set_of_a_silent_hub_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the libraries look into their caches alone: they would ask five times, with a line for each."""
    asked, switches = [], [(module, "HF_HUB_OFFLINE") for module in (huggingface_hub.constants, datasets.config)]
    for switch in switches:
        monkeypatch.setattr(*switch, False)

    def silent(*_: object, **__: object) -> None:
        asked.append("hub")
        raise TimeoutError("no answer")

    monkeypatch.setattr(HfApi, "dataset_info", silent)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: asked.append([getattr(*s) for s in switches]))
    hub.load_dataset("owner/name", None, split="train")
    assert asked == ["hub", [True, True]]
    assert [getattr(*switch) for switch in switches] == [False, False]


def test_output_that_cannot_be_written(run: Run, tiny_folder: Path) -> None:
    arguments = ("compress", "--model", tiny_folder, "--method", "low-rank", "--ratio", 2, "--output")
    refused(run(*arguments, "/proc/small"), "cannot be written")
    refused(run(*arguments, tiny_folder / "config.json" / "small"), "cannot be written")


def test_what_was_written_meanwhile_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def write() -> None:
        with output_folder(output, overwrite=False) as temporary:
            (temporary / "mine").write_text("1")
            output.mkdir()
            (output / "theirs").write_text("2")

    with pytest.raises(WorkError, match="was written by another process meanwhile"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["theirs"]


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
