"""Exports where others look for them, without a network: transformers.js in Node and in a browser, and
sentence-transformers with its ONNX backend.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentence_folder, tiny_model
from test_page import BROWSER
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

import compresskit
from compresskit.errors import InputError
from compresskit.model import sentence

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "browser"
TEXTS = ["the film was very good", "an awful plot"]
needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (EXAMPLE / "node_modules" / "@huggingface").is_dir(),
    reason="node, or transformers.js in examples/browser (npm install there), is not at hand",
)


@pytest.fixture(scope="module")
def models(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier in float and in 8 bits, a sentence encoder, and a tagger, as students and as exports."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tagger = AutoModelForTokenClassification.from_config(tiny_model(num_labels=3).config)
    sources = {"classifier": bench_folder / "teacher", "encoder": bench_folder / "model", "tagger": tagger}
    for name, source in sources.items():
        small = compresskit.compress(source, method="low-rank", ratio=2)
        small.save_pretrained(root / "students" / name)
        AutoTokenizer.from_pretrained(bench_folder / "model").save_pretrained(root / "students" / name)
        compresskit.export(root / "students" / name, output=root / name, layout="hub")
    for name, form, runtime in (
        ("small", "onnx-int8", "any"), ("fast", "onnx-int8", "onnxruntime"), ("smallest", "onnx-int4", "onnxruntime"),
    ):  # fmt: skip
        student = root / "students" / "classifier"
        compresskit.export(student, output=root / name, format=form, runtime=runtime, layout="hub")
    return root


def in_node(models: Path, name: str, task: str) -> list[Any]:
    line = ["node", "run.mjs", str(models), name, task, *TEXTS]
    done = subprocess.run(line, cwd=EXAMPLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_files_lie_where_the_hub_has_them(models: Path) -> None:
    for name, graph in (("classifier", "model.onnx"), ("small", "model_quantized.onnx")):
        record = json.loads((models / name / "export.json").read_text())
        assert {"config.json", "tokenizer.json", "tokenizer_config.json", f"onnx/{graph}"} <= set(record["files"])
        assert record["megabytes"]["exported"] == (models / name / "onnx" / graph).stat().st_size / 1e6
        assert record["agreement"]


def test_refused(bench_folder: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layout"):
        compresskit.export(models / "students" / "classifier", output=tmp_path / "out", layout="web")
    bare = shutil.copytree(models / "students" / "classifier", tmp_path / "bare")
    for file in (*bare.glob("tokenizer*"), *bare.glob("vocab*"), *bare.glob("special*")):
        file.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer, and layout hub needs a tokenizer\.json"):
        compresskit.export(bare, output=tmp_path / "out", layout="hub")
    assert not (tmp_path / "out").exists()


@needs_node
@pytest.mark.parametrize("name", ["classifier", "small", "fast", "smallest"])
def test_node_classifies_alike(models: Path, name: str) -> None:
    model = compresskit.load(models / "students" / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(models / "classifier")
    student = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
    for found, expected in zip(in_node(models, name, "text-classification"), student(TEXTS), strict=True):
        shares = {entry["label"]: entry["score"] for entry in expected}
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
            shares, abs={"classifier": 1e-4, "smallest": 0.1}.get(name, 0.03)
        )


@needs_node
def test_node_encodes_alike(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "encoder")
    model = compresskit.load(models / "students" / "encoder").eval()
    for found, text in zip(in_node(models, "encoder", "feature-extraction"), TEXTS, strict=True):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)
        assert torch.allclose(torch.tensor(found), torch.nn.functional.normalize(mean), atol=1e-4)


@needs_node
def test_node_tags_alike(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "tagger")
    model = compresskit.load(models / "students" / "tagger").eval()
    for found, text in zip(in_node(models, "tagger", "token-classification"), TEXTS, strict=True):
        with torch.inference_mode():
            shares = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1:-1]
        assert [entry["entity"] for entry in found] == [model.config.id2label[int(n)] for n in shares.argmax(-1)]
        assert [entry["score"] for entry in found] == pytest.approx(shares.amax(-1).tolist(), abs=1e-4)


@needs_node
@pytest.mark.skipif(BROWSER is None, reason="no chromium is at hand")
@pytest.mark.parametrize("name", ["small", "fast", "smallest"])
def test_page_classifies_with_what_lies_beside_it(name: str, models: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    (tmp_path / "index.html").write_bytes((EXAMPLE / "index.html").read_bytes())
    (tmp_path / "node_modules").symlink_to(EXAMPLE / "node_modules")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small").symlink_to(models / name)
    asked: list[str] = []
    with serving(tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        if name == "smallest":  # WebAssembly's ONNX Runtime has no look-up of 4-bit rows; the page says so
            page.goto(f"{address}?dtype=q4")
            page.wait_for_function("document.getElementById('state').textContent.includes('GatherBlockQuantized')")
            return
        page.goto(address)
        page.wait_for_selector("body[data-answer]", timeout=60_000)
        page.fill("#text", TEXTS[0])
        page.wait_for_timeout(1000)
        found = json.loads(page.evaluate("document.body.dataset.answer"))
        downloaded = page.inner_text("#download")
        if shown := os.environ.get("PICTURE"):
            page.screenshot(path=shown)
        browser.close()
    expected = in_node(models, name, "text-classification")[0]
    shares = {entry["label"]: entry["score"] for entry in expected}
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(shares, abs=1e-3)
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)
    # The page says of its download what the program reads in the files.
    line = ["node", "download.mjs", str(models), name]
    told = subprocess.run(line, cwd=EXAMPLE, capture_output=True, text=True, check=True).stdout
    parts = re.findall(r": ([\d.]+) MB, gzip [\d.]+ MB", told)
    assert re.findall(r"([\d.]+) MB", downloaded) == [parts[0], parts[1], parts[3]]


#: A Python with optimum-onnx, which asks for older versions of transformers than compresskit reads.
BACKEND = os.environ.get("ONNX_BACKEND_PYTHON", sys.executable)
ENCODE = """
import sys, json, numpy
from sentence_transformers import SentenceTransformer
folder, target, options, *texts = sys.argv[1:]
options = json.loads(options)
model = SentenceTransformer(folder, backend="onnx", device="cpu", local_files_only=True, model_kwargs=options)
numpy.save(target, model.encode(texts))
"""


@pytest.mark.parametrize("layout", ["hub", "plain"])
@pytest.mark.parametrize("behind", ["Normalize", "Dense"])
def test_an_exported_encoder_has_what_sentence_transformers_reads(
    behind: str, layout: str, bench_folder: Path, tmp_path: Path
) -> None:
    out = compresskit.export(encoder(behind, bench_folder, tmp_path), output=tmp_path / "out", layout=layout)
    files = set(out.record["files"])
    graph = "onnx/model.onnx" if layout == "hub" else "model.onnx"
    assert {graph, "config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"} <= files
    assert ("2_Dense/model.safetensors" in files) == (behind == "Dense")
    assert "model.safetensors" not in files
    assert ("sentence_embedding" in out.record["outputs"]) == (behind == "Normalize")
    assert any(note.startswith("no output sentence_embedding") for note in out.notes) == (behind == "Dense")


@pytest.mark.skipif(
    subprocess.run([BACKEND, "-c", "import optimum.onnxruntime"], capture_output=True, check=False).returncode != 0,
    reason="optimum-onnx is not at hand: ONNX_BACKEND_PYTHON may name a Python that has it, with sentence-transformers",
)
def test_the_onnx_backend_of_sentence_transformers_gives_the_same_vectors(bench_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    for behind in ("Normalize", "Dense"):
        student = encoder(behind, bench_folder, tmp_path / behind)
        expected = SentenceTransformer(str(student), device="cpu").encode(TEXTS)
        for name, options, most in (
            ("hub", {"layout": "hub"}, 1e-4),
            ("plain", {"runtime": "onnxruntime"}, 1e-4),
            ("small", {"layout": "hub", "format": "onnx-int8"}, 0.1),
        ):
            out = tmp_path / behind / name
            compresskit.export(student, output=out, **options)  # type: ignore[arg-type]
            settings = json.dumps({"file_name": "model_quantized.onnx"} if name == "small" else {})
            line = [BACKEND, "-c", ENCODE, str(out), str(tmp_path / "vectors.npy"), settings, *TEXTS]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert np.abs(np.load(tmp_path / "vectors.npy") - expected).max() <= most, (behind, name)


def encoder(behind: str, bench_folder: Path, root: Path) -> Path:
    """A compressed sentence encoder; ``Dense``: with a linear map behind the pooling."""
    folder = sentence_folder(bench_folder / "student", root / "student", behind=("Normalize",) * (behind != "Dense"))
    if behind == "Dense":
        width = 48
        sentence.append_linear(folder, torch.randn(8, width), width=width, normalised=False, hidden_size=width)
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A folder over HTTP on this machine; its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
