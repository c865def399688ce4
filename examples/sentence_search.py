"""Search sentences by meaning with a compressed sentence-transformers model.

    compresskit compress --method low-rank --ratio 4 --output small/
    python sentence_search.py small/ "where do cats sleep" sentences.txt

One-shot models find less than their original: distil them first (``compresskit distill``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer, util

import compresskit  # noqa: F401 - lets sentence-transformers read the factorised layers


def search(model: SentenceTransformer, query: str, sentences: list[str], top: int = 3) -> list[tuple[float, str]]:
    """The sentences nearest to the query, with their cosine similarity."""
    vectors = model.encode(sentences, convert_to_tensor=True)
    (found,) = util.semantic_search(model.encode([query], convert_to_tensor=True), vectors, top_k=top)
    return [(float(hit["score"]), sentences[int(hit["corpus_id"])]) for hit in found]


if __name__ == "__main__":
    folder, query, file = sys.argv[1:]
    sentences = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    for score, sentence in search(SentenceTransformer(folder), query, sentences):
        print(f"{score:.3f}\t{sentence}")
