"""From the name of a task to its declaration and its rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from compresskit.errors import InputError, one_line
from compresskit.model.classes import Lookup
from compresskit.storage import files, hub
from compresskit.tasks.declaration import Task
from compresskit.tasks.label_column import label_text
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import DEV, TRAIN, Split, Table, TaskData, placed
from compresskit.validation import parse_mapping, read_named, validate


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
    try:
        KINDS.get(task.kind).check(task)
    except InputError as error:
        raise InputError(f"{what}: {error}") from None
    return task


def find_task(task: Task | str | Path) -> Task:
    """The task that was given, as a declaration, by name or as a YAML file. Raises InputError."""
    if not isinstance(task, Task):
        return load_task(task)
    KINDS.get(task.kind).check(task)
    return task


def evaluation_only(task: Task) -> bool:
    """Whether nothing can be trained on the task."""
    return bool(task.transfer_of) or KINDS.get(task.kind).head is None


def load_data(task: Task, folder: Path | None, *, train: bool = True) -> TaskData:
    """The rows of a task: from files below ``folder``, or from the hub without one.

    Args:
        task: the declaration.
        folder: the data folder, e.g. GLUE's with ``SST-2/train.tsv``; the task's own folder will do as well, and a
            folder that holds one by the name of the task.
        train: whether the training split is needed; the others are always read.

    Raises:
        InputError: missing folder, file or column, bad line, unknown label, empty file; a transfer asked for training.
    """
    kind = KINDS.get(task.kind)
    if train and evaluation_only(task):
        of = f"models for {' or '.join(task.transfer_of)}" if task.transfer_of else f"kind {task.kind}"
        raise InputError(f"task {task.name}: is for evaluation only (of {of})")
    if folder is not None and not folder.is_dir():
        raise InputError(f"data {folder}: no such folder")
    notes: list[str] = []
    raw: dict[str, tuple[files.Rows, Split]] = {}
    if folder is None:
        raw, tables = _from_hub(task, train)
    else:
        folder = _own_folder(task, folder)
        paths = {split: _find(folder, names) for split, names in task.files.items()}
        need_train = train or paths.get(DEV) is None
        for split, path in paths.items():
            if path is not None and (split != TRAIN or need_train):
                raw[split] = _from_file(task, path, notes)
        for split in (TRAIN, DEV):
            if split in task.files and split not in raw and (split == DEV or need_train) and TRAIN not in raw:
                raise InputError(f"data {folder}: has no {' or '.join(task.files[split])} (task {task.name})")
        tables = {name: _table(task, folder, names) for name, names in task.tables.items()}
    if train and TRAIN not in raw:
        raise InputError(f"task {task.name}: names no train file, so nothing can be trained on it")
    if not raw:
        raise InputError(f"task {task.name}: names no files; give files: {{train: ..., dev: ...}}")
    for rows, about in raw.values():
        _check_columns(task, rows, about)
        if about.remark:
            notes.append(f"task {task.name}: reads {about.source} ({about.remark})")
    # A label that train lacks is a mistake.
    sources = [raw[TRAIN]] if TRAIN in raw else raw.values()
    labels = kind.labels(task, (found for rows, about in sources for found in placed(rows, about.source)))
    if labels and task.labels is None:
        notes.append(f"task {task.name}: labels found: {', '.join(labels)}")
    splits = _examples(task, raw, labels, tables, notes)
    if train and labels and len(labels) < 2:
        raise InputError(f"task {task.name}: column {task.label!r} has 1 different labels, needs two or more")
    if DEV not in splits:
        splits[TRAIN], splits[DEV] = _hold_out(splits[TRAIN], kind.groups(splits[TRAIN]), task.holdout)
        notes.append(f"task {task.name}: no dev file, so {len(splits[DEV])} rows of train are held out (seed 0)")
    if not train:
        splits.pop(TRAIN, None)
    return TaskData(task, splits, labels, tuple(dict.fromkeys(notes)), _labels_of_sources(task))


def _examples(
    task: Task,
    raw: Mapping[str, tuple[files.Rows, Split]],
    labels: Sequence[str],
    tables: Mapping[str, Table],
    notes: list[str],
) -> dict[str, Split]:
    """The rows of every split as the kind's examples; what it has to say goes to ``notes``."""
    by_value = {label_text(v) or v: n for n, v in task.labels.items()} if task.labels else {n: n for n in labels}
    splits = {}
    for name, (rows, about) in raw.items():
        found, said = KINDS.get(task.kind).split(task, rows, about, by_value, tables)
        splits[name] = _with_tables(found, tables)
        notes += said
    return splits


