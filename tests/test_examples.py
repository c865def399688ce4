"""The programs in examples/ run as they are; those for a device where torch is not installed."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import FILLERS, NEGATIVE, POSITIVE, count, reviews, write_tsv
from sentence_transformers import SentenceTransformer, util
from transformers import pipeline

import compresskit

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a program says, in this process, which has the libraries loaded."""

    def call(name: str, *arguments: object) -> str:
        assert "import compresskit  # noqa" in (EXAMPLES / name).read_text()  # here it is imported already
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def run(*line: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, line)], env=os.environ | environment, capture_output=True, text=True, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Site-packages of a small device: links to what the example needs, and to nothing else."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("numpy", "onnxruntime", "tokenizers", "flatbuffers", "protobuf", "packaging"):
        files = metadata.files(name) or []
        for part in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            place = Path(str(files[0].locate())).parents[len(files[0].parts) - 1] / part
            if not (site / part).exists():
                (site / part).symlink_to(place)
    return site


def test_classify_without_torch(bench_folder: Path, device: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    compresskit.compress(bench_folder / "teacher", method="low-rank", ratio=1.5).save_pretrained(student)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (student / file).write_bytes((bench_folder / "model" / file).read_bytes())
    compresskit.export(student, format="onnx-int8", output=tmp_path / "device")
    for absent in ("torch", "transformers", "compresskit"):
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({absent!r}) is not None)"
        run("-S", "-c", code, PYTHONPATH=str(device))
    texts = [f"the {POSITIVE[0]} film", f"the plot was very {NEGATIVE[0]}", FILLERS[0]]
    said = run("-S", EXAMPLES / "classify_onnx.py", tmp_path / "device", *texts, PYTHONPATH=str(device))
    rows = [line.split("\t") for line in said.splitlines()]
    assert [row[2] for row in rows] == texts
    classify = pipeline("text-classification", model=str(student), device="cpu")
    for (label, share, _), expected in zip(rows, classify(texts), strict=True):
        assert label == expected["label"]
        assert float(share) == pytest.approx(expected["score"], abs=0.05)


def test_sentence_search(example: Callable[..., str], small_sentence: Path, tmp_path: Path) -> None:
    sentences = [
        "Cats sleep on warm sofas.",
        "The stock market fell.",
        "Trains leave every hour.",
        "Bread needs yeast.",
    ]
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text(" ".join(sentences[1:]), encoding="utf-8")
    (tmp_path / "texts" / "more" / "b.txt").write_text(sentences[0], encoding="utf-8")
    said = example("sentence_search.py", "index", small_sentence, tmp_path / "texts", tmp_path / "index")
    assert said.startswith("4 sentences")
    said = example("sentence_search.py", "search", tmp_path / "index", "where do kittens rest")
    best = said.splitlines()[0].split("\t")
    assert best[1:] == [sentences[0], "more/b.txt"]
    assert 0 < float(best[0]) <= 1
    assert example("sentence_search.py", "search", tmp_path / "index", "where do kittens rest", small_sentence) == said
    with pytest.raises(SystemExit, match="usage"):
        example("sentence_search.py", "search", tmp_path / "index")
    with pytest.raises(FileExistsError):
        example("sentence_search.py", "index", small_sentence, tmp_path / "texts", tmp_path / "index")


def test_sentence_search_without_torch(
    example: Callable[..., str], small_sentence: Path, device: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    sentences = [
        "Cats sleep on warm sofas.",
        "The stock market fell.",
        "Trains leave every hour.",
        "Bread needs yeast!",
    ]
    (texts / "a.txt").write_text("\n".join(sentences[:2]) + "\n\n" + " ".join(sentences[2:]), encoding="utf-8")
    exported = tmp_path / "device"
    compresskit.export(small_sentence, format="onnx", output=exported)
    index, own = tmp_path / "index", tmp_path / "own"
    assert example("sentence_search.py", "index", small_sentence, texts, index).startswith("4 sentences")

    def on_the_device(*arguments: object) -> str:
        return run("-S", EXAMPLES / "sentence_search.py", *arguments, PYTHONPATH=str(device))

    assert on_the_device("index", exported, texts, own).startswith("4 sentences")
    there = np.load(own / "vectors.npy").astype(np.float32)
    np.testing.assert_allclose(there, np.load(index / "vectors.npy").astype(np.float32), atol=2e-3)  # 16 bits
    for question in ("where do kittens rest", "when does the train go"):
        ours = example("sentence_search.py", "search", index, question).splitlines()
        for theirs in (on_the_device("search", index, question, exported), on_the_device("search", own, question)):
            for left, right in zip(ours, theirs.splitlines(), strict=True):
                assert left.split("\t")[1:] == right.split("\t")[1:]
                assert float(left.split("\t")[0]) == pytest.approx(float(right.split("\t")[0]), abs=2e-3)


def test_sentence_search_takes_the_prompts_of_the_model(
    example: Callable[..., str], small_sentence: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_sentence, model)
    general = json.loads((model / "config_sentence_transformers.json").read_text())
    prompts = {"query": "the price of shares: ", "document": "a train at noon: "}
    (model / "config_sentence_transformers.json").write_text(json.dumps(general | {"prompts": prompts}))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Cats sleep on warm sofas.", encoding="utf-8")
    example("sentence_search.py", "index", model, tmp_path / "texts", tmp_path / "index")
    said = example("sentence_search.py", "search", tmp_path / "index", "where do kittens rest")
    read = SentenceTransformer(str(model))
    vectors = read.encode_query("where do kittens rest"), read.encode_document("Cats sleep on warm sofas.")
    expected = float(util.cos_sim(*vectors))
    assert float(said.partition("\t")[0]) == pytest.approx(expected, abs=2e-3)


def test_continue_training(example: Callable[..., str], bench_folder: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    compresskit.compress(bench_folder / "teacher", method="kronecker", ratio=3).save_pretrained(student)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (student / file).write_bytes((bench_folder / "model" / file).read_bytes())
    rows = [(text, ["bad", "good"][int(label)]) for text, label in reviews(400, seed=3)]
    write_tsv(tmp_path / "reviews.tsv", "text\tlabel", rows)
    example("continue_training.py", student, tmp_path / "reviews.tsv", tmp_path / "better")
    model = compresskit.load(tmp_path / "better")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert count(model) == count(compresskit.load(student))

    texts, labels = zip(*reviews(100, seed=4), strict=True)

    def right(folder: Path) -> int:
        answers = pipeline("text-classification", model=str(folder), device="cpu")(list(texts))
        return sum(
            answer["label"] in (("negative", "bad"), ("positive", "good"))[int(label)]
            for answer, label in zip(answers, labels, strict=True)
        )

    assert right(tmp_path / "better") > right(student) + 10
