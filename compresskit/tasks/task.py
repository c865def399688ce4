"""Tasks: what to read, what the labels mean, how to score. One YAML declaration each, shipped ones and a user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compresskit.errors import InputError, unknown
from compresskit.storage import files, hub
from compresskit.tasks import metrics, squad
from compresskit.validation import parse_mapping, read_named, validate

TRAIN, DEV = "train", "dev"


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
    """

    path: str
    name: str | None = None
    splits: dict[str, str] = Field(default_factory=dict)
    inputs: tuple[str, ...] | None = None
    label: str | None = None


class Task(_Strict):
    """A declared task.

    Attributes:
        version: of this format: 1.
        name: goes into the names of outputs and tables.
        description: for readers; `compresskit tasks` shows it.
        kind: ``classification``, ``regression``, ``spans`` (SQuAD's JSON) or ``similarity``: how near the cosine of two
            sentence vectors comes to a number; needs no head and is for evaluation only.
        inputs: one or two text columns.
        label: the column of the label.
        labels: label name -> its value in the files, in the order of the class numbers. Default: the sorted values.
        columns: names of the columns of files without a header.
        files: split -> file (or alternatives) below the data folder. ``train`` and ``dev`` are what commands use; any
            further split is scored too where it is there.
        hub: where the task lies on the hub, for use without a data folder.
        metrics: names of :data:`compresskit.tasks.metrics.METRICS`; the first one is the primary metric.
        max_length: default length in tokens.
        bad_lines: ``refuse`` (default) or ``skip`` lines with the wrong number of fields, with a note.
        holdout: the share of ``train`` that serves as ``dev`` where no such file is there (seed 0, stated in a note).
        transfer_of: tasks whose models this one scores; it is for evaluation only.
        map_labels: a label of those tasks -> a label of this one; equal names need no entry.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    kind: Literal["classification", "regression", "spans", "similarity"] = "classification"
    inputs: tuple[str, ...] = Field(min_length=1, max_length=2)
    label: str
    labels: dict[str, str] | None = None
    columns: tuple[str, ...] | None = None
    files: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    hub: Hub | None = None
    metrics: tuple[str, ...] = Field(min_length=1)
    max_length: int = Field(default=128, ge=8)
    bad_lines: Literal["refuse", "skip"] = "refuse"
    holdout: float = Field(default=0.1, gt=0, lt=1)
    transfer_of: tuple[str, ...] = ()
    map_labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: (names,) if isinstance(names, str) else names for split, names in value.items()}
        return value

    @field_validator("files")
    @classmethod
    def _inside(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in (name for names in value.values() for name in names):
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"{name!r} leads out of the data folder; name files below it")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Task:
        for name in self.metrics:
            if name not in metrics.METRICS and name not in metrics.SPAN_METRICS:
                raise ValueError(str(unknown("metric", name, [*metrics.METRICS, *metrics.SPAN_METRICS])))
            if (name in metrics.SPAN_METRICS) != (self.kind == "spans"):
                raise ValueError(f"metric {name} does not fit kind {self.kind}")
        if self.labels is not None and self.kind != "classification":
            raise ValueError(f"labels are for classification, not for {self.kind}")
        if self.kind in ("spans", "similarity") and len(self.inputs) != 2:
            what = "question and context" if self.kind == "spans" else "two sentences"
            raise ValueError(f"kind {self.kind} takes two inputs: {what}")
        return self

    @property
    def primary(self) -> str:
        """The metric by which students are compared with teachers."""
        return self.metrics[0]

    @property
    def evaluation_only(self) -> bool:
        """Whether nothing can be trained on it."""
        return bool(self.transfer_of) or self.kind == "similarity"


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        texts: one tuple of one or two texts a row.
        targets: label names, numbers (regression) or :class:`squad.Answers` (spans).
        source: file name or hub address, for records.
        sha256: of the file; None for the hub.
        remark: what keeps the rows from being the official ones, e.g. ``sample``; empty otherwise.
    """

    texts: list[tuple[str, ...]]
    targets: list[Any]
    source: str
    sha256: str | None = None
    remark: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int], remark: str) -> Split:
        """Some of the rows; the remark is added to the own one."""
        return Split(
            [self.texts[i] for i in indices],
            [self.targets[i] for i in indices],
            self.source,
            self.sha256,
            ", ".join(part for part in (self.remark, remark) if part),
        )


@dataclass(frozen=True)
class TaskData:
    """A task with its rows, and notes for the user on how they were found."""

    task: Task
    splits: dict[str, Split]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """Which rows these are, as plain data."""
        return {
            name: {"rows": len(split), "source": split.source, "sha256": split.sha256, "remark": split.remark}
            for name, split in self.splits.items()
        }


