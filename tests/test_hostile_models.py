"""Checkpoints from strangers: no code of theirs runs, no file elsewhere is read, memory stays bounded."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, refused, tiny_model
from safetensors.torch import load_file
from test_plugins import fresh, point

import compresskit
from compresskit import InputError

__all__ = ["fresh"]  # a fixture

from compresskit.tasks.declaration import Task
from compresskit.validation import validate

COMPRESS = ("--method", "low-rank", "--ratio", 2)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.mark}",))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- configurations --

HUGE = 10**12

#: Changes of config.json, and what the refusal says.
ABSURD = {
    "vocabulary": ({"vocab_size": HUGE}, "vocab_size 1000000000000: too large for weights of"),
    "hidden": ({"hidden_size": HUGE}, "hidden_size 1000000000000: too large"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000: too large"),
    "many layers": ({"num_hidden_layers": 90_000}, "config.json describes more layers than its weights have"),
    "labels": ({"num_labels": 10**9}, "num_labels 1000000000: too large"),
    "head": (
        {"num_labels": 90_000, "architectures": ["BertForSequenceClassification"]},
        "config.json describes 4,4",
    ),
    "positions": ({"max_position_embeddings": 900_000}, "position_embeddings.weight is 40x48, config.json says 900000"),
    "square": ({"hidden_size": 99_996}, "config.json says"),
    "integers": ({"vocab_size": int("9" * 4000)}, "(4000 digits): too large"),
    "nothing": ({"vocab_size": None}, "cannot be read"),
    "negative": ({"hidden_size": -48}, "config.json: no model can be built of it"),
    "words": ({"hidden_size": "many"}, "cannot be read"),
    "infinite": ({"hidden_size": float("inf")}, "cannot be read"),
    "fewer": ({"hidden_size": 24}, "is 499x48, config.json says 499x24"),
    "in a list": ({"layer_sizes": [[1, HUGE]]}, "layer_sizes 1000000000000: too large"),
    "kernel": ({"attn_implementation": "stranger/kernel"}, "names code to fetch"),
    "kernel of a part": ({"_attn_implementation": {"text": "stranger/kernel"}}, "names code to fetch"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_configurations(case: str, run: Run, tiny_folder: Path) -> None:
    changes, words = ABSURD[case]
    change_config(tiny_folder, **changes)
    refused(run("compress", "--model", tiny_folder, *COMPRESS), words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"method": "low-rank", "rank": HUGE}, "saves no parameters"),
        ({"method": "kronecker", "a": [HUGE, HUGE], "b": [1, 1]}, "low-rank|kronecker"),
        ({"method": "kronecker", "a": [24, 24], "b": [2, 4], "terms": HUGE}, "no fewer than the dense"),
        ({"method": "tensor-train", "blocks": [4, 4], "ranks": [HUGE, HUGE]}, "tensor-train"),
        ({"method": "tucker", "rank_out": HUGE}, "tucker"),
        ({"method": "low-rank", "rank": 3}, r"is 48x\d+, config.json says 48x3"),
    ],
)
def test_absurd_specs(entry: dict[str, Any], words: str, tmp_path: Path) -> None:
    compresskit.compress(tiny_model(), method="low-rank", ratio=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["base"]["encoder.layer.0.output.dense"] = entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        compresskit.load(tmp_path)


def test_memory_stays_bounded(tiny_folder: Path) -> None:
    """What is refused has cost less than 100 MB by then; each of these would take gigabytes."""
    cases = ({"vocab_size": 900_000_000}, {"num_hidden_layers": 90_000}, {"num_labels": 900_000_000})
    code = """
