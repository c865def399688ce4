"""What stands in a column of labels, as text. What is no single label is refused with its row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from compresskit.errors import InputError
from compresskit.model.classes import whole_number

#: What programs write where a value is missing. ``None`` and ``NA`` are not among them: they are names of classes too.
_MISSING = ("nan", "-nan", "<na>", "#n/a", "null")


def label_text(value: Any) -> str | None:
    """A cell as the text of a label: without white space around it, a whole number without a fraction (``3.0`` is
    ``3``). None where it is empty, or no text, number or truth value.
    """
    if not isinstance(value, str | int | float) or value != value:  # only NaN differs from itself
        return None
    text = str(value).strip()
    number = whole_number(text) if "." in text else None
    return str(number) if number is not None else text or None


def found_label(value: Any) -> str | None:
    """As :func:`label_text`, for a label that no declaration lists: None also for what stands for a missing value or
    is a number with a fraction.
    """
    text = label_text(value)
    return None if text is None or text.casefold() in _MISSING or _fraction(text) else text


def not_a_label(value: Any, where: str, known: Iterable[str]) -> InputError:
    """The error for a cell whose label is not among ``known`` or is none at all; ``where`` names the row."""
    if isinstance(value, list | tuple | dict | set):
        return InputError(
            f"{where}: holds several labels, {_short(value)}; a task with several for a text has kind: multi-label"
        )
    text = label_text(value)
    if value is None or (text is None and isinstance(value, str | float)) or (text or "").casefold() in _MISSING:
        return InputError(f"{where}: holds no label ({value!r}): fill it in or leave the row out")
    if text is None:
        return InputError(f"{where}: {_short(value)} is no label; labels are texts, integers or truth values")
    if _fraction(text):
        return InputError(
            f"{where}: {value!r} is a number with a fraction; numbers to predict take kind: regression, "
            "classes of such names must be listed under labels"
        )
    return InputError(f"{where}: unknown label {_short(value)}; known: {', '.join(known)}")


def _fraction(text: str) -> bool:
    try:
        return whole_number(text) is None and math.isfinite(float(text)) and any(mark in text for mark in ".eE")
    except ValueError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