def shipped_tasks() -> dict[str, Any]:
    """Name -> declaration of every task that comes with compresskit."""
    folder = resources.files("compresskit.tasks") / "declarations"
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}


def load_task(name_or_path: str | Path) -> Task:
    """Read a task by name (shipped) or from a YAML file.

    Raises:
        InputError: unknown name, unreadable file, or anything in it that is not valid.
    """
    what = f"task {name_or_path}"
    text = read_named("task", name_or_path, shipped_tasks())
    data = parse_mapping(text, what, "version, name, inputs, label and metrics")
    task: Task = validate(Task, data, what)
    return task


def load_data(task: Task, folder: Path | None, *, train: bool = True) -> TaskData:
    """The rows of a task: from files below ``folder``, or from the hub without one.

    Args:
        task: the declaration.
        folder: the data folder, e.g. GLUE's with ``SST-2/train.tsv``; the task's own folder will do as well.
        train: whether the training split is needed; the others are always read.

    Raises:
        InputError: missing folder, file or column, bad line, unknown label, empty file; a transfer asked for training.
    """
    if train and task.evaluation_only:
        of = f"models for {' or '.join(task.transfer_of)}" if task.transfer_of else "sentence vectors"
        raise InputError(f"task {task.name}: is for evaluation only (of {of})")
    if folder is not None and not folder.is_dir():
        raise InputError(f"data {folder}: no such folder")
    notes: list[str] = []
    raw: dict[str, tuple[files.Rows, Split]] = {}
    if folder is None:
        raw = _from_hub(task, train)
    else:
        found = {split: _find(folder, names) for split, names in task.files.items()}
        need_train = train or found.get(DEV) is None
        for split, path in found.items():
            if path is not None and (split != TRAIN or need_train):
                raw[split] = _from_file(task, path, notes)
        for split in (TRAIN, DEV):
            if split in task.files and split not in raw and (split == DEV or need_train) and TRAIN not in raw:
                raise InputError(f"data {folder}: has no {' or '.join(task.files[split])} (task {task.name})")
    if train and TRAIN not in raw:
        raise InputError(f"task {task.name}: names no train file, so nothing can be trained on it")
    if not raw:
        raise InputError(f"task {task.name}: names no files; give files: {{train: ..., dev: ...}}")
    for rows, about in raw.values():
        _check_columns(task, rows, about)
        if about.remark:
            notes.append(f"task {task.name}: reads {about.source} ({about.remark})")
    labels = _labels(task, raw)
    if task.kind == "classification" and task.labels is None:
        notes.append(f"task {task.name}: labels found: {', '.join(labels)}")
    splits = {name: _split(task, rows, about, labels) for name, (rows, about) in raw.items()}
    if DEV not in splits:
        splits[TRAIN], splits[DEV] = _hold_out(splits[TRAIN], task.holdout)
        notes.append(f"task {task.name}: no dev file, so {len(splits[DEV])} rows of train are held out (seed 0)")
    if not train:
        splits.pop(TRAIN, None)
    return TaskData(task, splits, labels, tuple(dict.fromkeys(notes)))


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of a split: exactly as named, in its folder or directly in ``folder``, else its one variant
    (``train.sample.tsv``, ``hans_regenerated.txt.gz``).
    """
    places = [place for name in names for place in (folder / name, folder / Path(name).name)]
    for place in places:
        for path in (place, place.with_name(place.name + ".gz")):
            if path.is_file():
                return path
    for place in places:
        pattern = re.compile(re.escape(place.stem) + r"[._-].+" + re.escape(place.suffix) + r"(\.gz)?")
        variants = [path for path in place.parent.glob("*") if pattern.fullmatch(path.name)]
        if len(variants) > 1:
            found = ", ".join(sorted(path.name for path in variants))
            raise InputError(f"data {place.parent}: several files could be {place.name}: {found}")
        if variants:
            return variants[0]
    return None


def _from_file(task: Task, path: Path, notes: list[str]) -> tuple[files.Rows, Split]:
    named = {Path(name).name for names in task.files.values() for name in names}
    plain = path.name.removesuffix(".gz")
    stems = [Path(name).stem for name in named if plain.startswith(Path(name).stem)]
    remark = "" if plain in named else Path(plain).stem[len(max(stems, key=len)) :].strip("._-")
    about = Split([], [], path.name, files.file_hash(path), remark)
    if task.kind == "spans":
        return squad.read_rows(path), about
    needed = (*task.inputs, task.label)
    rows, skipped = files.read_rows(path, task.columns, needed, skip_bad_lines=task.bad_lines == "skip")
    if skipped:
        notes.append(f"data {path.name}: {skipped} lines with the wrong number of fields were skipped")
    return rows, about


def _from_hub(task: Task, train: bool) -> dict[str, tuple[files.Rows, Split]]:
    if task.hub is None:
        raise InputError(f"task {task.name}: names no data set on the hub; give its folder with --data")
    wanted = [split for split in task.files if split != TRAIN or train] or ([TRAIN] if train else []) + [DEV]
    raw = {}
    for split in wanted:
        theirs = task.hub.splits.get(split, split)
        address = "/".join(part for part in (task.hub.path, task.hub.name, theirs) if part)
        try:
            dataset = hub.load_dataset(task.hub.path, task.hub.name, split=theirs)
        except Exception as error:  # the library raises a dozen kinds, from no network to no such split
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"task {task.name}: {address} cannot be had from the hub ({reason}); give a folder with --data"
            ) from None
        label = task.hub.label or task.label
        renamed = dict(zip(task.hub.inputs or task.inputs, task.inputs, strict=True)) | {label: task.label}
        rows = [{renamed.get(key, key): value for key, value in row.items()} for row in dataset]
        if task.labels:
            # The hub has class numbers; they count in the order of the declaration.
            values = list(task.labels.values())
            for row in rows:
                number = row.get(task.label)
                if isinstance(number, int) and 0 <= number < len(values):
                    row[task.label] = values[number]
        raw[split] = (rows, Split([], [], address))
    return raw


def _labels(task: Task, raw: Mapping[str, tuple[files.Rows, Split]]) -> tuple[str, ...]:
    if task.kind != "classification":
        return ()
    if task.labels is not None:
        return tuple(task.labels)
    sources = [raw[TRAIN]] if TRAIN in raw else raw.values()  # a label that train lacks is a mistake
    values = {str(row[task.label]) for rows, _ in sources for row in rows if row.get(task.label) is not None}
    if len(values) < 2:
        raise InputError(
            f"task {task.name}: column {task.label!r} has {len(values)} different labels, needs two or more"
        )
    if len(values) > 1000:
        raise InputError(
            f"task {task.name}: column {task.label!r} has {len(values)} different values: is it the label?"
        )
    return tuple(sorted(values))


def _check_columns(task: Task, rows: files.Rows, about: Split) -> None:
    for column in (*task.inputs, *(() if task.kind == "spans" else (task.label,))):
        if column not in rows[0]:
            found = ", ".join(map(str, rows[0]))
            raise InputError(f"data {about.source}: has no column {column!r}; its columns: {found}")


def _split(task: Task, rows: files.Rows, about: Split, labels: Sequence[str]) -> Split:
    by_value = {value: name for name, value in task.labels.items()} if task.labels else {name: name for name in labels}
    texts: list[tuple[str, ...]] = []
    targets: list[Any] = []
    for number, row in enumerate(rows, start=1):
        where = f"data {about.source}, row {number}"
        if any(not isinstance(row.get(column), str) for column in task.inputs):
            column = next(c for c in task.inputs if not isinstance(row.get(c), str))
            raise InputError(f"{where}: column {column!r} holds no text: {row.get(column)!r}")
        texts.append(tuple(row[column] for column in task.inputs))
        value = row.get(task.label)
        if task.kind == "spans":
            targets.append(squad.Answers.of(row))
        elif task.kind in ("regression", "similarity"):
            targets.append(_number(value, f"{where}: column {task.label!r}"))
        elif str(value) not in by_value:
            raise InputError(f"{where}: unknown label {value!r}; known: {', '.join(by_value)}")
        else:
            targets.append(by_value[str(value)])
    return Split(texts, targets, about.source, about.sha256, about.remark)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where} must hold numbers, not {value!r}") from None
    if not np.isfinite(number):
        raise InputError(f"{where} must hold finite numbers, not {value!r}")
    return number


def _hold_out(split: Split, share: float) -> tuple[Split, Split]:
    count = max(1, round(share * len(split)))
    if count >= len(split):
        raise InputError(f"data {split.source}: {len(split)} rows are too few to hold out some of them")
    order = np.random.default_rng(0).permutation(len(split))
    held, kept = sorted(order[:count].tolist()), sorted(order[count:].tolist())
    return (
        split.take(kept, f"without {count} held-out rows"),
        split.take(held, f"{count} rows of train held out, seed 0"),
    )
