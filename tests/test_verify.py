"""``compresskit verify``: every figure and hash of a folder against what it holds; every finding is a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, Run, tiny_model
from safetensors.torch import load_file, save_file

import compresskit
from compresskit import InputError
from compresskit.folders.compression import carry_record


@pytest.fixture
def small(run: Run, tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that the command wrote."""
    folder = tmp_path / "small"
    assert run("compress", "--model", tiny_folder, "--method", "tucker", "--ratio", 2, "--output", folder).code == 0
    return folder


def found(result: Result) -> list[str]:
    assert result.code == 1, result
    assert "Traceback" not in result.err
    return result.out.splitlines()


@pytest.mark.parametrize("method", ["group-reduce", "kronecker", "low-rank", "tensor-train", "tucker"])
@pytest.mark.parametrize("head", ["base", "masked-lm"])
def test_what_was_written_is_as_recorded(run: Run, tmp_path: Path, method: str, head: str) -> None:
    tiny_model("bert", head).save_pretrained(tmp_path / "dense")
    arguments = ("--method", method, "--ratio", 2, "--output", tmp_path / "small")
    assert run("compress", "--model", tmp_path / "dense", *arguments).code == 0
    result = run("verify", tmp_path / "small")
    assert result.code == 0, result
    assert "as recorded" in result.out
    assert compresskit.verify(tmp_path / "small") == []


def test_a_trained_folder_has_hashes_of_its_own(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    small, trained = tmp_path / "small", tmp_path / "trained"
    model = bench_folder / "model"
    assert run("compress", "--model", model, "--method", "low-rank", "--ratio", 2, "--output", small).code == 0
    models = {"student": small, "teacher": bench_folder / "teacher"}
    compresskit.distill(**models, task="sst2", data=bench_folder / "data", output=trained, max_steps=2, max_length=32)
    records = [json.loads((folder / "compression.json").read_text()) for folder in (small, trained)]
    assert records[0]["weights"] != records[1]["weights"]
    assert records[0]["groups"] == records[1]["groups"]
    assert compresskit.verify(trained) == []
    shutil.copyfile(small / "model.safetensors", trained / "model.safetensors")
    assert "damaged or changed" in compresskit.verify(trained)[0]


def _flip(folder: Path) -> None:
    """One bit in the middle of the weights."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def _edit_record(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "compression.json").read_text())
        change(record)
        (folder / "compression.json").write_text(json.dumps(record))

    return edit


def _spec(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["base"]["embeddings.word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("version: 1\nversion: 1\n")


FINDINGS = {
    "one bit": (_flip, "model.safetensors: damaged or changed: SHA-256"),
    "truncated": (_truncate, "model.safetensors: damaged or changed: bytes"),
    "ratio": (_edit_record(lambda r: r.update(ratio=3.0)), "compression.json: ratio 3.0, the folder has"),
    "parameters": (_edit_record(lambda r: r["parameters"].update(after=5)), "compression.json: parameters after 5"),
    "megabytes": (_edit_record(lambda r: r["megabytes"].update(after=1)), "compression.json: MB after 1"),
    "flops": (_edit_record(lambda r: r["flops"].update(after=1)), "compression.json: FLOPs after 1"),
    "group": (_edit_record(lambda r: r["groups"][0]["spec"].update(rank_in=1)), "is not the one in compression.json"),
    "lost group": (_edit_record(lambda r: r["groups"].pop()), "groups, compression.json has"),
    "other file": (_edit_record(lambda r: r["weights"].update(other={})), "other: is missing"),
    "no hashes": (_edit_record(lambda r: r.pop("weights")), "has no hashes of the weights"),
    "no figures": (_edit_record(lambda r: r.pop("parameters")), "an entry is missing or of another kind: parameters: "),
    "odd hashes": (_edit_record(lambda r: r.update(weights=[1])), "its entry weights is no list of files"),
    "a dense layer": (_spec, "lacks weight embeddings.word_embeddings.weight"),
    "pickle": (_pickle, "pytorch_model.bin: may hold code"),
    "recipe": (_recipe, "comes twice"),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_findings(case: str, run: Run, small: Path) -> None:
    spoil, words = FINDINGS[case]
    spoil(small)
    lines = found(run("verify", small))
    assert any(words in line for line in lines), lines


def test_a_record_of_another_version_may_hold_more_and_less(small: Path) -> None:
    """What is not needed to verify may be missing; what is not known is left alone, and goes on to a trained folder."""

    def change(record: dict) -> None:
        for name in ("objective", "dtype", "kept_tensors", "notes", "versions"):
            del record[name]
        del record["groups"][0]["output_error"]
        record["groups"][0]["colour"] = record["later"] = {"any": 1}

    _edit_record(change)(small)
    assert compresskit.verify(small) == []
    target = small.with_name("target")
    shutil.copytree(small, target)
    (target / "compression.json").unlink()
    carry_record(small, target)
    ours, theirs = (json.loads((folder / "compression.json").read_text()) for folder in (target, small))
    assert ours == theirs


def test_nothing_to_verify(run: Run, tmp_path: Path, small: Path, tiny_folder: Path) -> None:
    for folder, words in ((tmp_path / "nowhere", "no such folder"), (tiny_folder, "holds no compression.json")):
        result = run("verify", folder)
        assert result.code == 2
        assert words in result.err
    _edit_record(lambda record: record.update(format_version=2))(small)
    result = run("verify", small)
    assert result.code == 2
    assert "format version 2, this compresskit reads 1" in result.err


def test_load_refuses_changed_weights(run: Run, small: Path) -> None:
    _flip(small)
    with pytest.raises(InputError, match=r"model.safetensors: damaged or changed: SHA-256"):
        compresskit.load(small)
    result = run("evaluate", "--model", small, "--task", "sst2", "--data", small)
    assert result.code == 2
    (small / "compression.json").unlink()
    compresskit.load(small)


def test_load_refuses_nan_and_other_shapes(tmp_path: Path) -> None:
    compresskit.compress(tiny_model(), method="low-rank", ratio=2).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "encoder.layer.1.output.dense.a"
    for value, words in ((float("nan"), "holds NaN"), (float("-inf"), "holds NaN or infinity")):
        tensors = load_file(path)
        kept = tensors[name][2, 1].item()
        tensors[name][2, 1] = value
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"weight {name} {words}"):
            compresskit.load(tmp_path)
        tensors[name][2, 1] = kept
    save_file(tensors | {name: torch.zeros(2, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"weight {name} is 2x3, config.json says 48x\d+"):
        compresskit.load(tmp_path)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"bert": "cpu", "cls": "disk"}])
@pytest.mark.parametrize("method", ["low-rank", "tensor-train"])
def test_a_tied_head_is_not_spread_over_devices(method: str, device_map: dict[str, str], tmp_path: Path) -> None:
    """Its factors are another module's: they would be read while they lie on the disk."""
    compresskit.compress(tiny_model("bert", "masked-lm"), method=method, ratio=2).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="give one device"):
        compresskit.load(tmp_path / "small", device_map=device_map, offload_folder=tmp_path / "offload")
    assert compresskit.load(tmp_path / "small", device_map="cpu")
