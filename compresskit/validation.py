"""Pydantic validation with the first problem as one clear line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from compresskit.errors import InputError


def validate(model: type[BaseModel], data: Any, what: str) -> Any:
    """``model.model_validate`` with the first problem as one clear line. Raises InputError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key also leaves the right one missing: the misspelling is what to report.
        problems = error.errors()
        first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "extra_forbidden":
            *parents, key = first["loc"]
            problem = str(unknown_key(str(key), _fields_at(model, parents)))
            where = where.rpartition(".")[0]
        else:
            problem = first["msg"].removeprefix("Value error, ")
            if not isinstance(first["input"], dict) and first["type"] != "missing":
                problem += f" (given: {first['input']!r})"
        raise InputError(": ".join(part for part in (what, where, problem) if part)) from None


def unknown_key(key: str, allowed: Sequence[str]) -> InputError:
    """The error for a key that is not among ``allowed``, with the nearest valid one."""
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.0)
    return InputError(f"unknown key {key!r}: the nearest valid one is {near[0]!r}" if near else f"unknown key {key!r}")


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Field names of the model that sits at ``path`` inside ``model``."""
    current: Any = model
    for part in path:
        if isinstance(part, str) and isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[part].annotation
        while typing.get_origin(current) in (types.UnionType, typing.Union, tuple, list):
            current = next(a for a in typing.get_args(current) if a is not type(None))
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []
