"""Exports for OpenVINO, with the real package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import quick, tiny_model
from test_export import student
from transformers import AutoTokenizer

import compresskit
from compresskit.exporting.format import FORMATS

pytest.importorskip("openvino", reason="openvino is not installed: pip install compresskit[openvino]")


@pytest.mark.parametrize("head", quick(["classifier", "answers", "base"], "classifier"))
def test_answers_are_those_of_torch(head: str, bench_folder: Path, tmp_path: Path) -> None:
    model = student(head) if head != "base" else compresskit.compress(tiny_model(), method="kronecker", ratio=2)
    model.save_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    tokenizer.save_pretrained(tmp_path / "small")
    done = compresskit.export(tmp_path / "small", output=tmp_path / "out", format="openvino")
    assert max(found["largest difference"] for found in done.record["agreement"].values()) < 1e-4
    assert {"openvino/openvino_model.xml", "openvino/openvino_model.bin"} <= set(done.record["files"])
    assert "model.onnx" not in done.record["files"]
    assert "openvino" in json.loads((tmp_path / "out" / "export.json").read_text())["versions"]
    run = FORMATS.get("openvino").load(tmp_path / "out")
    batch = tokenizer(["the film was very good", "bad"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch)
    for name, found in run(**batch).items():
        if name in expected:
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)