import json, resource, sys, pathlib
import torch, transformers, compresskit
from transformers import BertModel
folder = pathlib.Path(sys.argv[1])
config = (folder / "config.json").read_text()
compresskit.plan(folder, method="low-rank", ratio=2)  # loads what is needed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for changes in json.loads(sys.argv[2]):
    (folder / "config.json").write_text(json.dumps(json.loads(config) | changes))
    try:
        compresskit.plan(folder, method="low-rank", ratio=2)
        sys.exit(f"{changes} was taken")
    except compresskit.InputError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    line = [sys.executable, "-c", code, str(tiny_folder), json.dumps(cases)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # MB


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "config.json: not a valid configuration"),
        (b"[]", "it must hold an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json: not a valid configuration"),
        ('{"model_type": "bért"}'.encode("latin-1"), "config.json: not a valid configuration"),
        (b"\x00" * 100, "config.json: not a valid configuration"),
        (b'{"model_type": "bert", "architectures": [5]}', "is of another kind"),
    ],
)
def test_broken_configurations(content: bytes, words: str, run: Run, tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_bytes(content)
    refused(run("compress", "--model", tiny_folder, *COMPRESS), words)


def test_a_gigantic_configuration_is_not_read(run: Run, tiny_folder: Path) -> None:
    with (tiny_folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    refused(run("compress", "--model", tiny_folder, *COMPRESS), "holds 1,099,511,627,776 bytes, at most 100,000,000")


# -- names that leave the folder --


def _shard_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _odd_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": 5}}')


def _link(name: str) -> Callable[[Path], None]:
    def link(folder: Path) -> None:
        target = folder.parent / f"private-{name}"
        if (folder / name).exists():
            (folder / name).rename(target)
        else:
            target.write_text("secret")
        (folder / name).symlink_to(target)

    return link


def _link_in_a_module(target: str) -> Callable[[Path], None]:
    """In a folder that a sentence-transformers model lists, and that is copied beside the compressed weights."""

    def link(folder: Path) -> None:
        (folder.parent / "private").mkdir()
        (folder.parent / "private" / "key").write_text("secret")
        (folder / "1_Pooling" / "deeper").mkdir(parents=True)
        (folder / "modules.json").write_text('[{"path": "1_Pooling"}]')
        (folder / "1_Pooling" / "deeper" / "config.json").symlink_to(target)

    return link


def _linked_module(folder: Path) -> None:
    """A module that holds itself."""
    (folder / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (folder / "1_Pooling").symlink_to(".")


def _tokenizer_elsewhere(folder: Path) -> None:
    (folder.parent / "private.json").write_text("{}")
    settings = {"tokenizer_file": str(folder.parent / "private.json")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')


LEAVING = {
    "shard": (_shard_elsewhere, "names ../elsewhere.safetensors, which is no file name in this folder"),
    "odd index": (_odd_index, "not a valid shard index"),
    "linked weights": (_link("model.safetensors"), "model.safetensors: is a link out of the folder"),
    "linked configuration": (_link("config.json"), "config.json: is a link out of the folder"),
    "linked tokenizer": (_link("tokenizer.json"), "tokenizer.json: is a link out of the folder"),
    "linked file of a module": (_link_in_a_module("../../../private/key"), "config.json: is a link out of the folder"),
    "linked folder of a module": (_link_in_a_module("../../../private"), "config.json: is a link out of the folder"),
    "folder that a module copies again": (_link_in_a_module("../.."), "config.json: is a link to a folder"),
    "module that holds itself": (_linked_module, "1_Pooling: is a link to a folder"),
    "tokenizer": (_tokenizer_elsewhere, "a file outside the folder"),
    "adapter": (_adapter, "holds an adapter"),
}


@pytest.mark.parametrize("case", LEAVING)
def test_names_that_leave_the_folder(case: str, run: Run, tiny_folder: Path) -> None:
    spoil, words = LEAVING[case]
    spoil(tiny_folder)
    refused(run("compress", "--model", tiny_folder, *COMPRESS), words)


def test_links_inside_a_folder_and_the_cache_of_the_hub_are_read(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "weights")
    (tiny_folder / "model.safetensors").symlink_to("weights")
    (tiny_folder / "loop").symlink_to("loop")  # nothing reads it
    compresskit.plan(tiny_folder, method="low-rank", ratio=2)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tiny_folder / name).resolve().rename(cache / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (cache / "blobs" / "pooling").write_text('{"pooling_mode_mean_tokens": true}')
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/pooling")
    (snapshot / "modules.json").write_text('[{"path": "1_Pooling"}]')
    assert run("compress", "--model", snapshot, *COMPRESS, "--output", "small").code == 0
    copied = Path("small/1_Pooling/config.json")
    assert not copied.is_symlink()
    assert "mean" in copied.read_text()


@pytest.mark.parametrize("name", ["../secret.tsv", "/etc/passwd", "a/../../b.tsv", "a\0.tsv"])
def test_tasks_name_files_below_the_data_folder(name: str) -> None:
    task = {"version": 1, "name": "own", "inputs": ["text"], "label": "kind", "metrics": ["accuracy"]}
    with pytest.raises(InputError, match="leads out of the data folder"):
        validate(Task, task | {"files": {"train": name}}, "task own")


def test_names_with_nul_bytes() -> None:
    with pytest.raises(InputError, match="no such folder"):
        compresskit.plan("a\0b", method="low-rank", ratio=2)
    with pytest.raises(InputError, match=r"cannot be read.*null"):
        compresskit.plan(tiny_model(), recipe="a\0b.yaml")


# -- code --


def test_a_bin_file_that_unpacks_to_more_than_its_size(run: Run, tiny_folder: Path) -> None:
    torch.save(load_file(tiny_folder / "model.safetensors"), tiny_folder / "plain.bin")
    (tiny_folder / "model.safetensors").unlink()
    with (
        zipfile.ZipFile(tiny_folder / "plain.bin") as plain,
        zipfile.ZipFile(tiny_folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
        packed.writestr("plain/data/99", b"\0" * 50_000_000)
    (tiny_folder / "plain.bin").unlink()
    refused(run("compress", "--model", tiny_folder, *COMPRESS), "unpacks to more than its size")


def test_a_bin_file_that_claims_more_than_it_holds(run: Run, tiny_folder: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    tensors["embeddings.word_embeddings.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(tensors, tiny_folder / "pytorch_model.bin")
    refused(run("compress", "--model", tiny_folder, *COMPRESS), "more numbers than it has bytes")


def test_pickles_in_a_checkpoint_of_the_trainer(bench_folder: Path, tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 12:
                raise KeyboardInterrupt

    settings = {"task": "sst2", "data": bench_folder / "data", "max_steps": 20, "save_every": 10, "max_length": 32}
    settings |= {"output": tmp_path / "out", "device": "cpu"}
    models = (bench_folder / "student", bench_folder / "teacher")
    with pytest.raises(KeyboardInterrupt):
        compresskit.distill(*models, callbacks=[Stop()], **settings)
    mark = tmp_path / "pwned"
    saved = tmp_path / "out.checkpoints" / "checkpoint-10"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (saved / name).read_bytes()
        torch.save({"x": Payload(mark)}, saved / name, pickle_module=pickle)
        with pytest.raises(InputError, match="more than plain tensors"):
            compresskit.distill(*models, resume=True, **settings)
        (saved / name).write_bytes(kept)
    torch.save(Payload(mark), saved / "training_args.bin", pickle_module=pickle)
    compresskit.distill(*models, resume=True, **settings)
    assert not mark.exists()
    endings = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert endings <= {".safetensors", ".json", ".md", ".yaml", ".png", ".txt"}


def test_code_beside_a_tokenizer_is_not_run(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("bert", "classifier").save_pretrained(folder)
    (folder / "vocab.txt").write_bytes((bench_folder / "model" / "vocab.txt").read_bytes())
    settings = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass EvilTokenizer: pass\n")
    result = run("evaluate", "--model", folder, "--task", "sst2", "--data", bench_folder / "data", "--max-length", 32)
    assert result.code in (0, 2), result  # a plain BertTokenizer serves, or none does
    assert "Traceback" not in result.err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("what", ["raise RuntimeError('surprise')", "import sys; sys.exit(3)", "x = = 1"])
def test_a_plugin_that_fails_when_it_is_imported(
    what: str, fresh: list[EntryPoint], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_plugin.py").write_text(what)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_plugin", raising=False)
    fresh.append(point("failing", "failing_plugin:Method"))
    assert run("methods").code == 0
    result = run("compress", "--method", "failing", "--ratio", 2)
    refused(result, "method 'failing' cannot be loaded: plug-in of failing_plugin:Method")
