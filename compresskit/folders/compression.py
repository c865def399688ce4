"""The record of a compression (``compression.json``): what it holds, how it is made, written and read."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from compresskit import __version__
from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import MARKER
from compresskit.model.weights import fingerprints
from compresskit.planning.planner import Plan
from compresskit.planning.recipe import Allocation, Objective
from compresskit.validation import read_json, validate

FORMAT_VERSION: Literal[1] = 1

#: Context of a validation whose data come from a file.
_FROM_FILE = "from a file"


class _Entry(BaseModel):
    """What compresskit writes has these entries and no others; what it reads may be another version's and hold more."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _known_only(cls, data: Any, info: ValidationInfo) -> Any:
        if info.context != _FROM_FILE or not isinstance(data, dict):
            return data
        known = {field.validation_alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if name in known}


class Counts(_Entry):
    """A count of the whole model, before compression and after."""

    before: int
    after: int = Field(gt=0)


class Megabytes(_Entry):
    """MB (10^6 bytes) of the weight files, before compression and after."""

    before: float
    after: float


class TrimmedEntry(_Entry):
    """What the vocabulary was before it was trimmed and after it: rows, and parameters of the whole dense model.
    ``trim.json`` says on which text.
    """

    rows: Counts
    parameters: Counts


class GroupRecord(_Entry):
    """A group of matrices that was factorised together.

    Attributes:
        name: of the group; of a single matrix its module's.
        targets: names of its matrices' modules.
        role: ``embedding``, ``attention``, ``ffn`` or ``head``; None for other matrices that a rule named.
        shape: of each matrix.
        spec: the method's own shapes.
        error: ||W - W'||_F / ||W||_F.
        output_error: of the outputs on the text of the calibration.
    """

    name: str
    targets: list[str] = []
    role: str | None = None
    shape: list[int] = []
    method: str = ""
    spec: dict[str, Any]
    parameters_before: int
    parameters_after: int
    error: float | None = None
    output_error: float | None = None


class CompressionRecord(_Entry):
    """Everything that the tables of a compression say. FLOPs are at batch 1 and length 128.

    Entries with a default are not needed to verify a folder; earlier versions lack some of them.

    Attributes:
        model: hub id or short name of the dense checkpoint.
        as_class: the class that was asked for, if any; ``as`` in the file.
        recipe: its name.
        ratio_asked: None where explicit shapes were given.
        flops_linear: of linear layers and look-ups only.
        calibration: text and tokens that the factors were fitted to.
        trimmed: where the vocabulary was trimmed too: ``parameters``, ``megabytes`` and ``flops`` before are those of
            the model before it was.
        notes: what the user was told.
        kept_tensors: of the base model, which the class does not use.
    """

    format_version: Literal[1]
    model: str = ""
    as_class: str | None = Field(default=None, validation_alias="as", serialization_alias="as")
    model_class: str
    dtype: str = ""
    recipe: str = ""
    allocation: Allocation = "uniform"
    objective: Objective = "size"
    ratio_asked: float | None = None
    ratio: float
    parameters: Counts
    megabytes: Megabytes
    flops: Counts
    flops_linear: Counts
    calibration: dict[str, Any] | None = None
    trimmed: TrimmedEntry | None = None
    notes: list[str] = []
    kept_tensors: list[str] = []
    groups: list[GroupRecord]
    versions: dict[str, str] = {}


def compression_record(checkpoint: Checkpoint, plan: Plan, *, bytes_before: int, bytes_after: int) -> CompressionRecord:
    """The record of a checkpoint that was compressed by ``plan``."""
    groups = [
        GroupRecord(
            name=a.group.name,
            targets=[target.name for target in a.group.targets],
            role=a.group.role,
            shape=list(a.group.shape),
            method=a.method,
            spec=a.spec.model_dump(mode="json"),
            parameters_before=a.group.parameters,
            parameters_after=a.parameters,
            error=a.error,
            output_error=a.output_error,
        )
        for a in plan.assignments
    ]
    # Without a calibration or a trimming the file has no entry for it.
    further: dict[str, Any] = {"calibration": plan.calibration} if plan.calibration is not None else {}
    if (whole := plan.untrimmed) is not None:
        further["trimmed"] = TrimmedEntry(
            rows=Counts(before=whole.rows, after=whole.rows_left),
            parameters=Counts(before=whole.parameters, after=whole.parameters_left),
        )
    return CompressionRecord(
        format_version=FORMAT_VERSION,
        model=checkpoint.origin,
        as_class=checkpoint.as_class,
        model_class=type(checkpoint.model).__name__,
        dtype=str(checkpoint.model.dtype).removeprefix("torch."),
        recipe=plan.recipe.name,
        allocation=plan.recipe.allocation,
        objective=plan.recipe.objective,
        ratio_asked=plan.ratio_asked,
        ratio=plan.ratio,
        parameters=Counts(before=plan.parameters_before, after=plan.parameters_after),
        megabytes=Megabytes(before=bytes_before / 1e6, after=bytes_after / 1e6),
        flops=Counts(before=plan.flops_before.total, after=plan.flops_after.total),
        flops_linear=Counts(before=plan.flops_before.linear, after=plan.flops_after.linear),
        notes=[*checkpoint.notes, *plan.notes],
        kept_tensors=sorted(checkpoint.kept),
        groups=groups,
        versions={"compresskit": __version__} | {name: version(name) for name in ("torch", "transformers")},
        **further,
    )


def write_record(record: CompressionRecord, folder: Path) -> None:
    """Write the record beside the weights, with their hashes."""
    _write(record.model_dump(by_alias=True, exclude_unset=True), folder)


def carry_record(source: Path, folder: Path) -> None:
    """Copy the record of ``source`` to a folder with other weights of the same shapes: all entries stay as they are but
    the hashes. Nothing is done where ``source`` has none.
    """
    if (source / MARKER).is_file():
        _write(read_json(source / MARKER, "cannot be read"), folder)


def _write(entries: dict[str, Any], folder: Path) -> None:
    text = json.dumps(entries | {"weights": fingerprints(folder)}, indent=2)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


def check_version(folder: Path) -> None:
    """Refuse a record that is missing or of another format version. Raises InputError."""
    if not (folder / MARKER).is_file():
        raise InputError(f"{folder}: holds no {MARKER}, so there is nothing to verify against")
    found = read_json(folder / MARKER, "cannot be read").get("format_version")
    if found != FORMAT_VERSION:
        raise InputError(f"{folder / MARKER}: format version {found!r}, this compresskit reads {FORMAT_VERSION}")


def read_record(folder: Path) -> CompressionRecord:
    """The record of a folder. Entries that this version does not know are left out.

    Raises:
        InputError: there is none, it cannot be read, or an entry is missing or of another kind.
    """
    data = read_json(folder / MARKER, "cannot be read")
    what = f"{MARKER}: an entry is missing or of another kind"
    record: CompressionRecord = validate(CompressionRecord, data, what, context=_FROM_FILE)
    return record
