"""The key of a cell: a hash of all that decides its result. Results of other settings, data, code or machines are never
taken for this cell's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from compresskit.benchmark.baselines.registry import BASELINES, find, row_name
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.provenance import digest
from compresskit.benchmark.quality import OF_VECTORS
from compresskit.benchmark.rows import Cell, Row
from compresskit.data.units import LANGUAGE
from compresskit.decomposers import registry
from compresskit.model.classes import in_order

#: Entries of :func:`settings` that decide what cells share: a student after stage 1, or the compressed teacher.
_OF_BOTH = ("model", "baseline", "content", "recipe", "packages", "ratio", "versions", "host")
_OF_GENERAL = (*_OF_BOTH, "text", "unit", "language", "max_texts", "general", "general_seed")
_OF_TEACHER = (*_OF_BOTH, "task", "label_order", "data", "teacher", "first_seed")


@dataclass(frozen=True)
class Ground:
    """What cells rest on beside the grid, as plain data.

    Attributes:
        model, text, versions: the checkpoint, the general text (a list of several) and the libraries, as
            :class:`compresskit.benchmark.provenance.MadeBy` has them.
        task, data: the declaration without its defaults, and its rows; None without a task.
        host: the hash of the machine; None where cells of any machine will do.
        content: what a baseline's model is made of beside the dense one.
    """

    model: dict[str, Any]
    text: dict[str, Any] | list[dict[str, Any]]
    versions: dict[str, str]
    host: str | None
    task: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    content: dict[str, str] = field(default_factory=dict)


def settings(row: Row, grid: Grid, ground: Ground) -> dict[str, Any]:
    """All that decides the result of a cell, as plain data. Settings that only students learn from are left out for the
    dense model.
    """
    usual, mine = grid.of(row.task), grid.of(row.task, row.variant, row.baseline)
    found: dict[str, Any] = {
        "model": ground.model,
        "row": row.name,
        "baseline": row.baseline,
        "recipe": row.recipe.model_dump(mode="json", exclude_defaults=True) if row.recipe is not None else None,
        "packages": packages(row),
        "ratio": row.ratio,
        "seed": row.seed,
        "text": ground.text,
        "versions": ground.versions,
        "host": ground.host,
        "task": ground.task,
        "data": ground.data,
        "teacher": mine.stage("teacher") if row.tuned else None,
        "first_seed": mine.seeds[0],
        "max_length": usual.stage("task")["max_length"],  # with which all are scored
    } | _label_order(ground.task)
    rival = find(row.baseline)[0] if row.baseline else None
    if grid.unit and row.task is None:
        found["metric"] = OF_VECTORS
    if ground.content:  # where it lies is this machine's affair
        found |= {"baseline": row.name, "content": ground.content}
    if rival is None or (rival.trained and not rival.own_tokenizer):
        found |= {
            "students_from": mine.students_from,
            "general": mine.stage("general"),
            "general_seed": grid.seeds[0] if grid.share_general else row.seed,
            "task_stage": mine.stage("task") if row.tuned else None,
        }
        if grid.unit:
            found["unit"] = grid.unit
        if grid.language != LANGUAGE:
            found["language"] = grid.language
        if grid.max_texts is not None:
            found["max_texts"] = grid.max_texts
    return found


def _label_order(task: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The order of declared labels, which decides the class numbers: a hash does not see that of a mapping. Nothing
    where it is the usual one, that of their values, as in most declarations.
    """
    labels: Mapping[str, str] = (task or {}).get("labels") or {}
    usual = list(labels.values()) == list(in_order(labels.values()))
    return {} if usual else {"label_order": list(labels)}


def start(row: Row, grid: Grid, found: dict[str, Any], model: str, task: str) -> str:
    """Name of the folder with what the cell shares with others; empty: it shares nothing. Tasks that compare vectors
    train nothing of their own, so they always share their models, one for each seed.

    Args:
        found: of :func:`settings`.
        model, task: short names, for the folder's.
    """
    if "students_from" not in found:
        return ""
    of_teacher = found["students_from"] == "teacher"
    alone = row.task is None or row.tuned
    if alone and not of_teacher and not grid.share_general:
        return ""
    method = row_name(row.baseline) if row.recipe is None else row.recipe.name
    names = _OF_TEACHER if of_teacher else _OF_GENERAL
    shared = digest({name: found[name] for name in names if name in found})
    parts = (model, method, f"{row.ratio:g}x" if row.ratio else "", task if of_teacher else "", shared[:8])
    return "-".join(part.replace(" ", "-") for part in parts if part)


def packages(row: Row | Cell) -> list[str]:
    """The packages that make the row, with their versions; ``compresskit`` for its own methods and baselines.

    Raises:
        InputError: a baseline's package is missing.
    """
    if row.recipe is not None:
        return registry.sources(rule.method for rule in row.recipe.rules)
    rival = find(row.baseline)[0]
    return [BASELINES.source(rival.name), *(f"{package} {version(package)}" for package in rival.packages)]
