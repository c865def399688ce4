"""Plain text: files, folders of files, a data set of the hub, or the text that every Python carries."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from compresskit.data import EMBEDDED
from compresskit.errors import InputError, no_panic, one_line
from compresskit.model.tokenizer import pieces, split
from compresskit.storage import files, hub

if TYPE_CHECKING:
    from datasets import Dataset

#: One document in so many is held out of the part ``training``.
HELD_OUT_SHARE = 5
_BATCH = 32
#: Characters after which a document without a blank line is cut: a file may be one sentence per line.
_LONGEST = 100_000

Part = Literal["all", "training", "held-out"]
#: Endings of files of rows, from which fields are taken.
_ROWS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
#: Endings of files that are read below a folder.
_TEXTS = (".txt", ".jsonl")
_SAID = ".txt or .jsonl file (also .gz)"


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Attributes:
        name: what a record prints: file name, folder name with a slash behind it, hub id, or :data:`EMBEDDED`.
        path: the file, or the folder of files; None for the others.
        part: ``training`` and ``held-out`` share no document; a document's own hash decides.
        fields: of a file of rows (TSV, CSV, JSON, Parquet): the columns whose texts are taken, each as a document. A
            row need not have all of them. Without any a JSON line's is its ``text``.
    """

    name: str
    path: Path | None = None
    part: Part = "all"
    fields: tuple[str, ...] = ()

    def documents(self) -> Iterator[str]:
        """The documents, in order. A text file's are separated by blank lines; a JSON line's is its ``text``; those of
        a folder are its files'.
        """
        documents: Iterator[str]
        if self.path is not None:
            documents = (document for path in text_files(self.path).read for document in _documents(path, self.fields))
        elif self.name == EMBEDDED:
            documents = _embedded()
        else:
            documents = _from_hub(self.name)
        empty = True
        for document in documents:
            if document.strip() and self._takes(document):
                empty = False
                yield document
        if empty:
            part = "" if self.part == "all" else f" in its {self.part} part"
            raise InputError(f"text {self.name}: holds no text{part}")

    def _takes(self, document: str) -> bool:
        if self.part == "all":
            return True
        return is_held_out(document) == (self.part == "held-out")

    def record(self) -> dict[str, Any]:
        """Which text this is, as plain data."""
        if self.path is not None:
            digest: str | None = _hash(self.path)
        elif self.name == EMBEDDED:
            digest = hashlib.sha256("\n".join(_embedded()).encode()).hexdigest()
        else:
            digest = None
        chosen = ({"part": self.part} if self.part != "all" else {}) | ({"fields": self.fields} if self.fields else {})
        return {"source": self.name, "sha256": digest} | chosen

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: files of a folder that are not read."""
        return () if self.path is None else text_files(self.path).notes(self.name)


@dataclass(frozen=True)
class TextFiles:
    """The files of a text.

    Attributes:
        read: in this order.
        others: how many more there are below a folder.
    """

    read: tuple[Path, ...]
    others: int = 0

    def notes(self, name: str) -> tuple[str, ...]:
        """What the user should know of the text ``name``: files that are not read."""
        return (f"text {name}: what is no {_SAID} is not read: {self.others:,} of its files",) * (self.others > 0)


def text_files(path: Path) -> TextFiles:
    """The file itself, or those below a folder, links followed.

    Raises:
        InputError: a folder without text files, or one that cannot be listed.
    """
    if path.is_file():
        return TextFiles((path,))
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, onerror=_not_listed, followlinks=True):
        place = os.path.realpath(folder)
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        if place not in seen:
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
        seen.add(place)
    paths = sorted(map(Path, found), key=Path.as_posix)
    read = tuple(file for file in paths if _kind(file) in _TEXTS)
    if not read:
        raise InputError(
            f"text {path}: is a folder that holds no {_SAID}, at any depth; give files of other kinds one by one"
        )
    if lost := next((file for file in read if not file.is_file()), None):
        raise InputError(f"text {lost}: is a link that leads nowhere, or no file")
    return TextFiles(read, len(paths) - len(read))


def is_held_out(document: str) -> bool:
    """Whether a document belongs to the held-out part of its text."""
    return hashlib.sha256(document.encode()).digest()[0] % HELD_OUT_SHARE == 0


def find_corpus(text: str | Path | Corpus | None, fields: Sequence[str] = ()) -> Corpus:
    """The corpus that ``--text`` means: a file; a folder, of which every ``.txt`` and ``.jsonl`` (also ``.gz``) at any
    depth is read, in the order of their paths, but for hidden ones; a hub data set (``owner/name`` or
    ``owner/name:config``); or without any (or by its own name) the embedded text (the help topics of Python itself:
    real English, the same everywhere for one version). ``fields`` as of :class:`Corpus`.

    Raises:
        InputError: no such file, a folder without such files, or a table without ``fields``.
    """
    if isinstance(text, Corpus):
        return text
    if text is None:
        return Corpus(EMBEDDED)
    if text == EMBEDDED:
        return Corpus(EMBEDDED)
    path = Path(text)
    if path.is_file():
        kind = _kind(path)
        if kind in _ROWS and kind != ".jsonl" and not fields:
            raise InputError(
                f"text {text}: is a table; give plain text, or, where there is --unit, name its columns with --field"
            )
        return Corpus(path.name, path, fields=tuple(fields) if kind in _ROWS else ())
    if path.is_dir():
        rows = any(_kind(file) in _ROWS for file in text_files(path).read)
        return Corpus(f"{path.resolve().name}/", path, fields=tuple(fields) if rows else ())
    name = str(text)
    if (
        name.count("/") != 1
        or name.startswith((".", "/"))
        or Path(name.partition(":")[0]).suffix in (".gz", ".txt", ".jsonl")
    ):
        raise InputError(
            f"text {text}: no such file (a data set of the hub looks like owner/name or owner/name:config)"
        )
    return Corpus(name)


def sequences(corpus: Corpus, tokenizer: Any, max_length: int, tokens: int | None = None) -> Dataset:
    """Token sequences of at most ``max_length``; long documents are split, nothing is cut off.

    Args:
        tokens: stop reading once this many were found; default: read everything.

    Returns:
        A data set with ``input_ids`` and ``length``, in the text's order.

    Raises:
        InputError: unreadable, empty or undecodable text; a tokenizer that cannot split.
    """
    from datasets import Dataset

    rows: list[np.ndarray] = []
    found = 0
    documents = corpus.documents()
    while (tokens is None or found < tokens) and (batch := list(islice(documents, _BATCH))):
        with no_panic(f"text {corpus.name}, cut into tokens"):
            pieces = [piece for document in split(tokenizer, batch, max_length) for piece in document]
        rows += [np.asarray(piece, dtype=np.int32) for piece in pieces]  # Python integers take ten times the memory
        found += sum(map(len, pieces))
    return Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})


def windows(corpus: Corpus, tokenizer: Any, max_length: int, tokens: int | None = None) -> list[str]:
    """The text in pieces that ``tokenizer``, a fast one, reads in at most ``max_length`` tokens, cut between words: a
    second model can read them with a tokenizer of its own. Arguments and errors as of :func:`sequences`.
    """
    found: list[tuple[str, int]] = []
    read = 0
    for document in corpus.documents():
        with no_panic(f"text {corpus.name}, cut into tokens"):
            some = pieces(tokenizer, document, max_length)
        found += some
        read += sum(count for _, count in some)
        if tokens is not None and read >= tokens:
            break
    return [piece for piece, _ in found]


def batches(corpus: Corpus, tokenizer: Any, tokens: int, max_length: int, size: int = 16) -> list[dict[str, Tensor]]:
    """The first ``tokens`` tokens, to the end of a sequence, as :func:`in_batches` of ``input_ids``.

    Raises:
        InputError: unreadable, empty or undecodable text.
    """
    return in_batches(sequences(corpus, tokenizer, max_length, tokens), tokens, size)


def in_batches(dataset: Dataset, tokens: int, size: int) -> list[dict[str, Tensor]]:
    """The first ``tokens`` tokens of encoded sequences, to the end of one, in batches of at most ``size``.

    Those of a batch are equally long, so nothing is padded: some families mix what stands beside a token into it (FNet,
    ConvBERT), or make one of several tokens (Funnel), and where padding went could not be told from what a layer sees.

    Args:
        dataset: the tokenizer's columns but ``attention_mask``, which is all ones, and ``length``.
    """
    lengths = np.asarray(dataset["length"])
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    order = np.argsort(lengths, kind="stable")
    columns = [name for name in dataset.column_names if name != "length"]
    found = []
    for alike in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        for start in range(0, len(alike), size):
            rows = dataset[alike[start : start + size].tolist()]
            batch = {name: torch.tensor(rows[name]) for name in columns}
            found.append({**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    return found


def _kind(path: Path) -> str:
    """The ending that says what a file holds."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _not_listed(error: OSError) -> None:
    raise InputError(f"text {error.filename}: cannot be listed: {error.strerror or error}")


