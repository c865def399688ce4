"""Search texts by meaning with a compressed sentence-transformers model: a small index on disk, then questions to it.

    cat texts/*.txt > texts.txt
    compresskit shrink --text texts.txt --ratio 8 --output small/
    python sentence_search.py index small/ texts/ index/        # every .txt file below texts/, sentence by sentence
    python sentence_search.py search index/ "where do cats sleep"
    python sentence_search.py search index/ "where do cats sleep" small/    # a teacher's index, searched by its student

It needs sentence-transformers (pip install sentence-transformers).

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
    index.mkdir(parents=True)  # fails before anything is computed where there is one
    found = [
        {"file": str(file.relative_to(texts)), "sentence": sentence.strip()}
        for file in sorted(texts.rglob("*.txt"))
        for sentence in sentencex.segment("en", file.read_text(encoding="utf-8"))
        if sentence.strip()
    ]
    vectors = SentenceTransformer(model).encode([entry["sentence"] for entry in found], normalize_embeddings=True)
    np.save(index / "vectors.npy", vectors.astype(np.float16))
    about = {"model": str(Path(model).resolve()), "sentences": found}
    (index / "index.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return len(found)


def search(index: Path, query: str, model: str | None = None, top: int = 3) -> list[tuple[float, str, str]]:
    """The sentences nearest to the query: cosine, sentence, file. The query's vector is that of the index's model, or
    of another one in the same space, such as a student of it.
    """
    about = json.loads((index / "index.json").read_text(encoding="utf-8"))
    vectors = np.load(index / "vectors.npy").astype(np.float32)
    asked = SentenceTransformer(model or about["model"]).encode([query], normalize_embeddings=True)
    (found,) = util.semantic_search(asked, vectors, top_k=top)
    hits = [(hit["score"], about["sentences"][hit["corpus_id"]]) for hit in found]
    return [(float(score), entry["sentence"], entry["file"]) for score, entry in hits]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["index", model, texts, index]:
            print(f"{build(model, Path(texts), Path(index)):,} sentences in {index}")
        case ["search", index, query, *other] if len(other) < 2:
            for score, sentence, file in search(Path(index), query, *other):
                print(f"{score:.3f}\t{sentence}\t{file}")
        case _:
            sys.exit("usage: sentence_search.py index MODEL TEXTS INDEX, or search INDEX QUERY [MODEL]")
