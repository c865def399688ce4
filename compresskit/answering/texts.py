"""The texts that a model is asked about: given as arguments, in a file or on standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.data.corpus import lines_of, text_files
from compresskit.errors import InputError, shown
from compresskit.storage import files
from compresskit.tasks import squad
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import TaskKind

#: A text; two that belong together; the words of a text; a row of a file with its columns.
Row = str | tuple[str, str] | list[str] | Mapping[str, Any]
Texts = str | Path | Mapping[str, Any] | Sequence[Row]

#: Endings of files with one text a line.
_LINES = (".txt", ".txt.gz")
#: Columns of a file that are looked for where neither task nor user says which hold the texts.
_USUAL = (("text", "text_pair"), ("sentence1", "sentence2"), ("text",), ("sentence",), ("query",), ("tokens",))


@dataclass(frozen=True)
class Given:
    """Rows as they were given.

    Attributes:
        rows: one or more, all in the form of the first one.
        places: where each row stands, for errors.
        notes: what the user should know of the file.
    """

    rows: list[Row]
    places: list[str]
    notes: tuple[str, ...] = ()


def given(texts: Texts | Given) -> Given:
    """What was given, read. A ``str`` is one text, a ``Path`` is a file.

    Raises:
        InputError: nothing, a file that cannot be read, a line that is not valid JSON, something else than texts.
    """
    if isinstance(texts, Given):
        found = texts
    elif isinstance(texts, Path):
        found = _from_file(texts)
    else:
        rows: list[Row] = [texts] if isinstance(texts, str | Mapping) else list(texts)
        found = Given(rows, [f"text {number}" for number in range(1, len(rows) + 1)])
    if not found.rows:
        raise InputError("no text: give some texts, or a file of them")
    return found


def to_look_among(texts: Texts) -> Given:
    """Texts to look among: as :func:`given`. Also a ``Path`` to a folder: the lines of the text files below it, of JSON
    lines the field ``text``, as :func:`text_files` finds them; empty lines are left out.

    Raises:
        InputError: as :func:`given`; a folder without text.
    """
    if not isinstance(texts, Path) or not texts.is_dir():
        return given(texts)
    found = text_files(texts)
    rows: list[Row] = []
    places: list[str] = []
    for path in found.read:
        name = path.relative_to(texts).as_posix()
        for number, line in enumerate(lines_of(path), start=1):
            if line.strip():
                rows.append(line)
                places.append(f"data {name}, text {number}")
    if not rows:
        raise InputError(f"data {texts}: holds no text")
    return Given(rows, places, found.notes(f"{texts.resolve().name}/"))


def from_standard_input() -> Given:
    """JSON lines, as of a file, where the first line that is not empty is a JSON object; else one text a line.

    Raises:
        InputError: nothing is piped in; not UTF-8; a line that is not valid JSON.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("standard input: is a terminal; pipe texts into it, or give --text or --file FILE")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = _of_lines((line.removesuffix("\r") for line in text.split("\n")), "standard input")
    filled = [(str(line), place) for line, place in zip(found.rows, found.places, strict=True) if str(line).strip()]
    try:
        files.json_row(filled[0][0], "")
    except InputError:
        return found
    return Given([files.json_row(line, place) for line, place in filled], [place for _, place in filled])


def _from_file(path: Path) -> Given:
    if path.is_dir():
        raise InputError(f"data {path}: is a folder; give a file of texts (a folder may be looked among: --among)")
    if not path.is_file():
        raise InputError(f"data {path}: no such file")
    if path.name.lower().endswith(_LINES):
        return _of_lines(files.lines(path), f"data {path.name}")
    rows: files.Rows
    rows = squad.read_rows(path) if squad.is_squad(path) else files.read_rows(path)[0]
    quoted = sum(files.quoted(row, [name for name in row if isinstance(row[name], str)]) for row in rows)
    notes: tuple[str, ...] = ()
    if quoted and path.name.removesuffix(".gz").endswith(".tsv"):
        notes = (f"data {path.name}: {quoted} rows have fields in quotation marks, which stay: .tsv is read unquoted",)
    return Given([*rows], [f"data {path.name}, row {number}" for number in range(1, len(rows) + 1)], notes)


