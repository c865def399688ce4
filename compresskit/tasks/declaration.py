"""The declaration of a task: what to read, what the labels mean, how to score. One YAML file each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hub(_Strict):
    """Where a task lies on the hub.

    Attributes:
        path: of the data set, ``owner/name``.
        name: of its configuration, where it has several.
        splits: our name of a split -> theirs, where they differ.
        inputs: the text columns, where they are not those of the files.
        label: the column of the label, where it is not that of the files.
        tables: further table -> ``configuration/split`` of it.
    """

    path: str
    name: str | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    inputs: tuple[str, ...] | None = None
    label: str | None = None
    tables: dict[str, Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")]] = Field(default_factory=dict)


class Task(_Strict):
    """A declared task. What its kind demands of it is checked by :func:`compresskit.tasks.loading.load_task`.

    Attributes:
        version: of this format: 1.
        name: goes into the names of outputs and tables.
        description: for readers; `compresskit tasks` shows it.
        kind: a registered task kind: ``classification``, ``multi-label``, ``regression``, ``ranking`` (of the texts of
            each query), ``tags`` (for words), ``spans`` (SQuAD's JSON), ``similarity`` (how near the cosine of two
            sentence vectors comes to a number; it needs no head and is for evaluation only), ``retrieval`` (which
            documents answer a query, by the nearness of their vectors; for evaluation only too), or one of another
            package.
        inputs: one or two text columns; with ``tables`` the columns of ids.
        label: the column of the label.
        labels: label name -> its value in the files, in the order of the class numbers. Default: the values
            found, numbers by their value and texts by the alphabet.
        columns: names of the columns of files without a header.
        files: split -> file (or alternatives) below the data folder. ``train`` and ``dev`` are what commands use; any
            further split is scored too where it is there.
        tables: further table of the kind -> file (or alternatives). ``retrieval`` takes ``queries`` (columns ``_id``
            and ``text``) and ``corpus`` (the same, and ``title`` if there is one); without them rows hold the texts.
        hub: where the task lies on the hub, for use without a data folder.
        metrics: names of metrics that the kind has; the first one is the primary metric.
        max_length: default length in tokens.
        threshold: ``multi-label``: a label counts as predicted from this probability on. Default: 0.5.
        bad_lines: ``refuse`` (default) or ``skip`` lines with the wrong number of fields, with a note.
        holdout: the share of ``train`` that serves as ``dev`` where no such file is there (seed 0, stated in a note).
        transfer_of: tasks whose models this one scores; it is for evaluation only.
        map_labels: a label of those tasks -> a label of this one; equal names need no entry.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    kind: str = "classification"
    inputs: tuple[str, ...] = Field(min_length=1, max_length=2)
    label: str
    labels: dict[str, str] | None = None
    columns: tuple[str, ...] | None = None
    files: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    hub: Hub | None = None
    metrics: tuple[str, ...] = Field(min_length=1)
    max_length: int = Field(default=128, ge=8)
    threshold: float | None = Field(default=None, gt=0, lt=1)
    bad_lines: Literal["refuse", "skip"] = "refuse"
    holdout: float = Field(default=0.1, gt=0, lt=1)
    transfer_of: tuple[str, ...] = ()
    map_labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("labels", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            wanted = "pairs of names and values, such as {negative: '0', positive: '1'}, or nothing"
            column = (
                f"; is {value} the column of the label? Then write label: {value}" if isinstance(value, str) else ""
            )
            raise ValueError(f"takes {wanted}{column}")
        return value

    @field_validator("files", "tables", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: (names,) if isinstance(names, str) else names for split, names in value.items()}
        return value

    @field_validator("files", "tables")
    @classmethod
    def _inside(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in (name for names in value.values() for name in names):
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"{name!r} leads out of the data folder; name files below it")
        return value

    @property
    def primary(self) -> str:
        """The metric by which students are compared with teachers."""
        return self.metrics[0]
