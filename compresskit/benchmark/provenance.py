"""What made a cell: all that is needed to do it again. Built once, when the cell is finished; never changed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
)

from compresskit.planning.stage import Stage


class _Part(BaseModel):
    """Unknown keys are refused. What a record does not say is not written either: a field that is added here later
    leaves the records of before as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _as_given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in whole(self).items() if name in self.model_fields_set}


class Identity(_Part):
    """Which checkpoint: its name, and the SHA-256 of each file that decides what it computes
    (:func:`compresskit.model.identity.of_folder`).
    """

    name: str
    sha256: dict[str, str]


class Text(_Part):
    """Which text: a file's name, a data set of the hub (without a hash) or the embedded text.

    Attributes:
        source: the name.
        sha256: of the text, or of the training rows of ``task``.
        part: ``training`` or ``held-out``; absent: all of it.
        task: whose training rows these are; absent: general text.
        fields: of a table: the columns with texts; absent: it is none.
    """

    source: str
    sha256: str | None
    part: str | None = None
    task: str | None = None
    fields: tuple[str, ...] | None = None


class Rows(_Part):
    """One split of a task: how many rows, from where, the SHA-256 of its file, and what should be known of it; of a
    retrieval also how many documents.
    """

    rows: int
    source: str
    sha256: str | None
    remark: str
    documents: int | None = None


class Training(_Part, Stage):
    """One stage of training: the settings of :class:`Stage`, and what limited it.

    Attributes:
        max_steps, max_tokens: the budget, where it is not ``epochs``.
        precision: ``fp32`` or ``bf16``.
        seed: of a general stage, which cells may share; absent: the cell's own.
        new_head: whether the last layer of the checkpoint's head was replaced; absent: no.
    """

    max_steps: int | None
    max_tokens: int | None
    precision: str
    seed: int | None = None
    new_head: bool = False


class Fit(_Part):
    """What factors were fitted to: ``tokens`` of a text; ``weighed_by`` says what weighed the matrices, if anything."""

    text: Text
    tokens: int
    weighed_by: str | None = None


class Hardware(_Part):
    """The machine, without its name. ``memory_gib`` is None where the system does not say."""

    machine: str
    processor: str
    cores: int | None
    memory_gib: int | None
    threads: int
    device: str


class MadeBy(_Part):
    """All that is needed to do a cell again.

    Attributes:
        model: the dense checkpoint.
        recipe: of the student, as plain data without its defaults; None for a baseline.
        text: the general text of the grid; several where stage 1 reads several.
        unit: of the text, whose vectors stage 1 taught; None: it taught hidden states.
        language, max_texts: how the text was cut into units; absent: English, all of it.
        general: stage 1 of the students; None (written as ``{}``): there is none.
        task: the declaration as plain data without its defaults; this and the next four are of cells with a task.
        data: split -> its rows.
        notes: what reading the data had to say.
        teacher: how the task's teacher was fine-tuned.
        task_stage: stage 2 of the students.
        versions: of Python, compresskit and what decides a result.
        hardware: where it ran.
        git: the commit of the checkout that ran, with ``-dirty`` where files differ; None for an installed package.
        layers: of a baseline with fewer layers: ``3 of 6``.
        facts: what else a baseline says of its model: name -> text.
        resolved_recipe: the shape of every factor, as plain data; this and the next two are of compressed students.
        plan_notes: what planning had to say.
        calibration: what the factors were fitted to.
    """

    model: Identity
    recipe: dict[str, Any] | None
    text: Text | tuple[Text, ...]
    unit: tuple[str, ...] | None = None
    language: str | None = None
    max_texts: int | None = None
    general: Training | None
    task: dict[str, Any] | None = None
    data: dict[str, Rows] | None = None
    notes: tuple[str, ...] | None = None
    teacher: Training | None = None
    task_stage: Training | None = None
    versions: dict[str, str]
    hardware: Hardware
    git: str | None
    layers: str | None = None
    facts: dict[str, str] | None = None
    resolved_recipe: dict[str, Any] | None = None
    plan_notes: tuple[str, ...] | None = None
    calibration: Fit | None = None

    @field_validator("general", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return value or None

    @field_serializer("general")
    def _empty_for_none(self, value: Training | None) -> Any:
        return {} if value is None else value.model_dump(mode="json")


def digest(data: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
