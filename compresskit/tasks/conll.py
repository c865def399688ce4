"""Files with one word a line, as CoNLL's tasks have them: columns apart by tabs or spaces, sentences by empty lines."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from compresskit.errors import InputError, shown
from compresskit.storage import files
from compresskit.storage.files import Rows
from compresskit.tasks.declaration import Task
from compresskit.tasks.label_column import found_label, label_text, not_a_label

#: How a comment begins: ``# id = 1``, ``#id=1``; ``#word`` is a word.
_COMMENT = re.compile(r"#+(\s|$)|#\s*\w+\s*=")
#: Columns of CoNLL-U, and numbers of its lines that stand for several words (``1-2``) or for none (``8.1``).
_WIDTH_OF_U = 10
_NO_WORD = re.compile(r"[0-9]+[-.][0-9]+")
_NUMBERED = re.compile(r"[0-9]+([-.][0-9]+)?")


@dataclass(frozen=True)
class _Line:
    """A line that is not empty."""

    number: int
    text: str
    fields: list[str]

    @property
    def marked(self) -> bool:
        """Whether it may be a comment."""
        return self.text.startswith("#")


def read_sentences(task: Task, path: Path) -> tuple[Rows, list[str]]:
    """Sentences as rows of a list of words and a list of tags, and notes on what was left out.

    Without ``columns`` in the declaration the first column is the word and the last one its tag. Left out are comments
    (``# id = 1``), a first line with the names of the columns, lines of CoNLL-U that are no words, and ``-DOCSTART-``.

    Raises:
        InputError: no sentences; a line with another number of columns, without a tag, or of which it cannot be told
            whether it is a word. The line is named.
    """
    (column,) = task.inputs
    if task.columns is not None and not {column, task.label} <= set(task.columns):
        raise InputError(f"task {task.name}: columns must name {column!r} and {task.label!r}")
    lines = _lines(path)
    form = _Form(task, path, [line for line in lines if line is not None])
    rows: Rows = []
    words: list[str] = []
    tags: list[str] = []
    for line in [*lines, None]:
        if line is not None:
            if not form.leaves_out(line, begins=not words):
                words.append(line.fields[form.word])
                tags.append(form.tag_of(line))
        elif words:
            rows.append({column: words, task.label: tags})
            words, tags = [], []
    if not rows:
        raise InputError(f"data {path}: holds no sentences")
    return rows, [f"{number} {what} were left out" for what, number in form.left_out.items()]


def _lines(path: Path) -> list[_Line | None]:
    """The lines of the file; None for those between sentences."""
    texts = [line.strip(" \t") if line.strip() else "" for line in files.lines(path)]
    words = [text for text in texts if text and not text.startswith("#")] or texts
    apart = r"\t+" if any("\t" in text for text in words) else r" +"
    return [
        _Line(number, text, re.split(apart, text)) if text and text.split()[0] != "-DOCSTART-" else None
        for number, text in enumerate(texts, start=1)
    ]


@dataclass
class _Form:
    """What stands in the lines of a file.

    Attributes:
        left_out: what was passed over, and how often.
    """

    task: Task
    path: Path
    lines: list[_Line]
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        names, plain = self.task.columns, [line for line in self.lines if not line.marked]
        self.first = next(iter(plain or self.lines), None)
        self.width = len(names) if names is not None else len(self.first.fields) if self.first is not None else 0
        self.word = 0 if names is None else names.index(self.task.inputs[0])
        self.tag = self.width - 1 if names is None else names.index(self.task.label)
        self.times = Counter(line.fields[self.tag] for line in plain if len(line.fields) == self.width)
        self.declared = {label_text(value) for value in (self.task.labels or {}).values()}
        self.good: set[str] = set()
        if names is None and plain and all(_NUMBERED.fullmatch(line.fields[0]) for line in plain):
            raise InputError(
                f"data {self.path}: the first column holds numbers, no words: name the columns in the declaration, "
                f"such as columns: [number, {self.task.inputs[0]}, ..., {self.task.label}]"
            )

    def leaves_out(self, line: _Line, *, begins: bool) -> bool:
        """Whether a line is no word; it is counted. ``begins``: its sentence has no word so far. Raises InputError."""
        kind = self._kind(line, begins)
        if kind is not None:
            self.left_out[kind] += 1
        return kind is not None

    def _kind(self, line: _Line, begins: bool) -> str | None:
        if line.marked and begins and _COMMENT.match(line.text) and self._comments(line):
            return "lines of comments"
        if len(line.fields) != self.width or self.width < 2:
            expected = f"{self.width}" if self.width > 1 else "two or more"
            raise InputError(f"{self._where(line)}: has {len(line.fields)} columns, expected {expected}")
        if line is self.first and self._names(line):
            return "lines with the names of the columns"
        if self.width == _WIDTH_OF_U and _NO_WORD.fullmatch(line.fields[0]):
            return "lines of CoNLL-U that are no words (numbers such as 1-2 and 8.1)"
        return None

    def _comments(self, line: _Line) -> bool:
        """Whether a line that begins as a comment is one, and not the word ``#``. Raises InputError: it may be both."""
        tabs = "\t" in line.text
        if " " in line.fields[0] or (not tabs and len(line.fields) != self.width):
            return True
        if tabs:
            return False
        tag = line.fields[self.tag]
        if not self.times[tag] and label_text(tag) not in self.declared:
            raise InputError(
                f"{self._where(line)}: {shown(line.text)} may be a comment as well as the word '#': remove it, or list "
                f"the tag {tag!r} under labels"
            )
        return False

    def _names(self, line: _Line) -> bool:
        """Whether a first line names the columns as the declaration does. Raises InputError: it seems to, otherwise."""
        word, tag, fields = line.fields[self.word], line.fields[self.tag], [name.casefold() for name in line.fields]
        if label_text(tag) in self.declared:
            return False
        ends = [self.task.inputs[0].casefold(), self.task.label.casefold()]
        if fields == [name.casefold() for name in self.task.columns or ()] or [fields[0], fields[-1]] == ends:
            return True
        plain = tag == "O" or tag[1:2] == "-"
        named = files.HEAD.fullmatch(tag) or (files.HEAD.fullmatch(word) and not plain)
        if named and self.times[tag] == 1:
            raise InputError(
                f"{self._where(line)}: {shown(line.text)} seems to name the columns: remove it, or name them so in the "
                f"declaration (inputs, label, columns); if {tag!r} is a tag, list it under labels"
            )
        return False

    def tag_of(self, line: _Line) -> str:
        """The tag of a word. Raises InputError: there is none."""
        tag = line.fields[self.tag]
        if tag not in self.good:
            if label_text(tag) not in self.declared and found_label(tag) is None:
                raise not_a_label(tag, self._where(line), (), "tag")
            self.good.add(tag)
        return tag

    def _where(self, line: _Line) -> str:
        return f"data {self.path}, line {line.number}"
