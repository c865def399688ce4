"""Files that users write: YAML read and validated, with the first problem as one clear line."""

from __future__ import annotations

import difflib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from compresskit.errors import InputError, one_line, shown, unknown

#: Bytes of the largest file of settings that is read: a file of YAML, of JSON.
_MOST_YAML, _MOST_JSON = 1_000_000, 100_000_000


class _Loader(yaml.SafeLoader):
    """Plain data alone. What YAML allows but a reader would not expect is refused: a key given twice (the last one
    would win), and aliases (a few lines of them stand for gigabytes).
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not read, write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} comes twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_named(what: str, name_or_path: str | Path, shipped: Mapping[str, Any]) -> str:
    """The text of a YAML file, or of the shipped one of that name. Raises InputError: unknown name, unreadable file."""
    where = str(name_or_path)
    if Path(where).suffix not in (".yaml", ".yml"):
        if where not in shipped:
            if os.path.isfile(where):
                raise InputError(f"{what} {where}: is no YAML file (.yaml), which describes a {what} of your own")
            if os.path.isfile(f"{where}.yaml"):
                raise InputError(f"unknown {what} {where!r}: did you mean the file {where}.yaml?")
            raise unknown(what, where, shipped)
        text: str = shipped[where].read_text(encoding="utf-8")
        return text
    try:
        _check_size(Path(where), _MOST_YAML)
        return Path(where).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {where}: cannot be read: {error}") from None


def read_json(path: Path, problem: str) -> dict[str, Any]:
    """A JSON file that must hold an object. ``problem`` names in errors what it is then.

    Raises:
        InputError: unreadable, larger than 100 MB, not UTF-8, not JSON, nested too deep, or no object.
    """
    try:
        _check_size(path, _MOST_JSON)
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it must hold an object, { ... }")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {problem}: {one_line(error)}") from None
    return data


def _check_size(path: Path, most: int) -> None:
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"holds {size:,} bytes, at most {most:,} are read")


def parse_mapping(text: str, what: str, keys: str) -> dict[str, Any]:
    """YAML text as a dictionary. Raises InputError: not YAML, or no mapping (``keys`` says what it should have)."""
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number may be none, nesting too deep
        raise InputError(f"{what}: not valid YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{what}: must be a mapping with {keys}")
    return data


#: Which kinds of problems are reported before (0) and after (2) all others.
_REPORTED = {"extra_forbidden": 0, "missing": 2}


def validate(model: type[BaseModel], data: Any, what: str, *, context: Any = None) -> Any:
    """``model.model_validate`` with the first problem as one clear line. Raises InputError."""
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        # A misspelt key, or one taken for another, also leaves the right one missing: what is there is to be reported.
        problems = sorted(error.errors(), key=lambda problem: _REPORTED.get(problem["type"], 1))
        first = problems[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "extra_forbidden":
            *parents, key = first["loc"]
            problem = str(unknown_key(str(key), _fields_at(model, parents)))
            where = where.rpartition(".")[0]
        else:
            problem = first["msg"].removeprefix("Value error, ")
            if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
                where = where.removesuffix(".[key]")
                problem = (
                    f"write it in quotes; YAML reads a bare yes, no, true, 0 or 1.5 as {first['input']!r}, not as text"
                )
            elif not isinstance(first["input"], dict) and first["type"] != "missing":
                problem += f" (given: {shown(first['input'], 200)})"
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
