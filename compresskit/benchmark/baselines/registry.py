"""The registered baselines."""

from __future__ import annotations

import re

from compresskit.benchmark.baselines.base import Baseline
from compresskit.registry import Registry

BASELINES: Registry[Baseline] = Registry(
    "baseline",
    Baseline,  # type: ignore[type-abstract]
    "compresskit.benchmark.baselines",
    "compresskit.baselines",
    needs=("summary",),
)
register = BASELINES.register


def find(entry: str) -> tuple[Baseline, str]:
    """The baseline that an entry of a grid means, and its argument.

    Raises:
        InputError: there is none of that name, or it does not take the argument.
    """
    name, _, argument = entry.partition(":")
    baseline = BASELINES.get(name)
    baseline.check(argument)
    return baseline, argument


def row_name(entry: str) -> str:
    """What tables, records and folders call an entry of a grid.

    Example:
        >>> row_name("int8"), row_name("other:google-bert/bert-base-uncased")
        ('int8', 'other bert-base-uncased')
    """
    name, _, argument = entry.partition(":")
    return " ".join([name, *([re.sub(r"[^\w.+-]", "-", argument.rstrip("/").rpartition("/")[2])] if argument else [])])
