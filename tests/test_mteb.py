"""mteb's own tasks run unchanged on a student's folder and find the scores of ``evaluate``. They get the rows that they
would download.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import reviews, sentence_folder, write_tsv
from datasets import Dataset

import compresskit

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install compresskit[mteb]")

TEXTS = [text for text, _ in reviews(60, seed=7)]


def run(folder: Path, name: str, rows: dict[str, Any]) -> dict[str, Any]:
    """The scores of mteb's task ``name`` with these rows."""
    from sentence_transformers import SentenceTransformer

    task = mteb.get_task(name)
    task.dataset, task.data_loaded = rows, True
    model = SentenceTransformer(str(folder), device="cpu")
    results = mteb.evaluate(model, task, cache=None, raise_error=True)
    (scores,) = next(iter(results.task_results[0].scores.values()))
    return dict(scores)


def test_a_student_on_mteb_finds_the_same_similarities(bench_folder: Path, tmp_path: Path) -> None:
    folder = sentence_folder(bench_folder / "student", tmp_path / "small")
    rows = [(TEXTS[i], TEXTS[59 - i], str(random.Random(i).uniform(0, 5))) for i in range(30)]
    columns = {"sentence1": [a for a, _, _ in rows], "sentence2": [b for _, b, _ in rows]}
    data = Dataset.from_dict(columns | {"score": [float(score) for _, _, score in rows]})
    theirs = run(folder, "STSBenchmark", {"test": data})
    write_tsv(tmp_path / "dev.tsv", "sentence1\tsentence2\tscore", rows)
    ours = compresskit.evaluate(folder, task="stsb-similarity", data=tmp_path, device="cpu").record["scores"]["dev"]
    assert ours == pytest.approx({name: theirs[f"cosine_{name}"] for name in ("spearman", "pearson")}, abs=1e-4)


def test_a_student_on_mteb_finds_the_same_documents(bench_folder: Path, tmp_path: Path) -> None:
    folder = sentence_folder(bench_folder / "student", tmp_path / "small")
    queries = {f"q{i}": text for i, (text, _) in enumerate(reviews(10, seed=8))}
    corpus = {f"d{i:02}": text for i, text in enumerate(TEXTS)}
    relevant = {query: random.Random(query).sample(list(corpus), 4) for query in queries}
    texts = [Dataset.from_dict({"id": list(of), "text": list(of.values())}) for of in (queries, corpus)]
    split = {
        "queries": texts[0],
        "corpus": texts[1],
        "relevant_docs": {query: dict.fromkeys(found, 1) for query, found in relevant.items()},
        "top_ranked": None,
    }
    theirs = run(folder, "NanoSciFactRetrieval", {"default": {"train": split}})

    place = tmp_path / "NanoSciFact"
    pairs = [(query, document, "1") for query, found in relevant.items() for document in found]
    write_tsv(place / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", pairs)
    for name, of in (("queries", queries), ("corpus", corpus)):
        lines = [json.dumps({"_id": identity, "text": text}) for identity, text in of.items()]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    found = compresskit.evaluate(folder, task="nano-scifact", data=tmp_path, device="cpu").record["scores"]["dev"]
    assert found == pytest.approx({name: theirs[name.replace("@", "_at_")] for name in found}, abs=1e-4)
