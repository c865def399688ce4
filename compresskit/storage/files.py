"""Read tables of examples from TSV, CSV, JSONL or Parquet. A bad line is named by file and line number."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from compresskit.errors import InputError, one_line

#: Endings that are read; ``.gz`` may follow the text formats.
FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".txt")

#: What a first line holds that names columns.
HEAD = re.compile(
    "(token|word|form|text|sentence|review|tweet|comment|content|title|question|answer|query|passage|premise|hypothesis"
    "|tag|label|gold_label|class|category|target|sentiment|score|upos|xpos|(ner|pos|chunk)(_tag)?)s?[12]?",
    re.IGNORECASE,
)

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
        needed: columns that are used; a first line that names them all is a header even where ``columns`` are given,
            and none of them may come twice. Without any all columns may be used.
        skip_bad_lines: skip lines with the wrong number of fields instead of raising.

    Raises:
        InputError: missing, empty or undecodable file, a line with the wrong number of fields, invalid JSON, a column
            that comes twice, a header with other names than ``columns``.
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
                names = [field.replace("\ufeff", "") for field in fields]
                _check_once(path, names, needed)
                continue
            if len(fields) != len(names):
                if skip_bad_lines:
                    skipped += 1
                    continue
                expected = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise InputError(
                    f"data {path}, line {reader.line_num}: has {len(fields)} fields, expected {len(names)} ({expected})"
                )
            row = dict(zip(names, fields, strict=True))
            if _heads(row, needed, unnamed=names is columns and not rows):
                raise InputError(
                    f"data {path}, line {reader.line_num}: holds names of columns ({', '.join(fields[:8])}): "
                    "remove the line, or name the columns alike in the declaration"
                )
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"data {path}, line {reader.line_num}: {error}") from None
    return rows, skipped


def _check_once(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    for name in needed or filter(None, names):
        if list(names).count(name) > 1:
            raise InputError(f"data {path}: column {name!r} comes twice")


def _heads(row: dict[str, str], needed: Sequence[str], *, unnamed: bool) -> bool:
    """Whether the fields of a row name columns: their own, as in files that were put one behind the other. In the first
    line of a file ``unnamed``, without a header, one of them is enough, or any names that are usual.
    """
    cells = {name: row.get(name, "").strip() for name in needed}
    own = [cell.casefold() == name.casefold() for name, cell in cells.items()]
    if unnamed:
        return any(own) or (bool(needed) and all(map(HEAD.fullmatch, cells.values())))
    return bool(own) and all(own)


def quoted(row: dict[str, str], columns: Sequence[str]) -> bool:
    """Whether a field of a row stands in quotation marks and has doubled ones inside, as programs quote."""
    fields = (row[column] for column in columns)
    return any(len(field) > 3 and field[0] == field[-1] == '"' and '""' in field[1:-1] for field in fields)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError: a key comes twice, of which the last one would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {max(keys, key=keys.count)!r} comes twice")
    return found


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
        yield json_row(line, f"data {path}, line {number}")


def json_row(line: str, where: str) -> dict[str, Any]:
    """A line as a JSON object; ``where`` names it in errors. Raises InputError: it is none, or a key comes twice."""
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f'{where}: must be a JSON object, such as {{"text": "..."}}')
    return row


def _read_array(path: Path) -> Iterator[dict[str, Any]]:
    try:
        found = json.loads("\n".join(lines(path)), object_pairs_hook=_object)
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