def _labels_of_sources(task: Task) -> tuple[tuple[str, ...], ...]:
    shipped = shipped_tasks()
    known = [load_task(name) for name in task.transfer_of if name in shipped]
    return tuple(tuple(source.labels) for source in known if source.labels is not None)


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of a split: exactly as named, below its folders, some of them or none, else its one variant
    (``train.sample.tsv``, ``hans_regenerated.txt.gz``).
    """
    places = [folder / Path(*parts[start:]) for parts in (Path(n).parts for n in names) for start in range(len(parts))]
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


def _own_folder(task: Task, folder: Path) -> Path:
    """The folder in it by the name of the task, where that has files of the task and the folder itself has none."""
    own = folder / task.name
    found = [[place for names in task.files.values() if _find(place, names)] for place in (folder, own)]
    return own if found[1] and not found[0] else folder


def _from_file(task: Task, path: Path, notes: list[str]) -> tuple[files.Rows, Split]:
    named = {Path(name).name for names in task.files.values() for name in names}
    plain = path.name.removesuffix(".gz")
    stems = [Path(name).stem for name in named if plain.startswith(Path(name).stem)]
    remark = "" if plain in named else Path(plain).stem[len(max(stems, key=len)) :].strip("._-")
    about = Split([], [], path.name, files.file_hash(path), remark)
    rows, note = KINDS.get(task.kind).read(task, path)
    if note is not None:
        notes.append(f"data {path.name}: {note}")
    return rows, about


def _table(task: Task, folder: Path, names: Sequence[str]) -> Table:
    path = _find(folder, names)
    if path is None:
        raise InputError(f"data {folder}: has no {' or '.join(names)} (task {task.name})")
    rows, _ = files.read_rows(path)
    return Table(rows, path.name, files.file_hash(path))


def _with_tables(split: Split, tables: Mapping[str, Table]) -> Split:
    """The split with the tables in its source, and in its hash, which is then one of the hashes of all files."""
    if not tables:
        return split
    parts: list[Split | Table] = [split, *tables.values()]
    hashes = [part.sha256 for part in parts if part.sha256 is not None]
    whole = hashlib.sha256(" ".join(hashes).encode()).hexdigest() if len(hashes) == len(parts) else None
    return replace(split, source=", ".join(part.source for part in parts), sha256=whole)


def _from_hub(task: Task, train: bool) -> tuple[dict[str, tuple[files.Rows, Split]], dict[str, Table]]:
    if task.hub is None:
        raise InputError(f"task {task.name}: names no data set on the hub; give its folder with --data")
    wanted = [split for split in task.files if split != TRAIN or train] or ([TRAIN] if train else []) + [DEV]
    raw = {}
    for split in wanted:
        theirs = task.hub.splits.get(split, split)
        dataset, address = _dataset(task, task.hub.path, task.hub.name, theirs)
        label = task.hub.label or task.label
        renamed = dict(zip(task.hub.inputs or task.inputs, task.inputs, strict=True)) | {label: task.label}
        rows = [{renamed.get(key, key): value for key, value in row.items()} for row in dataset]
        feature = (dataset.features or {}).get(label)
        _name_classes(task, rows, getattr(getattr(feature, "feature", feature), "names", None))
        raw[split] = (KINDS.get(task.kind).from_hub(task, rows), Split([], [], address))
    tables = {}
    for table, place in task.hub.tables.items():
        name, _, theirs = place.partition("/")
        dataset, address = _dataset(task, task.hub.path, name, theirs)
        tables[table] = Table(list(dataset), address)
    return raw, tables


def _dataset(task: Task, path: str, name: str | None, split: str) -> tuple[Any, str]:
    """A split of a data set of the hub, and its address. Raises InputError."""
    address = "/".join(part for part in (path, name, split) if part)
    try:
        return hub.load_dataset(path, name, split=split), address
    except Exception as error:  # the library raises a dozen kinds, from no network to no such split
        reason = one_line(error)
        raise InputError(
            f"task {task.name}: {address} cannot be had from the hub ({reason}); give a folder with --data"
        ) from None


def _name_classes(task: Task, rows: files.Rows, names: Sequence[str] | None) -> None:
    """Put the hub's classes by their names in the place of their numbers, where the declaration has all of these names
    or lists none.
    """
    if not names or not KINDS.get(task.kind).takes_labels:
        return
    values = list(names)
    if task.labels is not None:
        known = [Lookup(list(task.labels))(name) for name in names]
        if None in known:
            return
        values = [task.labels[name] for name in known if name is not None]

    def named(cell: Any) -> Any:
        if isinstance(cell, list):
            return [named(one) for one in cell]
        if not isinstance(cell, int):
            return cell
        return values[cell] if 0 <= cell < len(values) else None  # -1 where there is no label

    for row in rows:
        row[task.label] = named(row.get(task.label))


def _check_columns(task: Task, rows: files.Rows, about: Split) -> None:
    if not rows:
        raise InputError(f"data {about.source}: holds no rows")
    for column in KINDS.get(task.kind).columns(task):
        if column not in rows[0]:
            found = ", ".join(map(str, rows[0]))
            raise InputError(f"data {about.source}: has no column {column!r}; its columns: {found}")


def _hold_out(split: Split, groups: Sequence[Hashable], share: float) -> tuple[Split, Split]:
    """A share of the groups as rows of their own; ``groups`` has that of each row."""
    names = list(dict.fromkeys(groups))
    count = max(1, round(share * len(names)))
    if count >= len(names):
        what = "rows are" if len(names) == len(split) else "groups of rows (queries) are"
        raise InputError(f"data {split.source}: {len(names)} {what} too few to hold out some of them")
    chosen = {names[place] for place in np.random.default_rng(0).permutation(len(names))[:count]}
    held = [row for row, group in enumerate(groups) if group in chosen]
    kept = [row for row, group in enumerate(groups) if group not in chosen]
    return (
        split.take(kept, f"without {len(held)} held-out rows"),
        split.take(held, f"{len(held)} rows of train held out, seed 0"),
    )
