"""The sentence vectors of a teacher, computed once and kept in a memory-mapped file that students, seeds and epochs
share. A pass that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from compresskit.errors import WorkError
from compresskit.storage.writing import reserve, write_text

#: What progress is told is at work.
VECTORS = "vectors of the teacher"
#: Texts between two notes of how far the pass has come.
_CHUNK = 2048
_FILE, _INDEX, _LOCK = "vectors.float32", "index.json", ".lock"


def keep_vectors(
    encode: Callable[[Sequence[str]], Tensor],
    texts: Sequence[str],
    folder: Path,
    kind: Sequence[Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> Tensor:
    """The vectors of texts: those that the folder holds, or computed now and kept there.

    Args:
        encode: the teacher: some texts to their (n, D) vectors in float32.
        texts: in the order of the rows.
        folder: of this one teacher or of several, for all their texts; other processes wait for one that computes.
        kind: what decides the vectors beside the texts, as plain data: which teacher, its precision and libraries.
        progress: ``(what, done, total)``.

    Returns:
        (N, D), a memory-mapped file: rows are read when they are needed.

    Raises:
        WorkError: the disk is full. What is whole stays.
    """
    digest = hashlib.sha256(json.dumps(list(kind), sort_keys=True, default=str).encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "big") + text.encode(errors="surrogatepass"))
    target = folder / digest.hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / _LOCK):
        index = target / _INDEX
        known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {"size": 0, "done": 0}
        if not _is_whole(target / _FILE, len(texts) * known["size"] * 4):
            known = {"size": 0, "done": 0}  # mapping a file that is too short would fill it with zeros
        if not known["size"]:
            known["size"] = encode(texts[:1]).shape[1]
            _reserve(target / _FILE, len(texts) * known["size"] * 4, folder)
            write_text(index, json.dumps(known))
        vectors = _mapped(target / _FILE, len(texts), known["size"])
        while known["done"] < len(texts):
            start = known["done"]
            found = encode(texts[start : start + _CHUNK])
            vectors[start : start + len(found)] = found
            known["done"] += len(found)
            write_text(index, json.dumps(known))
            if progress is not None:
                progress(VECTORS, known["done"], len(texts))
    return vectors


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _mapped(path: Path, rows: int, size: int) -> Tensor:
    return torch.from_file(str(path), True, rows * size, dtype=torch.float32).view(rows, size)


def _reserve(path: Path, size: int, folder: Path) -> None:
    """Take the room now: a mapped file that finds the disk full kills the process."""
    try:
        reserve(path, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        room = f"{math.ceil(size / 1e6):,} MB for the teacher's vectors"
        raise WorkError(f"{folder}: no room for {room}: {error.strerror or error}; take fewer texts") from None