def _hash(path: Path) -> str:
    """SHA-256 of a file; of a folder that of a line for each file that is read, in their order, as ``sha256sum`` prints
    them inside of it.
    """
    if path.is_file():
        return files.file_hash(path)
    digest = hashlib.sha256()
    for file in text_files(path).read:
        digest.update(os.fsencode(f"{files.file_hash(file)}  {file.relative_to(path).as_posix()}\n"))
    return digest.hexdigest()


def lines_of(path: Path) -> Iterator[str]:
    """The texts of a file that has one in each line, as a line of JSON (its ``text``) or as it stands."""
    return _json_documents(path) if _kind(path) == ".jsonl" else files.lines(path)


def _documents(path: Path, fields: Sequence[str]) -> Iterator[str]:
    if fields and _kind(path) in _ROWS:
        return _of_fields(path, fields)
    return _json_documents(path) if _kind(path) == ".jsonl" else _paragraphs(path)


def _of_fields(path: Path, fields: Sequence[str]) -> Iterator[str]:
    rows, _ = files.read_rows(path, needed=fields)
    known = list(dict.fromkeys(name for row in rows for name in row))
    if not set(fields) & set(known):
        raise InputError(f"text {path}: has none of the fields {', '.join(fields)}; it has {', '.join(known)}")
    for number, row in enumerate(rows, start=1):
        for name in fields:
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"text {path}, row {number}: the field {name!r} holds no text")
            if value:
                yield value


