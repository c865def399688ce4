"""A small data set of queries, corpus and relevant pairs, in BEIR's layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from conftest import reviews, write_tsv

from compresskit.tasks.declaration import Task
from compresskit.tasks.retrieval import METRICS

#: BEIR's layout.
TASK = {
    "version": 1,
    "name": "found",
    "kind": "retrieval",
    "inputs": ["query-id", "corpus-id"],
    "label": "score",
    "files": {"dev": "qrels/test.tsv"},
    "tables": {"queries": "queries.jsonl", "corpus": "corpus.jsonl"},
    "metrics": list(METRICS),
}


PAIRS = {key: value for key, value in TASK.items() if key != "tables"} | {
    "inputs": ["query", "passage"],
    "files": {"dev": ["pairs.csv", "pairs.json"]},
}


QUERIES = [{"_id": f"q{i}", "text": text} for i, (text, _) in enumerate(reviews(12, seed=5))]


CORPUS = [
    {"_id": f"d{i}", "title": "a film" if i % 3 else "", "text": text}
    for i, (text, _) in enumerate(reviews(40, seed=6))
]


def pairs(queries: int = 12) -> list[tuple[str, str, str]]:
    chance = random.Random(0)
    return [(f"q{i}", f"d{j}", str(chance.randint(0, 2))) for i in range(queries) for j in chance.sample(range(40), 6)]


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def write(
    folder: Path,
    relevant: list[tuple[str, ...]] | None = None,
    queries: list[dict[str, Any]] = QUERIES,
    corpus: list[dict[str, Any]] = CORPUS,
) -> Path:
    """A data set in BEIR's layout."""
    write_json(folder / "queries.jsonl", queries)
    write_json(folder / "corpus.jsonl", corpus)
    write_tsv(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", pairs() if relevant is None else relevant)
    return folder


def declared(**changes: Any) -> Task:
    return Task.model_validate(TASK | changes)
