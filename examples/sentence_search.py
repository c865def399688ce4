"""Search texts by meaning with a compressed sentence-transformers model: a small index on disk, then questions to it.

    compresskit compress --method auto --ratio 8 --calibration texts.txt --output cut/
    compresskit distill --student cut/ --text texts.txt --unit sentence --output small/
    python sentence_search.py index small/ texts/ index/        # every .txt file below texts/, sentence by sentence
    python sentence_search.py search index/ "where do cats sleep"

The index holds the sentences, where they stand, and their vectors in 16 bits: 0.8 kB a sentence for vectors of 384.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import sentencex
from sentence_transformers import SentenceTransformer, util

import compresskit  # noqa: F401 - lets sentence-transformers read the factorised layers


def build(model: str, texts: Path, index: Path) -> int:
    """Write an index of every sentence of the .txt files below a folder; how many there are."""
    found = [
        {"file": str(file.relative_to(texts)), "sentence": sentence.strip()}
        for file in sorted(texts.rglob("*.txt"))
        for sentence in sentencex.segment("en", file.read_text(encoding="utf-8"))
        if sentence.strip()
    ]
    vectors = SentenceTransformer(model).encode([entry["sentence"] for entry in found], normalize_embeddings=True)
    index.mkdir(parents=True)
    np.save(index / "vectors.npy", vectors.astype(np.float16))
    about = {"model": str(Path(model).resolve()), "sentences": found}
    (index / "index.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return len(found)


def search(index: Path, query: str, top: int = 3) -> list[tuple[float, str, str]]:
    """The sentences nearest to the query: cosine, sentence, file."""
    about = json.loads((index / "index.json").read_text(encoding="utf-8"))
    vectors = np.load(index / "vectors.npy").astype(np.float32)
    asked = SentenceTransformer(about["model"]).encode([query], normalize_embeddings=True)
    (found,) = util.semantic_search(asked, vectors, top_k=top)
    hits = [(hit["score"], about["sentences"][hit["corpus_id"]]) for hit in found]
    return [(float(score), entry["sentence"], entry["file"]) for score, entry in hits]


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "index":
        print(f"{build(given[0], Path(given[1]), Path(given[2])):,} sentences in {given[2]}")
    else:
        for score, sentence, file in search(Path(given[0]), given[1]):
            print(f"{score:.3f}\t{sentence}\t{file}")
