"""What stands in a column of labels, as text. What is no single label is refused with its row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from compresskit.errors import InputError, did_you_mean, shown
from compresskit.model.classes import cleaned, likeness, unnamed, whole_number
from compresskit.tasks.losses import IGNORED
from compresskit.tasks.rows import Place

#: What stands where a value is missing: what pandas takes for that, the marks of SNLI, UCI and CoNLL, and others that
#: are hardly a name (``unknown``, ``none`` and ``nil`` are). Some of them are names of classes too; then a declaration
#: lists them.
_MISSING = frozenset(("None", "NA", "-", "--", "---", "?", "_"))
#: The same, whatever its upper and lower case.
_MISSING_IN_ANY_CASE = frozenset(
    (
        *("nan", "-nan", "<na>", "#na", "#n/a", "#n/a n/a", "n/a", "null", "nat"),
        *("-1.#ind", "1.#ind", "-1.#qnan", "1.#qnan", "n.a.", "n.a"),
    )
)
_INFINITE = frozenset(("inf", "infinity"))
#: A list as text: brackets, and what stands in them.
_LIST = re.compile(r"""(\[.*]|\(.*\)|\{.*})""", re.DOTALL)
_INSIDE_LISTS = re.compile(r"""['",]|^[\s\d.+-]*$""")
#: What may stand between several labels in one text.
_BETWEEN = re.compile(r"[\s,;|/+&]+")
#: From here on not every integer is a floating-point number.
_EXACT = 2.0**53


def label_text(value: Any) -> str | None:
    """A cell as the text of a label: composed (NFC), without white space and byte order marks around it, a whole number
    without a fraction (``3.0`` is ``3``). None where it is empty, or no text, number or truth value.
    """
    if not isinstance(value, str | int | float) or value != value:  # only NaN differs from itself
        return None
    text = cleaned(str(value))
    number = whole_number(text) if "." in text else None
    return str(number) if number is not None else text or None


def found_label(value: Any) -> str | None:
    """As :func:`label_text`, for a label that no declaration lists: None also for what stands for a missing value or
    is hardly a name, such as a number with a fraction.
    """
    text = label_text(value)
    return None if text is None or _missing(text) or _why_not(value, text) is not None else text


def not_a_label(value: Any, where: str, known: Iterable[str], what: str = "label") -> InputError:
    """The error for a cell whose label is not among ``known`` or is none at all; ``where`` names the row."""
    if isinstance(value, list | tuple | dict | set) and value:
        return InputError(
            f"{where}: holds several {what}s, {shown(value)}; a task with several for a text has kind: multi-label"
        )
    text = label_text(value)
    if value is None or (text is None and isinstance(value, str | float | list | tuple | dict | set)):
        return InputError(f"{where}: holds no {what} ({value!r}): fill it in or leave the row out")
    if text is None:
        return InputError(f"{where}: {shown(value)} is no {what}; {what}s are texts, integers or truth values")
    if _missing(text):
        return InputError(
            f"{where}: holds no {what} ({shown(value)}): fill it in or leave the row out; if it is a {what}, list it "
            "under labels"
        )
    if (reason := _why_not(value, text)) is not None:
        return InputError(f"{where}: {shown(value)} {reason}; if it is a {what}, list it under labels")
    names = list(known)
    return InputError(
        f"{where}: unknown {what} {shown(value)}: {did_you_mean(text, names)}known: {', '.join(names) or 'none'}"
    )


def is_list(text: str) -> bool:
    """Whether a text is a list as programs print it; a name in brackets, such as ``[NEG]``, is none."""
    return _LIST.fullmatch(text) is not None and _INSIDE_LISTS.search(text[1:-1]) is not None


def found_labels(task: str, cells: Iterable[tuple[Place, Any]]) -> dict[str, Place]:
    """The labels in cells that no declaration lists, each with its first place; cells without a label are passed over.

    Args:
        task: its name, for errors.
        cells: each with its place. Texts, numbers and truth values count, one kind of them in a file.

    Raises:
        InputError: a file mixes texts, integers, numbers with a point and truth values, or writes one number in two
            ways (1 and 1.0); two labels that a reader takes for one (0 and 00, Good and good). The rows are named.
    """
    seen: set[Any] = set()
    kinds: dict[str, tuple[Place, Any]] = {}
    written: dict[tuple[str, str], tuple[Place, Any]] = {}
    alike: dict[str, tuple[Place, Any]] = {}
    found: dict[str, Place] = {}
    for place, cell in cells:
        # Every different cell of a file is looked at once.
        if not isinstance(cell, str | int | float) or (place.source, type(cell), cell) in seen:
            continue
        seen.add((place.source, type(cell), cell))
        text = found_label(cell)
        if text is None:
            continue
        here = (place, cell)
        before = kinds.setdefault(place.source, here)
        if type(before[1]) is not type(cell):
            raise _mixed(task, before, here, "are of different kinds")
        before = written.setdefault((place.source, text), here)
        if cleaned(str(before[1])) != cleaned(str(cell)):
            raise _mixed(task, before, here, "are one number in two spellings")
        before = alike.setdefault(likeness(text), here)
        if label_text(before[1]) != text:
            raise _mixed(task, before, here, "look like one label in two spellings")
        found.setdefault(text, place)
    return found


def refuse_joined(task: str, found: Mapping[str, Place]) -> None:
    """Refuse a label that is several of the other ones in one text, such as ``a,b`` beside ``a`` and ``b``.

    Raises:
        InputError: names its row.
    """
    for label, place in found.items():
        parts = [part for part in _BETWEEN.split(label) if part]
        if len(parts) > 1 and all(part in found for part in parts):
            raise InputError(
                f"{place}: {shown(label)} seems to be several labels of task {task}: {', '.join(parts)}; kind: "
                "multi-label takes them as a list or with ',', ';' or '|' between them; if it is one class, list all "
                "classes under labels"
            )


def check_declared(labels: Mapping[str, str]) -> None:
    """Refuse labels (name -> value in the files) of a declaration that cannot be told apart.

    Raises:
        InputError: an empty name or value, one value or name twice, ``LABEL_i`` that is not class i.
    """
    names: dict[str, str] = {}
    values: dict[str, str] = {}
    for name, value in labels.items():
        text = label_text(value)
        if not cleaned(name) or text is None:
            raise InputError(f"labels: {name!r}: {value!r}: names and values must not be empty")
        if (other := names.setdefault(cleaned(name), name)) != name:
            raise InputError(f"labels: {other!r} and {name!r} are the same name")
        if (other := values.setdefault(text, name)) != name:
            raise InputError(f"labels: {other!r} and {name!r} have the same value {value!r}")
    unnamed_ones = [f"LABEL_{number}" for number in range(len(labels))]
    if set(labels) == set(unnamed_ones) and not unnamed(tuple(labels)):
        raise InputError(
            f"labels: {', '.join(labels)}: LABEL_i is class i of a model: list them in the order "
            f"{', '.join(unnamed_ones)}, or give the classes other names"
        )


def _missing(text: str) -> bool:
    # Quotation marks around nothing are an empty field, where they are read as they stand.
    return text in _MISSING or text.casefold() in _MISSING_IN_ANY_CASE or not likeness(text.strip("\"'"))


def _why_not(value: Any, text: str) -> str | None:
    """Why a text, if it is not missing, is no label unless a declaration lists it; None where it is one."""
    if text == str(IGNORED):
        return "marks what losses leave out"
    if text.casefold().lstrip("+-") in _INFINITE:
        return "is no finite number"
    if isinstance(value, float) and abs(value) >= _EXACT:
        return "is a number with a point, too large to be exact"
    if _fraction(text):
        return "is a number with a fraction; numbers to predict take kind: regression"
    if len(text) > 2 and text[0] == text[-1] == '"':
        return "stands in quotation marks, which belong to a field of a .tsv: remove them"
    if is_list(text):
        return "is a list as text; several labels for a text take kind: multi-label, as lists or with ',' between them"
    return None


def _fraction(text: str) -> bool:
    try:
        return whole_number(text) is None and math.isfinite(float(text)) and any(mark in text for mark in ".eE")
    except ValueError:
        return False


def _mixed(task: str, first: tuple[Place, Any], second: tuple[Place, Any], what: str) -> InputError:
    (place, cell), (other, label) = first, second
    where = f"row {other.row}" if other.source == place.source else str(other)
    return InputError(
        f"{place} and {where}: labels {shown(cell)} and {shown(label)} of task {task} {what}: write them alike, or "
        "list all classes under labels (name: value)"
    )