def _paragraphs(path: Path) -> Iterator[str]:
    gathered: list[str] = []
    size = 0
    for line in files.lines(path):
        if line.strip():
            gathered.append(line)
            size += len(line)
        if gathered and (not line.strip() or size > _LONGEST):
            yield "\n".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "\n".join(gathered)


def _json_documents(path: Path) -> Iterator[str]:
    for number, line in enumerate(files.lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, RecursionError) as error:
            raise InputError(f"text {path}, line {number}: not valid JSON: {error}") from None
        except (KeyError, TypeError):
            raise InputError(f"text {path}, line {number}: has no field 'text'") from None
        if not isinstance(text, str):
            raise InputError(f"text {path}, line {number}: the field 'text' holds no text")
        yield text


def _embedded() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _from_hub(name: str) -> Iterator[str]:
    path, _, config = name.partition(":")
    try:
        dataset = hub.load_dataset(path, config or None, split="train", streaming=True)
        for number, row in enumerate(dataset, start=1):
            if not isinstance(row["text"], str):
                raise InputError(f"text {name}, row {number}: the field 'text' holds no text")
            yield row["text"]
    except InputError:
        raise
    except Exception as error:  # the library raises a dozen kinds, from no network to no such column
        raise InputError(f"text {name}: no such file, and not to be had from the hub: {one_line(error)}") from None
