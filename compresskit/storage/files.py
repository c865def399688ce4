"""Read tables of examples from TSV, CSV, JSONL or Parquet. A bad line is named by file and line number."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from compresskit.errors import InputError, one_line

#: Endings that are read; ``.gz`` may follow the text formats.
FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".txt")

Rows = list[dict[str, Any]]

#: Characters of the longest line that is read: a file without line ends must not fill the memory.
_LONGEST_LINE = 1 << 26


def read_rows(
    path: Path,
    columns: Sequence[str] | None = None,
    needed: Sequence[str] = (),
    *,
    skip_bad_lines: bool = False,
) -> tuple[Rows, int]:
    """The rows of a file as dictionaries, and how many lines were skipped. The format follows from the ending.

    Args:
        path: ``.tsv`` and ``.txt`` (tabs, no quoting, as GLUE has it), ``.csv`` (quoted as usual), ``.jsonl`` and
            ``.json`` (one object a line, or one array of objects), ``.parquet``.
        columns: names of the columns of a file without a header line.
        needed: columns that are used; a first line that names them all is a header even where ``columns`` are given.
        skip_bad_lines: skip lines with the wrong number of fields instead of raising.

    Raises:
        InputError: missing, empty or undecodable file, a line with the wrong number of fields, invalid JSON.
    """
    if not path.is_file():
        raise InputError(f"data {path}: no such file")
    kind = _format(path)
    skipped = 0
    if kind == ".parquet":
        rows = _read_parquet(path)
    elif kind in (".jsonl", ".json"):
        rows = list(_read_json(path))
    else:
        rows, skipped = _read_delimited(path, "," if kind == ".csv" else "\t", columns, needed, skip_bad_lines)
    if not rows:
        raise InputError(f"data {path}: holds no rows")
    return rows, skipped


def open_text(path: Path) -> IO[str]:
    """The file as UTF-8 text (a byte order mark is dropped), unpacked if it ends in ``.gz``."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends.

    Raises:
        InputError: not UTF-8 (the line is named), damaged, or a line of more than 67 million characters.
    """
    number = 0
    try:
        with open_text(path) as stream:
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise InputError(f"data {path}, line {number}: is longer than {_LONGEST_LINE:,} characters")
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"data {path}: not UTF-8 text{_after(number)}: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data {path}: cannot be read{_after(number)}: {error}") from None


def _after(line: int) -> str:
    return f" after line {line}" if line else ""


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    if kind not in FORMATS:
        raise InputError(f"data {path}: unknown format; known endings: {', '.join(FORMATS)}, with .gz or without")
    return kind


def _read_delimited(
    path: Path, delimiter: str, columns: Sequence[str] | None, needed: Sequence[str], skip_bad_lines: bool
) -> tuple[Rows, int]:
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    # The csv module needs line ends inside quoted fields; its line_num counts physical lines.
    source = (line + "\n" for line in lines(path))
    reader = csv.reader(source, delimiter=delimiter, quoting=quoting, strict=True)
    rows: Rows = []
    skipped = 0
    names = columns
    csv.field_size_limit(_LONGEST_LINE)
    try:
        for fields in reader:
            if not fields:
                continue
            if names is None or (not rows and names is columns and needed and set(needed) <= set(fields)):
                names = fields
                continue
            if len(fields) != len(names):
                if skip_bad_lines:
                    skipped += 1
                    continue
                expected = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise InputError(
                    f"data {path}, line {reader.line_num}: has {len(fields)} fields, expected {len(names)} ({expected})"
                )
            rows.append(dict(zip(names, fields, strict=True)))
    except csv.Error as error:
        raise InputError(f"data {path}, line {reader.line_num}: {error}") from None
    return rows, skipped


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """One object a line, or one array of objects."""
    first = True
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        first, begins = False, first
        if begins and line.lstrip().startswith("["):
            yield from _read_array(path)
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"data {path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f'data {path}, line {number}: must be a JSON object, such as {{"text": "..."}}')
        yield row


def _read_array(path: Path) -> Iterator[dict[str, Any]]:
    try:
        found = json.loads("\n".join(lines(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data {path}: not a valid JSON array: {error}") from None
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise InputError(f'data {path}, entry {number}: must be a JSON object, such as {{"text": "..."}}')
        yield row


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        rows: Rows = pyarrow.parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"data {path}: not a readable Parquet file: {one_line(error)}") from None
    return rows
