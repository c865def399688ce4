"""Exported models: ONNX Runtime and ordinary checkpoints against torch, sizes, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import HEADS, Run, outputs, refused, tiny_model
from transformers import AutoModel, PreTrainedModel

import compresskit
from compresskit import InputError
from compresskit.cli.export import FORMATS
from compresskit.decomposers.base import FactorisedEmbedding, FactorisedLinear
from compresskit.decomposers.registry import METHODS
from compresskit.exporting import formats
from compresskit.exporting.agreement import example_inputs
from compresskit.exporting.graph import to_graph  # before conftest puts its store of traced models in this place
from compresskit.exporting.int8 import to_int8
from compresskit.model import checkpoint
from compresskit.model.targets import count_parameters

METHODS = list(METHODS.all())
OTHER_HEADS = {
    "tokens": transformers.AutoModelForTokenClassification,
    "answers": transformers.AutoModelForQuestionAnswering,
    "choice": transformers.AutoModelForMultipleChoice,
}


def student(head: str = "classifier", method: str = "low-rank", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random compressed model with one layer: every layer adds seconds to an export."""
    dense = tiny_model("bert", head if head in HEADS else "base", num_hidden_layers=1)
    if head in OTHER_HEADS:
        dense = OTHER_HEADS[head].from_config(dense.config)
    return compresskit.compress(dense.to(dtype), method=method, ratio=2).eval()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A compressed classifier on disk."""
    student().save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    return tmp_path / "small"


def check(model: PreTrainedModel, file: Path, near: Callable[[np.ndarray, np.ndarray], bool]) -> None:
    """Every output of the file, at sizes the graph was not traced with."""
    session = onnxruntime.InferenceSession(file)
    names = [value.name for value in session.get_outputs()]
    for batch, length in ((1, 1), (4, 30), (3, 7)):
        inputs = example_inputs(model, batch, length)
        with torch.no_grad():
            expected = model.float()(**inputs)
        got = session.run(names, {name: ids.numpy() for name, ids in inputs.items()})
        for name, values in zip(names, got, strict=True):
            assert near(values, expected[name].numpy()), (name, batch, length)


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-4)


def similar(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(got - expected) <= 0.03 * np.linalg.norm(expected))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_onnx_and_int8(method: str, tmp_path: Path) -> None:
    """As masked-LM, whose tied head computes with the factors that the look-up reads."""
    model = student("masked-lm", method)
    graph = to_graph(model, formats.OPSET)
    onnx_ir.save(graph, tmp_path / "model.onnx")
    check(model, tmp_path / "model.onnx", same)
    constants = {name: value.const_value for name, value in graph.graph.initializers.items()}
    factors = sum(tensor.nbytes for tensor in constants.values())
    assert factors <= 1.02 * 4 * count_parameters(model)  # nothing multiplied out, the tied table once
    assert (tmp_path / "model.onnx").stat().st_size < factors + 60_000

    to_int8(graph)
    onnx_ir.save(graph, tmp_path / "int8.onnx")
    check(model, tmp_path / "int8.onnx", similar)
    tables = [node.inputs[0].const_value for node in graph.graph if node.op_type == "Gather"]
    largest = max((table for table in tables if table is not None), key=lambda table: table.size)
    assert largest.dtype == onnx_ir.DataType.INT8  # the look-up reads codes


#: Each with another operator set or stored dtype, which go with any head.
VARIANTS = {
    "classifier": (formats.OPSETS[0], torch.float32),
    "answers": (formats.OPSETS[-1], torch.float16),
    "tokens": (None, torch.bfloat16),
    "choice": (None, torch.float32),
}


@pytest.mark.parametrize("head", VARIANTS)
def test_every_head_in_onnx(head: str, tmp_path: Path) -> None:
    opset, dtype = VARIANTS[head]
    model = student(head, dtype=dtype)
    model.save_pretrained(tmp_path / "small")
    done = compresskit.export(tmp_path / "small", output=tmp_path / "out", opset=opset)
    check(model, tmp_path / "out" / "model.onnx", same)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record == done.record
    assert record["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(found["largest difference"] < 1e-4 for found in record["agreement"].values())
    assert onnx_ir.load(tmp_path / "out" / "model.onnx").opset_imports[""] == record["opset"] == (opset or 20)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_dense_is_an_ordinary_checkpoint(head: str, method: str, tmp_path: Path) -> None:
    model = student(head, method)
    model.save_pretrained(tmp_path / "small")
    done = compresskit.export(tmp_path / "small", output=tmp_path / "dense", format="dense")
    dense = HEADS[head].from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, FactorisedLinear | FactorisedEmbedding) for module in dense.modules())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(outputs(dense), outputs(model), rtol=1e-4, atol=1e-5)
    assert all(found["largest difference"] < 1e-4 for found in done.record["agreement"].values())


def test_minilm_19x_in_int8_is_55_times_smaller(run: Run, embedded: Path) -> None:
    assert run("compress", "--method", "low-rank", "--ratio", 19, "--output", "small").code == 0
    result = run("export", "small", "--format", "onnx-int8")
    assert result.code == 0, result.err
    folder = Path("small-onnx-int8")
    original = (embedded / "model.safetensors").stat().st_size
    assert (folder / "model.onnx").stat().st_size <= original / 55
    assert "before compression 90.87 MB" in result.out
    assert {"config.json", "tokenizer.json", "export.json"} <= {path.name for path in folder.iterdir()}
    record = json.loads((folder / "export.json").read_text())
    assert record["megabytes"]["original"] == original / 1e6
    assert 0 < record["agreement"]["last_hidden_state"]["relative error"] < 0.1


def test_overwrite(run: Run, small: Path) -> None:
    arguments = ("export", small, "--format", "dense", "--output", "out")
    assert run(*arguments).code == 0
    assert Path("out/vocab.txt").is_file()
    again = run(*arguments)
    assert again.code == 2
    assert "exists" in again.err
    assert run(*arguments, "--overwrite").code == 0
    result = run("export", "out", "--output", "../work/out", "--overwrite")
    assert result.code == 2
    assert "is the model itself" in result.err


def test_a_dense_folder_is_refused(run: Run, tiny_folder: Path) -> None:
    refused(run("export", tiny_folder), "is not compressed; make it with `compresskit compress`")
    refused(run("export", tiny_folder.parent / "nowhere/"), "no such folder")


def test_a_missing_extra_says_what_to_install(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else object())
    refused(run("export", small), "format onnx: onnxruntime missing; install the extra 'onnx'")
    assert run("export", small, "--format", "dense").code == 0  # needs none


def test_bad_choices(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("export", small, "--opset", 99), "opset 99: can be written from 18 to 25")
    refused(run("export", small, "--opset", 20, "--format", "dense"), "an opset is for")
    refused(run("export", small, "--output", "/proc/out"), "cannot be written")
    with pytest.raises(InputError, match="unknown format 'onx': did you mean 'onnx'"):
        compresskit.export(small, output="out", format="onx")  # type: ignore[arg-type]
    monkeypatch.setattr(formats, "_LARGEST_FILE", 1000)
    refused(run("export", small), "an ONNX file holds up to 2.1 GB")


def test_what_differs_from_torch_is_not_written(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    refused(run("export", small), "ONNX Runtime differs from torch", "nothing was written", code=1)


def test_kept_factors_are_named_where_they_are_left_out(tmp_path: Path) -> None:
    """A masked-LM student keeps the pooler's factors, which its class does not use."""
    compresskit.compress(tiny_model(num_hidden_layers=1), method="low-rank", ratio=2).save_pretrained(tmp_path / "base")
    words = checkpoint.read(
        tmp_path / "base", compressed=True, adopt=tiny_model("bert", "masked-lm", num_hidden_layers=1)
    )
    (tmp_path / "words").mkdir()
    checkpoint.save(words, tmp_path / "words")
    done = compresskit.export(tmp_path / "words", output=tmp_path / "dense", format="dense")
    assert any("left out" in note and "pooler.dense.a" in note for note in done.notes)
    AutoModel.from_pretrained(tmp_path / "dense")


def test_formats_of_the_command_are_those_of_the_function() -> None:
    assert get_args(formats.Format) == FORMATS
