"""Search texts by meaning with a compressed sentence-transformers model: a small index on disk, then questions to it.

    compresskit shrink --text texts/ --ratio 8 --output small/
    python sentence_search.py index small/ texts/ index/        # every .txt file below texts/, sentence by sentence
    python sentence_search.py search index/ "where do cats sleep"
    python sentence_search.py search index/ "where do cats sleep" small/    # a teacher's index, searched by its student

That needs sentence-transformers (pip install sentence-transformers) and compresskit. On a small device onnxruntime,
tokenizers and numpy are enough, for both commands, with what `compresskit export` wrote:

    compresskit export small/ --format onnx-int8 --output device/           # on your own machine
    python sentence_search.py search index/ "where do cats sleep" device/   # on the device

The index holds the sentences, where they stand, and their vectors in 16 bits: 0.8 kB a sentence for vectors of 384.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: Texts that pass through an exported model together.
BATCH = 32
#: Where a sentence ends. compresskit itself cuts with more care, by the package sentencex.
END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
#: What says how texts are read: length and case, and the prompt in front of them.
_SAYS = ("sentence_bert_config", "config_sentence_transformers")
#: Texts -> their vectors, (texts, numbers), each of length 1.
Encoder = Callable[[list[str]], np.ndarray]


def encoder(folder: str, role: str) -> Encoder:
    """How a model makes vectors: an exported one by ONNX Runtime, another one by sentence-transformers.

    Args:
        folder: of the model.
        role: ``query`` or ``document``: some models are trained with another prompt in front of each.
    """
    if (Path(folder) / "export.json").is_file():
        return Exported(Path(folder), role)
    from sentence_transformers import SentenceTransformer

    import compresskit  # noqa: F401 - lets sentence-transformers read the factorised layers

    model = SentenceTransformer(folder)
    encode = model.encode_query if role == "query" else model.encode_document
    return lambda texts: encode(texts, normalize_embeddings=True)


class Exported:
    """A sentence encoder in a folder that ``compresskit export --format onnx`` (or ``onnx-int8``) wrote.

    Args:
        folder: what was written.
        role: of the texts, as of :func:`encoder`.
        threads: CPU threads.
    """

    def __init__(self, folder: Path, role: str, threads: int = 1) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        config = _settings(folder / "config.json")
        texts, general = (_settings(folder / f"{name}.json") for name in _SAYS)
        self.prompt = (general.get("prompts") or {}).get(role) or ""
        self.lower = bool(texts.get("do_lower_case"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(texts.get("max_seq_length") or config["max_position_embeddings"] - 2)
        self.tokenizer.enable_padding(pad_id=config.get("pad_token_id") or 0)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self.inputs = [value.name for value in self.session.get_inputs()]
        if "sentence_embedding" not in [value.name for value in self.session.get_outputs()]:
            sys.exit(f"{folder}: its graph gives no vectors of texts; search with the folder that it was exported from")

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.concatenate([self._batch(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])

    def _batch(self, texts: list[str]) -> np.ndarray:
        whole = [self.prompt + text for text in texts]
        encoded = self.tokenizer.encode_batch([text.lower() for text in whole] if self.lower else whole)
        columns = {
            "input_ids": [text.ids for text in encoded],
            "attention_mask": [text.attention_mask for text in encoded],
            "token_type_ids": [text.type_ids for text in encoded],
        }
        (vectors,) = self.session.run(["sentence_embedding"], {name: np.array(columns[name]) for name in self.inputs})
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def _settings(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def build(model: str, texts: Path, index: Path) -> int:
    """Write an index of every sentence of the .txt files below a folder; how many there are."""
    index.mkdir(parents=True)  # fails before anything is computed where there is one
    found = [
        {"file": file.relative_to(texts).as_posix(), "sentence": " ".join(sentence.split())}
        for file in sorted(texts.rglob("*.txt"))
        for sentence in END.split(file.read_text(encoding="utf-8"))
        if sentence.strip()
    ]
    vectors = encoder(model, "document")([entry["sentence"] for entry in found])
    np.save(index / "vectors.npy", vectors.astype(np.float16))
    about = {"model": str(Path(model).resolve()), "sentences": found}
    (index / "index.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return len(found)


def search(index: Path, query: str, model: str | None = None, top: int = 3) -> list[tuple[float, str, str]]:
    """The sentences nearest to the query: cosine, sentence, file. The query's vector is that of the index's model, or
    of another one in the same space, such as a student of it, or an export.
    """
    about = json.loads((index / "index.json").read_text(encoding="utf-8"))
    vectors = np.load(index / "vectors.npy").astype(np.float32)
    cosines = vectors @ encoder(model or about["model"], "query")([query])[0]
    hits = [(cosines[place], about["sentences"][place]) for place in np.argsort(-cosines, kind="stable")[:top]]
    return [(float(cosine), entry["sentence"], entry["file"]) for cosine, entry in hits]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["index", model, texts, index]:
            print(f"{build(model, Path(texts), Path(index)):,} sentences in {index}")
        case ["search", index, query, *other] if len(other) < 2:
            for score, sentence, file in search(Path(index), query, *other):
                print(f"{score:.3f}\t{sentence}\t{file}")
        case _:
            sys.exit("usage: sentence_search.py index MODEL TEXTS INDEX, or search INDEX QUERY [MODEL]")
