"""What a model says of one text, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        line: for people, on one line.
        data: for programs: plain data that JSON can hold, by names. The names ``text``, ``texts`` and ``cut`` are taken
            by what was asked.
    """

    line: str
    data: dict[str, Any]

    @classmethod
    def of(cls, answer: Any) -> Answer:
        """Of an answer in whatever form a kind has it.

        Example:
            >>> Answer.of(0.5)
            Answer(line='0.5000', data={'answer': 0.5})
        """
        data = _plain(answer)
        return cls(_line(data), {"answer": data})


def with_score(name: str, score: float) -> str:
    """``name`` with a probability or similarity behind it, for a line."""
    return f"{name} {score:.3f}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, AbstractSet):
        return sorted(map(_plain, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value


def _line(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_line, value))
    return str(value)