def _of_lines(lines: Iterable[str], source: str) -> Given:
    rows: list[Row] = [*lines]
    while rows and not str(rows[-1]).strip():
        rows.pop()
    if not rows:
        raise InputError(f"{source}: holds no text")
    return Given(rows, [f"{source}, line {number}" for number in range(1, len(rows) + 1)])


def fitted(
    found: Given, kind: TaskKind, declared: Task | None, fields: Sequence[str]
) -> tuple[tuple[str, ...], Iterator[tuple[str, dict[str, Any]]]]:
    """The rows with the columns of a task.

    Args:
        found: what was given.
        kind: of the task.
        declared: the task; None where a head alone says what is predicted.
        fields: the columns that hold the texts, where a file calls them otherwise.

    Returns:
        The columns that hold texts, and each row with its place; every column of it holds something, which may be an
        empty text.

    Raises:
        InputError: a file without these columns, another number of texts than the task takes, a row without a text.
    """
    first = found.rows[0]
    wanted = _inputs(kind, declared)
    if isinstance(first, Mapping):
        chosen = _chosen(found, kind, wanted, fields)
    elif fields:
        raise InputError(f"fields {', '.join(fields)}: are columns of a file of rows; {found.places[0]} has none")
    else:
        count = 2 if isinstance(first, tuple) else 1
        chosen = wanted if len(wanted) == count else ("text", "text_pair")[:count]
    needs = _counts(kind, wanted)
    if len(chosen) not in needs:
        names = f" ({' and '.join(wanted)})" if wanted else ""
        of = f"task {declared.name}" if declared is not None else f"a model for {kind.name}"
        takes = "two texts that belong together" if needs == (2,) else "one text"
        raise InputError(f"{found.places[0]}: {of} takes {takes}{names} a row, here {len(chosen)}")
    return chosen, (_row(row, chosen, place) for row, place in zip(found.rows, found.places, strict=True))


def _inputs(kind: TaskKind, declared: Task | None) -> tuple[str, ...]:
    """Names of the inputs; none where nothing says how many there are."""
    if kind.has_documents:  # documents are given by themselves
        return ("query",) if declared is None or declared.tables else declared.inputs[:1]
    if declared is not None:
        return declared.inputs
    return kind.inputs if len(set(kind.inputs)) == len(kind.inputs) else ()


def _counts(kind: TaskKind, wanted: Sequence[str]) -> tuple[int, ...]:
    """How many texts a row may have."""
    if kind.head is None and not kind.has_documents:  # similarities of two, or vectors of single texts
        return 1, 2
    return (len(wanted),) if wanted else (1, 2)


def _chosen(found: Given, kind: TaskKind, wanted: tuple[str, ...], fields: Sequence[str]) -> tuple[str, ...]:
    """The columns of a file that hold the texts. Raises InputError: it has none that is known to."""
    held = set(found.rows[0])
    candidates = [tuple(fields)] if fields else [wanted, *_USUAL]
    for names in candidates:
        if names and set(names) <= held and (names == wanted or fields or len(names) in _counts(kind, wanted)):
            return names
    known = candidates[0] or ("text",)
    missing = [name for name in known if name not in held] or known
    raise InputError(
        f"{found.places[0]}: has no column {' and no column '.join(map(repr, missing))}; its columns: "
        f"{', '.join(map(str, found.rows[0]))}; name those that hold the texts (--field)"
    )


def _row(row: Row, columns: tuple[str, ...], place: str) -> tuple[str, dict[str, Any]]:
    """A row with these columns. Raises InputError: it has others, no text, or one that is none in Unicode."""
    values: dict[str, Any]
    if isinstance(row, Mapping):
        values = {name: row.get(name) for name in columns}
    else:
        parts = row if isinstance(row, tuple) else (row,)
        if len(parts) != len(columns):
            raise InputError(f"{place}: has {len(parts)} texts, the first one has {len(columns)}: {shown(row)}")
        values = dict(zip(columns, parts, strict=True))
    for name, value in values.items():
        text = "".join(map(str, value)) if isinstance(value, str | list) else ""
        if value is None:
            where = f"column {name!r} holds no text" if isinstance(row, Mapping) else "holds no text"
            raise InputError(f"{place}: {where} (an empty one is answered): fill it in or leave the row out")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{place}: holds half a character (a lone surrogate), which is no text: {shown(value)}")
    return place, values
